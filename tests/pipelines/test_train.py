"""The driver of a training, without Ray: what it goes on or starts from, what it heals and says."""

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aegan.config import ComputeConfig, Schedule, TrainConfig
from aegan.training import checkpoint, loop, training_log
from aegan.training.run_folder import RunFolder, step_name
from pipelines import register
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.bucket.finished_run import CURVES, _write_curves, publish
from pipelines.cluster.worker import train_here
from pipelines.train import run_name, train
from tests.disks import largest_file, small_disk
from tests.tiny import PARAMS, tiny_config, tiny_shards
from tests.trained import CONFIG as REGISTERED
from tests.trained import REGISTER, write_model, write_project

pytestmark = pytest.mark.usefixtures("one_thread")
COMPUTE = params.load(ComputeConfig, PARAMS)
CONFIG = tiny_config(num_steps=10, checkpoint_interval_steps=3, log_interval_steps=2)
TIMES = ("time", "seconds", "images_per_second")


@dataclass(frozen=True)
class Project:
    """A folder in which the stage is run, by a worker in this process."""

    folder: Path
    shards: Path

    def train(self, config: TrainConfig = CONFIG, *, stop_at: int | None = None) -> Path:
        """What the command does, until `stop_at` if there is one; returns the run's folder."""

        def run_workers(config: TrainConfig, *others: Any, **keywords: Any) -> dict[str, Any]:
            folder = keywords["folder"]
            # Asked once at every step.
            step = iter(range(max(checkpoint.steps(folder.checkpoints), default=0) + 1, 1_000_000))
            outcome = train_here(
                config,
                shards=keywords["shards"],
                run_folder=folder.path,
                device=torch.device("cpu"),
                should_stop=lambda: next(step) == stop_at,
            )
            if not outcome.get("finished", True):
                folder.stop.touch()
            return outcome

        folder = train(
            config, COMPUTE, shards=self.shards, runs=self.folder / "runs", run_workers=run_workers
        )
        publish(folder, self.folder / "artifacts/train", shards=self.shards)
        return folder.path

    @property
    def run_folder(self) -> Path:
        (folder,) = (self.folder / "runs").iterdir()
        return folder

    def published(self, *, last_step: int = 10) -> dict[str, Any]:
        """What the later stages see, without what depends on the time of day."""
        output = self.folder / "artifacts/train"
        metrics = json.loads((output / "metrics.json").read_text())
        rows = csv.DictReader((output / "curves.csv").read_text().splitlines())
        facts = json.loads((output / "run.json").read_text())
        return {
            "model": {file.name: file.read_bytes() for file in (output / "model").iterdir()},
            "metrics": {key: value for key, value in metrics.items() if key not in TIMES},
            "curves": [{key: row[key] for key in row if key not in TIMES} for row in rows],
            "params": facts["params"],
            "pictures": (output / f"samples/step-{last_step:08d}-samples.png").read_bytes(),
        }


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def _stop_at_any_step(monkeypatch):
    monkeypatch.setattr(loop, "STOP_INTERVAL_STEPS", 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shards) -> Project:
    project = Project(tmp_path_factory.mktemp("finished"), shards)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    project.train()
    torch.set_num_threads(threads)
    return project


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, shards) -> Project:
    project = Project(tmp_path_factory.mktemp("interrupted"), shards)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "STOP_INTERVAL_STEPS", 1)
        with pytest.raises(KeyboardInterrupt):
            project.train(stop_at=8)
    torch.set_num_threads(threads)
    return project


def newest(run_folder: Path) -> Path:
    folder = run_folder / "checkpoints"
    return folder / step_name(checkpoint.steps(folder)[-1])


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(run_folder: Path) -> None:
        file = run_folder / name.replace("NEWEST", f"checkpoints/{newest(run_folder).name}")
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(content)

    return damage


def change(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(run_folder: Path) -> None:
        file = run_folder / name.replace("NEWEST", f"checkpoints/{newest(run_folder).name}")
        before = file.read_bytes()
        file.write_bytes(change(before))
        assert file.read_bytes() != before

    return damage


def delete(name: str) -> Callable[[Path], None]:
    def damage(run_folder: Path) -> None:
        path = run_folder / name.replace("NEWEST", f"checkpoints/{newest(run_folder).name}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def rename_to_a_later_step(run_folder: Path) -> None:
    newest(run_folder).rename(run_folder / "checkpoints/step-00000011")


def read_only(run_folder: Path) -> None:
    for file in run_folder.glob("*.json*"):
        file.chmod(0o444)


def left_overs(run_folder: Path) -> None:
    half = run_folder / "checkpoints/.step-00000009.tmp"
    half.mkdir()
    (half / checkpoint.TENSORS).write_bytes(b"half")
    for name in (".run.json.tmp", ".metrics.jsonl.tmp", "samples/.step-00000010-samples.png.tmp"):
        (run_folder / name).write_bytes(b"")
    (run_folder.parent.parent / "artifacts/.train.tmp/model").mkdir(parents=True)


HEALED = {
    "log: torn last line": change("metrics.jsonl", lambda text: text[:-20]),
    "log: garbage in the middle": change("metrics.jsonl", lambda t: t[:300] + b"\xff\0" + t[340:]),
    "log: empty": write("metrics.jsonl", b""),
    "log: missing": delete("metrics.jsonl"),
    "log: rows of another kind": change(
        "metrics.jsonl", lambda text: b'5\nnull\n{"a": 1}\n' + text
    ),
    "log: a score renamed": change("metrics.jsonl", lambda t: t.replace(b"_distance", b"_d")),
    "state: missing": delete("NEWEST/state.json"),
    "state: empty": write("NEWEST/state.json", b""),
    "state: torn": change("NEWEST/state.json", lambda text: text[:500]),
    "state: null": write("NEWEST/state.json", b"null"),
    "state: another attempt": change(
        "NEWEST/state.json", lambda t: t.replace(b'"attempt": 0', b'"attempt": 1')
    ),
    "tensors: missing": delete("NEWEST/state.safetensors"),
    "tensors: empty": write("NEWEST/state.safetensors", b""),
    "tensors: torn": change("NEWEST/state.safetensors", lambda content: content[:1000]),
    "tensors: one bit": change("NEWEST/state.safetensors", lambda c: c[:-1] + bytes([c[-1] ^ 1])),
    "newest checkpoint: missing": delete("NEWEST"),
    "newest checkpoint: renamed": rename_to_a_later_step,
    "all checkpoints: missing": delete("checkpoints"),
    "checkpoints: stray files": write("checkpoints/step-00000099", b"x"),
    "checkpoints: scores of an older version": write("checkpoints/scores.json", b""),
    "facts: missing": delete("run.json"),
    "facts: empty": write("run.json", b""),
    "facts: null": write("run.json", b"null"),
    "outcome: damaged": write("outcome.json", b"{"),
    "stop: left over": write("stop", b""),
    "half-written files: left over": left_overs,
    "read-only files": read_only,
}
ALSO_HEALED_WHEN_FINISHED = {
    "pictures: missing": delete("samples"),
    "pictures: empty": write("samples/step-00000010-samples.png", b""),
    "pictures: torn": change("samples/step-00000010-samples.png", lambda content: content[:-30]),
    "pictures: stray files": write("samples/step-99.png", b"x"),
}


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *(("finished", damage) for damage in {**HEALED, **ALSO_HEALED_WHEN_FINISHED}),
        *(("interrupted", damage) for damage in HEALED),
    ],
)
def test_a_damaged_run_is_healed_by_a_resume(request, finished, tmp_path, kind, damage):
    project = Project(tmp_path / "project", finished.shards)
    shutil.copytree(request.getfixturevalue(kind).folder, project.folder)
    {**HEALED, **ALSO_HEALED_WHEN_FINISHED}[damage](project.run_folder)
    project.train()
    assert project.published() == finished.published()
    rows = RunFolder(project.run_folder).rows()
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9, 10]
    assert all(len(row) > 5 for row in rows)


def spoil_all(run_folder: Path) -> None:
    for file in run_folder.glob("checkpoints/*/state.safetensors"):
        file.write_bytes(b"")


def spoil_best(run_folder: Path) -> None:
    rows = RunFolder(run_folder).rows()
    best = training_log.best_step(rows, "validation_frechet_distance")
    assert best is not None
    newer = [step for step in checkpoint.steps(run_folder / "checkpoints") if step > best]
    assert newer, "the best one must not be the newest here: choose another seed"
    (RunFolder(run_folder).checkpoint(best) / checkpoint.TENSORS).unlink()


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("damage", [spoil_all, spoil_best])
def test_what_a_resume_cannot_heal_is_one_line_with_the_cure(finished, tmp_path, damage):
    project = Project(tmp_path / "project", finished.shards)
    shutil.copytree(finished.folder, project.folder)
    damage(project.run_folder)
    with pytest.raises(
        UserError, match=r"step-000000\d\d is damaged .* delete .* to train"
    ) as error:
        project.train()
    assert str(project.run_folder) in str(error.value)
    assert "\n" not in str(error.value)
    shutil.rmtree(project.run_folder)  # the cure
    project.train()
    assert project.published() == finished.published()


@pytest.mark.fault("damaged files")
def test_a_resume_says_which_checkpoint_is_damaged(finished, tmp_path, caplog):
    project = Project(tmp_path / "project", finished.shards)
    shutil.copytree(finished.folder, project.folder)
    (newest(project.run_folder) / checkpoint.TENSORS).unlink()
    with caplog.at_level("INFO"):
        project.train()
    assert "step-00000010 is damaged: going on from step 9" in caplog.text


# -- longer and shorter ---------------------------------------------------------------------------


def longer(num_steps: int, **options: Any) -> TrainConfig:
    return replace(CONFIG, training=replace(CONFIG.training, num_steps=num_steps, **options))


def test_a_longer_run_is_a_resume_and_publishes_what_one_at_once_would(finished, tmp_path):
    raised, at_once = (
        Project(tmp_path / "a", finished.shards),
        Project(tmp_path / "b", finished.shards),
    )
    shutil.copytree(finished.folder, raised.folder)
    for project in (raised, at_once):
        project.train(longer(17))
    assert raised.published(last_step=17) == at_once.published(last_step=17)
    facts = json.loads((raised.folder / "artifacts/train/run.json").read_text())
    assert facts["params"]["training"]["num_steps"] == 17
    assert facts["step"] == 17


def test_fewer_steps_than_were_trained_are_refused_with_the_way_out_and_no_resume(
    finished, tmp_path
):
    project = Project(tmp_path / "project", finished.shards)
    shutil.copytree(finished.folder, project.folder)
    with pytest.raises(
        UserError, match=r"num_steps is 5, but .* was trained for 10 steps"
    ) as error:
        project.train(longer(5))
    assert str(project.run_folder) in str(error.value)
    assert "set it to 10 or more" in str(error.value)
    project.train()
    assert project.published() == finished.published()


def test_a_schedule_over_all_of_a_training_is_published_and_refuses_other_ends_without_a_worker(
    shards, tmp_path
):
    project = Project(tmp_path / "project", shards)
    schedule = Schedule(schedule="linear", start=5e-4, end=1e-4, images=0)
    options = replace(CONFIG.training, num_steps=4, learning_rate=schedule)
    config = replace(CONFIG, training=options)
    project.train(config)
    curves = csv.DictReader(
        (project.folder / "artifacts/train/curves.csv").read_text().splitlines()
    )
    rates = {row["step"]: float(row["training.learning_rate"]) for row in curves}
    assert rates == {"2": pytest.approx(4e-4), "3": pytest.approx(3e-4), "4": pytest.approx(2e-4)}
    for num_steps in (3, 5):
        other = replace(config, training=replace(options, num_steps=num_steps))
        with pytest.raises(UserError, match=f"^training.num_steps is {num_steps}, but a schedule"):
            train(
                *(other, COMPUTE),
                shards=shards,
                runs=project.folder / "runs",
                run_workers=lambda *_, **__: pytest.fail("workers were started"),
            )
    project.train(config)  # which is complete


def test_fewer_steps_than_first_asked_for_but_not_yet_trained_are_a_resume(interrupted, tmp_path):
    project = Project(tmp_path / "project", interrupted.shards)
    shutil.copytree(interrupted.folder, project.folder)
    for num_steps in (9, 9):
        project.train(longer(num_steps))
        rows = RunFolder(project.run_folder).rows()
        assert rows[-1]["step"] == 9


def test_a_run_stopped_where_it_is_now_to_end_is_completed_by_a_resume(interrupted, tmp_path):
    project = Project(tmp_path / "project", interrupted.shards)
    shutil.copytree(interrupted.folder, project.folder)
    project.train(longer(8))
    rows = RunFolder(project.run_folder).rows()
    assert rows[-1]["step"] == 8
    assert "validation_frechet_distance" in rows[-1]
    whole = Project(tmp_path / "whole", interrupted.shards)
    whole.train(longer(8))
    name = "artifacts/train/model/ema.safetensors"
    assert (project.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_only_what_can_change_a_past_step_keeps_a_run_from_its_resume():
    name = run_name(CONFIG, "data")
    free = {
        "num_steps": 9999,
        "log_interval_steps": 7,
        "sample_interval_steps": 7,
        "checkpoint_interval_steps": 7,
        "checkpoints_kept": 7,
        "max_rollbacks": 7,
        "stop_on_collapse": True,
        "start_from": "the address, of which only the content counts",
    }
    training = CONFIG.training
    assert run_name(replace(CONFIG, training=replace(training, **free)), "data") == name
    assert run_name(CONFIG, "data", start_sha256="ab") != name
    others = {
        key: value * 2 if isinstance(value, (int, float)) and value else "another"
        for key, value in vars(training).items()
        if key not in free
    }
    names = {
        run_name(replace(CONFIG, training=replace(training, **{key: value})), "data")
        for key, value in others.items()
    }
    assert len(names | {name}) == 1 + len(others)


# -- weights to start from ------------------------------------------------------------------------


def beginning_with(address: object, *, config: TrainConfig = CONFIG, **options) -> TrainConfig:
    training = replace(config.training, start_from=str(address), **({"num_steps": 3} | options))
    return replace(config, training=training)


def test_a_run_records_the_source_of_its_weights(finished, tmp_path, caplog):
    project = Project(tmp_path / "project", finished.shards)
    model = shutil.copytree(finished.folder / "artifacts/train/model", tmp_path / "model")
    with caplog.at_level("INFO"):
        project.train(beginning_with(model))
    start = json.loads((project.folder / "artifacts/train/run.json").read_text())["start"]
    assert start["address"] == str(model)
    assert start["networks"] == ["generator", "encoder"]
    assert f"starting from {model} (sha256 {start['sha256'][:12]}): its generator, encoder" in (
        caplog.text
    )
    assert "the discriminators start from random weights" in caplog.text
    state = checkpoint.read_state(RunFolder(project.run_folder).checkpoint(3))
    assert state["start"] == start


def test_the_content_of_a_source_and_not_its_address_names_the_run(finished, tmp_path):
    project = Project(tmp_path / "project", finished.shards)
    model = finished.folder / "artifacts/train/model"
    copies = [shutil.copytree(model, tmp_path / name) for name in ("a", "b")]
    folders = {project.train(beginning_with(copy)) for copy in copies}
    assert len(folders) == 1  # the second was complete already
    shutil.copy(model / "weights.safetensors", copies[0] / "ema.safetensors")
    description = json.loads((model / "config.json").read_text())
    description.pop("sha256")
    (copies[0] / "config.json").write_text(json.dumps(description))
    assert project.train(beginning_with(copies[0])) not in folders
    assert project.train(replace(CONFIG, training=replace(CONFIG.training, num_steps=1))) not in (
        folders
    )


def test_a_longer_run_from_a_source_is_one_that_was_as_long_at_once(finished, tmp_path):
    source = RunFolder(next((finished.folder / "runs").iterdir())).checkpoint(10)
    weights = []
    for name, lengths in (("a", [3, 6]), ("b", [6])):
        project = Project(tmp_path / name, finished.shards)
        for num_steps in lengths:
            project.train(beginning_with(source, num_steps=num_steps))
        path = RunFolder(project.run_folder).checkpoint(6)
        weights.append((path / checkpoint.TENSORS).read_bytes())
    assert weights[0] == weights[1]


def test_a_source_that_training_replaces_is_refused(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.folder)
    project = Project(tmp_path / "project", finished.shards)
    for address in ("artifacts/train/model", "artifacts/../artifacts/train"):
        with pytest.raises(UserError, match=r"every training replaces: copy that folder"):
            project.train(beginning_with(address))


@pytest.mark.fault("damaged files")
def test_a_source_that_is_not_there_or_no_model_is_one_line(finished, tmp_path, monkeypatch):
    project = Project(tmp_path / "project", finished.shards)
    with pytest.raises(UserError, match=r"start_from is .*/none, but there is no such folder"):
        project.train(beginning_with(tmp_path / "none"))
    with pytest.raises(UserError, match=r"is neither a model .* nor a checkpoint"):
        project.train(beginning_with(finished.shards))
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "other")  # latents of 8
    with pytest.raises(UserError, match=r"~/other.*model.latent_dim is 8 there and 4 here"):
        project.train(beginning_with("~/other"))
    assert not (project.folder / "runs").exists()


@pytest.mark.slow
def test_a_registered_model_is_a_source(shards, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(write_project(tmp_path / "registry"))
    names = {"experiment": "x", "model_name": "faces", "alias": "best"}
    register.register(replace(REGISTER, **names))
    config = replace(CONFIG, model=REGISTERED)
    project = Project(tmp_path / "project", shards)
    shutil.copytree("artifacts/train/model", "copy")
    addresses = ("models:/faces@best", "models:/faces/1", "copy")
    folders = {project.train(beginning_with(address, config=config)) for address in addresses}
    assert len(folders) == 1  # one content, one run
    with pytest.raises(UserError, match="there is no such model or alias"):
        project.train(beginning_with("models:/faces@none", config=config))


def test_register_names_the_source_of_a_training(tmp_path, monkeypatch):
    monkeypatch.chdir(write_project(tmp_path / "project"))
    file = Path("artifacts/train/run.json")
    start = {"address": "models:/faces@best", "sha256": "ab" * 32, "networks": ["generator"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "start": start}))
    record = register.collect()
    assert record.run_tags["start_from"] == "models:/faces@best"
    assert record.version_tags["start_sha256"] == "ab" * 32


# -- a disk that refuses --------------------------------------------------------------------------


def test_curves_of_any_arm_have_the_columns_that_dvc_draws_and_say_what_is_not_known(tmp_path):
    rows = [{"step": 1, "time": 2.0, "image_discriminator": 0.5}, {"step": 2, "new_column": 1.0}]
    _write_curves(rows, tmp_path / "curves.csv")
    first, second = csv.DictReader((tmp_path / "curves.csv").read_text().splitlines())
    assert first.keys() == {"step", "new_column", *CURVES}
    assert first["image_discriminator"] == "0.5"
    assert second["image_discriminator"] == first["latent_discriminator"] == "nan"


@pytest.mark.fault("disk full")
@pytest.mark.parametrize("size", [0, 500, 3_000, 100_000])
def test_a_disk_that_takes_no_more_is_one_line_and_a_resume_goes_on(
    finished, interrupted, tmp_path, size
):
    project = Project(tmp_path / "project", finished.shards)
    shutil.copytree(interrupted.folder, project.folder)
    with largest_file(size), pytest.raises(UserError, match=r"no space left for .* same command"):
        project.train()
    project.train()
    assert project.published() == finished.published()


@pytest.mark.fault("disk full")
@pytest.mark.parametrize("free", [0, 4, 400, 1400, 2400, 3200])
def test_wherever_a_disk_is_full_it_is_one_line_and_a_resume_goes_on(finished, tmp_path, free):
    """Kilobytes left on the disk: each ends the command at another write."""
    project = Project(tmp_path / "disk/project", finished.shards)
    with small_disk(tmp_path / "disk", 40_000):
        project.folder.mkdir()
        ballast = tmp_path / "disk/ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(project.folder).free - 1024 * free))
        with pytest.raises(UserError, match=r"no space left for .* same command again"):
            project.train()
        ballast.unlink()
        project.train()
        assert project.published() == finished.published()


@pytest.mark.fault("disk full")
def test_a_full_disk_for_the_results_is_one_line_and_a_resume_publishes_them(finished, tmp_path):
    project = Project(tmp_path / "project", finished.shards)
    with small_disk(project.folder / "artifacts", 100):
        with pytest.raises(UserError, match=r"no space left for .*artifacts/train: "):
            project.train()
        assert list((project.folder / "artifacts").iterdir()) == []
    project.train()
    assert project.published() == finished.published()


@pytest.mark.fault("disk full")
def test_a_disk_that_may_only_be_read_is_one_line_and_a_resume_goes_on(
    finished, interrupted, tmp_path
):
    project = Project(tmp_path / "disk/project", finished.shards)
    with small_disk(tmp_path / "disk", 40_000):
        shutil.copytree(interrupted.folder, project.folder)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(UserError, match=r"not allowed to write .* not mounted read-only"):
            project.train()
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        project.train()
        assert project.published() == finished.published()
