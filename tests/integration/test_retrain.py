"""Days of a project that is retrained by itself: real trainings, a real registry, real git."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest

from aegan.training.loop import COLLAPSED
from pipelines.base import params
from pipelines.retraining.steps import STEPS
from tests import interrupted_retraining
from tests.compose import wait_until
from tests.interrupted_retraining import Moment
from tests.pictures import write_folder
from tests.retrained import PARAMETERS, Project, faces, webhook

pytestmark = [
    pytest.mark.integration,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
TRAININGS = 200, 400  # images of the first day, and of the second one


@pytest.fixture(scope="module")
def heard() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with webhook() as listening:
        yield listening


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, heard: tuple[str, list[dict[str, Any]]]
) -> Project:
    """After its first day, on which a training was killed and the command run again."""
    told = {"AEGAN_WEBHOOK": heard[0], "AEGAN_WEBHOOK_SECRET": "key"}
    made = Project(tmp_path_factory.mktemp("retraining") / "project", PARAMETERS, told)
    _add(made, "first", faces(0, TRAININGS[0]))
    killed = made.start("retrain", output=subprocess.DEVNULL)
    runs = made.folder / "retraining/work/runs"
    wait_until(lambda: any(runs.glob("*/checkpoints/*")), seconds=300, what="a checkpoint")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    _wait_for_end_of_training(made)
    output = made.run("retrain")
    assert "promoted" in output
    assert "Running stage 'download'" not in output  # the first steps were whole
    assert re.search(r"resuming at step \d+ of run|run \S+ is complete already", output), output
    return made


def _add(project: Project, name: str, images: np.ndarray) -> None:
    write_folder(project.folder / "data/faces" / name, images)


def _ids(project: Project) -> set[str]:
    return {path.stem for path in (project.folder / "retraining").glob("*.json")}


def _entry(project: Project, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((project.folder / f"retraining/{name}.json").read_text())
    return entry


def _wait_for_end_of_training(project: Project) -> None:
    """What a killed command had started ends by itself, or is told to: its lock says when."""
    lock = project.folder / "retraining/work/artifacts/.locks/pipeline"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        held = subprocess.run(["flock", "--nonblock", str(lock), "true"], check=False).returncode
        if held == 0:
            return
        time.sleep(0.5)


def test_the_first_model_becomes_champion_by_floors_and_is_published(
    project: Project, heard: tuple[str, list[dict[str, Any]]]
) -> None:
    assert project.champion() == "1"
    [name] = _ids(project)
    assert project.git("tag", "--list").split() == [f"retrained/{name}"]
    assert "dvc.lock" in project.git("show", "--name-only", "--format=", f"retrain/{name}")
    assert [(message["outcome"], message["champion"]) for message in heard[1]] == [
        ("promoted", "1")
    ]


def test_the_page_shows_what_the_version_draws_and_how_it_ended(project: Project) -> None:
    page = (project.folder / "retraining/index.html").read_text()
    assert "Samples and reconstructions of version 1" in page
    assert "only absolute floors were held" in page
    assert "http://" not in page  # one file, without network


def test_nothing_new_is_nothing_done(project: Project) -> None:
    before = _ids(project)
    facts = json.loads(project.run("retrain", "--json").splitlines()[-1])
    assert (facts["nothing_new"], facts["outcome"], facts["champion"]) == (True, "promoted", "1")
    assert {facts["id"]} == before
    assert "nothing new" in project.run("retrain", "--dry-run")
    assert _ids(project) == before
    assert project.champion() == "1"


def test_the_users_own_folder_is_never_touched(project: Project) -> None:
    status = project.git("status", "--porcelain").splitlines()
    assert status == ["?? reference.dvc"]  # which the user may commit
    assert not (project.folder / "artifacts/train").exists()


def test_a_change_that_is_not_committed_is_named(project: Project) -> None:
    file = project.folder / "params.yaml"
    before = file.read_text()
    file.write_text(before.replace("num_steps: 200", "num_steps: 300"))
    assert "params.yaml: changed and not committed" in project.run("retrain", expected=1)
    file.write_text(before)


def test_images_of_another_kind_are_asked_about_and_taken_when_somebody_says_why(
    project: Project,
) -> None:
    before = project.champion()
    _add(project, "negative", 255 - faces(1000, 100))
    assert "of another kind" in project.run("retrain", expected=3)
    assert project.champion() == before
    [asking] = {name for name in _ids(project) if _entry(project, name)["outcome"] == "asks"}
    assert (project.folder / f"retraining/{asking}-odd.png").exists()
    project.run("retrain", expected=3)  # it still asks
    assert "--reason" in project.run("retrain", "--accept-drift", asking, expected=1)
    output = project.run(
        "retrain", "--accept-drift", asking, "--reason", "negatives", "--until", "decide"
    )
    assert "ends after the step decide" in output
    entry = _entry(project, asking)
    assert (entry["accepted"], entry["steps"]["decide"]["result"]) == ("negatives", {"start": ""})
    for file in (project.folder / "data/faces/negative").iterdir():
        file.unlink()


def test_a_source_that_lost_most_of_its_images_is_refused(project: Project) -> None:
    before = project.champion()
    kept = project.folder / "data/kept"
    (project.folder / "data/faces").rename(kept)
    _add(project, "few", faces(5000, 100))
    assert "not there any more" in project.run("retrain", expected=3)
    assert project.champion() == before
    for file in (project.folder / "data/faces/few").iterdir():
        file.unlink()
    (project.folder / "data/faces/few").rmdir()
    (project.folder / "data/faces").rmdir()
    kept.rename(project.folder / "data/faces")


def test_a_generator_that_draws_alike_ends_its_training_and_is_refused(project: Project) -> None:
    """One that has two pictures to draw, for the two latents of its prior."""
    before, champion = _ids(project), project.champion()
    _add(project, "more", faces(2000, 40))
    file = project.folder / "params.yaml"
    whole = file.read_text()
    two_latents = {"model": {"latent_dim": 1, "prior": "bernoulli(1)"}}
    params.change(two_latents | {"retrain": {"start": "anew"}}, file, said_by="tests")
    project.git("commit", "--quiet", "--all", "--message", "Two latents")
    assert COLLAPSED in project.run("retrain", expected=3)
    [name] = _ids(project) - before
    entry = _entry(project, name)
    assert entry["outcome"] == "refused"
    assert list(entry["steps"])[-1] == "train"
    assert project.champion() == champion
    assert len(json.loads(project.run("models", "--json"))) == 1
    file.write_text(whole)
    project.git("commit", "--quiet", "--all", "--message", "As before")
    for image in (project.folder / "data/faces/more").iterdir():
        image.unlink()


@pytest.mark.fault("retraining")
def test_more_images_go_on_from_the_champion_also_if_it_is_killed_at_each_end_of_every_step(
    project: Project,
    heard: tuple[str, list[dict[str, Any]]],
    record_property: Any,
    thorough: bool,
) -> None:
    """With `kill -9`, before a step and after its work, of which the ledger does not know then."""
    _add(project, "second", faces(TRAININGS[0], TRAININGS[1] - TRAININGS[0]))
    before = _ids(project)
    plan = project.run("retrain", "--dry-run")
    assert "would do: fetch, check, decide, train, publish, gate" in plan
    assert _ids(project) == before
    moments = get_args(Moment)
    for number, step in enumerate(STEPS):
        for moment in moments if thorough else [moments[number % len(moments)]]:
            interrupted_retraining.kill(project.folder, project.environment, step, moment)
            [name] = _ids(project) - before
            assert not _entry(project, name)["outcome"]
    record_property("faults", (len(moments) if thorough else 1) * len(STEPS))
    process = project.start("retrain")
    output, _ = process.communicate()
    assert process.returncode in (0, 3), output  # promoted, or refused with its reasons

    # All is as if nothing had happened.
    [name] = _ids(project) - before
    entry = _entry(project, name)
    assert list(entry["steps"]) == [*STEPS]
    assert all(step["output"] for step in entry["steps"].values())
    assert entry["steps"]["decide"]["result"] == {"start": "models:/aegan/1"}
    assert entry["steps"]["train"]["result"]["version"] == "2"
    assert [model["version"] for model in json.loads(project.run("models", "--json"))] == ["1", "2"]
    assert project.git("tag", "--list").split().count(f"retrained/{name}") == 1
    assert len(project.git("tag", "--list").split()) == 2
    commit = entry["steps"]["publish"]["result"]["commit"]
    assert project.git("rev-parse", f"retrained/{name}^{{commit}}", f"retrain/{name}").split() == [
        commit,
        commit,
    ]
    [decision] = [row for row in json.loads(project.run("history", "--json")) if row["to"] == "2"]
    assert decision["kind"] == ("promotion" if process.returncode == 0 else "refusal")
    assert entry["outcome"] == ("promoted" if process.returncode == 0 else "refused")
    assert entry["reasons"] == decision["reasons"]
    assert any(reason.startswith("on the new images") for reason in entry["reasons"])
    assert project.champion() == ("2" if process.returncode == 0 else "1")
    assert [one["outcome"] for one in heard[1] if one["retraining"] == name] == [entry["outcome"]]


def test_health_is_good_after_a_look(project: Project) -> None:
    assert "ok: the last look" in project.run("health")
