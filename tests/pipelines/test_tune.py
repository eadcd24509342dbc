"""The search's own parts, without Ray: what is searched, how trials are judged and chosen."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from aegan.config import LossConfig, SearchRange, TrainingConfig, TuneConfig
from aegan.metrics.features import LEARNED_FEATURES
from aegan.training import loop
from pipelines import tune
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.registry import search_runs
from pipelines.search.trial import (
    OBJECTIVES,
    Task,
    Trial,
    judge,
    rounded,
    run_trial,
    shortened,
    train,
    train_and_judge,
)
from tests.shards import write_shards
from tests.tiny import PARAMS, tiny_config, tiny_shards

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = PARAMS.parent
START = tiny_config(loss={"gamma": 1.0})
CONFIG = params.load(TuneConfig, PARAMS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def make_task(shards: Path, runs: Path, *, objective: str = "frechet_distance") -> Task:
    return Task(
        start=shortened(START, num_steps=6, interval=2),
        objectives=OBJECTIVES[objective],
        shards=shards,
        runs=runs,
        device="cpu",
        threads=1,
        micro_batch_size=0,
        features=LEARNED_FEATURES,
    )


def make_trial(number: int, score: float, **changes: Any) -> Trial:
    finite = math.isfinite(score)
    scores = {"frechet_distance": score, "image_reconstruction": 2 - score, "uncovered": number / 9}
    trial = Trial(
        number=number,
        settings={
            name: between.low + (between.high - between.low) * (number + 1) / 100
            for name, between in CONFIG.search.items()
        },
        run_name=f"aegan-{number}",
        ended="finished" if finite else "diverged",
        step=6 if finite else 0,
        scores=scores,
        history={2: scores, 6: scores},
    )
    return replace(trial, **changes)


# -- what is searched -----------------------------------------------------------------------------


def test_a_trial_changes_its_settings_and_seed_and_nothing_else(shards, tmp_path):
    task = make_task(shards, tmp_path)
    config = task.config({"loss.gamma_image": 0.5, "training.learning_rate": 1e-3}, seed=7)
    assert (config.loss.gamma_image, config.training.learning_rate, config.training.seed) == (
        0.5,
        1e-3,
        7,
    )
    back = task.config({}, seed=START.training.seed)
    assert replace(config, loss=back.loss, training=back.training) == back
    assert replace(config.loss, gamma_image=1.0) == back.loss


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("objective: ", "objective: beauty # ", r"tune.objective is 'beauty'; allowed: frechet"),
        (
            "{low: 0.05,",
            "{lo: 0.05,",
            r"tune.search.loss.gamma_image: unknown: lo; missing: low",
        ),
        (
            "{low: 0.05,",
            "{low: little,",
            "tune.search.loss.gamma_image.low is 'little'; expected float",
        ),
        ("  search:", "  search: all\n  them:", "tune.search is 'all'|unknown"),
    ],
)
def test_a_mistake_in_the_parameters_is_named(tmp_path, old, new, message):
    text = PARAMS.read_text()
    assert old in text
    file = tmp_path / "params.yaml"
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        params.load(TuneConfig, file)


def test_without_images_the_stage_says_what_to_run_first(tmp_path, monkeypatch):
    shutil.copy(PARAMS, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="run the stage preprocess first"):
        tune.main()
    assert not Path("runs").exists()


def test_without_a_validation_split_there_is_nothing_to_search_by(tmp_path, monkeypatch):
    shutil.copy(PARAMS, tmp_path)
    monkeypatch.chdir(tmp_path)
    images = np.zeros((40, 16, 16, 3), np.uint8)
    write_shards(tune.SHARDS, {"train": images, "test": images[:2]})
    with pytest.raises(UserError, match=r"no validation images.*preprocess.validation_fraction"):
        tune.main()


def test_the_searchs_name_changes_with_data_parameters_and_space_only():
    short = shortened(START, num_steps=6, interval=2)
    name = tune.search_name(short, CONFIG, "data")
    longer = replace(START, training=replace(START.training, num_steps=9999))
    assert tune.search_name(shortened(longer, num_steps=6, interval=2), CONFIG, "data") == name
    wider = {**CONFIG.search, "loss.gamma_image": SearchRange(low=0.01, high=99, scale="log")}
    others = [
        tune.search_name(short, CONFIG, "other data"),
        tune.search_name(short, replace(CONFIG, search=wider), "data"),
        tune.search_name(short, replace(CONFIG, num_trials=99), "data"),
        tune.search_name(replace(short, loss=replace(short.loss, gamma_image=2.0)), CONFIG, "data"),
    ]
    assert len({name, *others}) == 5


def test_dvc_repro_leaves_the_search_out_and_make_tune_asks_for_it(tmp_path):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    shutil.copy(PARAMS, tmp_path)
    for name in ("aegan", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    for file in ("dvc.yaml", "tune/dvc.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
        for stage in YAML(typ="safe").load((ROOT / file).read_text())["stages"].values():
            made = [stage.get(kind, []) for kind in ("outs", "metrics", "plots")]
            for out in (out for outs in made for out in outs):
                make_empty(tmp_path / "".join(out))  # a name, or {name: options}
    make_empty(tmp_path / "artifacts/shards/manifest.json")

    def stages_run(*targets: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro", "--dry", *targets],
            cwd=tmp_path,
            env={**os.environ, "DVC_SITE_CACHE_DIR": str(tmp_path / ".dvc/tmp")},
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return re.findall("Running stage '(.*)'", done.stdout)

    assert stages_run()[:3] == ["download", "preprocess", "train"]
    assert not any("tune" in stage for stage in stages_run())
    [command] = re.findall(r"dvc repro (tune\S*)", (ROOT / "Makefile").read_text())
    assert stages_run(command) == ["download", "preprocess", "tune/dvc.yaml:tune"]


def make_empty(path: Path) -> None:
    """A file where the name has a suffix, else a folder."""
    (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.touch()


# -- one trial ------------------------------------------------------------------------------------


def test_a_trial_reports_every_checkpoint_and_never_needs_the_test_images(shards, tmp_path):
    task = make_task(shutil.copytree(shards, tmp_path / "shards"), tmp_path / "runs")
    (task.shards / "test-00000.parquet").unlink()
    config, reports = task.config({"loss.gamma_image": 0.5}, seed=0), []
    run_trial(task, config, reports.append)
    assert [report["step"] for report in reports] == [2, 4, 6]
    at_the_end = judge(task, config, "validation")
    assert reports[-1]["frechet_distance"] == pytest.approx(at_the_end["frechet_distance"])
    assert 0 <= at_the_end["uncovered"] <= 1


def test_a_trial_that_was_trained_reports_the_same_again_without_training(
    shards, tmp_path, monkeypatch
):
    task = make_task(shards, tmp_path)
    config, first, again = task.config({}, seed=0), [], []
    run_trial(task, config, first.append)
    monkeypatch.setattr(loop, "update_ema", None)  # a step would raise
    run_trial(task, config, again.append)
    assert again == first


def test_several_objectives_are_reported_at_the_end_only(shards, tmp_path):
    task = make_task(shards, tmp_path, objective="pareto")
    reports: list[dict[str, Any]] = []
    run_trial(task, task.config({}, seed=0), reports.append)
    assert [report["step"] for report in reports] == [6]
    assert set(task.objectives) < reports[0].keys()


def test_a_trial_that_diverges_reports_the_worst_scores(shards, tmp_path):
    task = make_task(shards, tmp_path)
    config, reports = task.config({"training.learning_rate": 1e12}, seed=0), []
    run_trial(task, config, reports.append)
    assert reports[-1] == {"diverged": True, "frechet_distance": math.inf}


def test_settings_that_cannot_train_are_reported_instead_of_tried_again(shards, tmp_path):
    task = make_task(shards, tmp_path)
    task = replace(task, start=replace(task.start, training=replace(START.training, batch_size=0)))
    reports: list[dict[str, Any]] = []
    run_trial(task, task.config({}, seed=0), reports.append)
    [report] = reports
    assert "training.batch_size is 0" in report["error"]
    assert report["frechet_distance"] == math.inf


def test_a_node_with_other_features_than_the_search_judges_no_trial(shards, tmp_path):
    task = replace(make_task(shards, tmp_path), features="random_vgg_seed0")
    reports: list[dict[str, Any]] = []
    run_trial(task, task.config({}, seed=0), reports.append)
    [report] = reports
    assert "the search in random_vgg_seed0: install the same packages" in report["error"]
    assert report["frechet_distance"] == math.inf


def test_scores_on_test_images_are_of_those_images(shards, tmp_path):
    task = make_task(shards, tmp_path)
    config = task.config({}, seed=0)
    train(task, config)
    assert judge(task, config, "test") == judge(task, config, "test")
    assert judge(task, config, "test") != judge(task, config, "validation")


@pytest.mark.parametrize("arm", ["aegan", "gan"])
def test_a_training_that_diverged_with_one_seed_has_the_scores_of_one_that_did_not(
    shards, tmp_path, arm
):
    task = make_task(shards, tmp_path)
    task = replace(task, start=replace(START, training=replace(START.training, arm=arm)))
    sound, diverged = (
        train_and_judge(task, task.config(settings, seed=0), "test")
        for settings in ({}, {"training.learning_rate": 1e12})
    )
    assert sound.keys() == diverged.keys()
    assert set(map(math.isfinite, diverged.values())) == {False}
    for rows in ([sound, diverged], [diverged, sound]):
        assert all(row["mean"] is None for row in tune.summary(rows).values())
        assert tune.summary(tune.differences(rows, [sound, sound]))


# -- choosing -------------------------------------------------------------------------------------


def test_with_one_objective_the_order_is_that_of_its_scores():
    scores = [{"a": value} for value in (3.0, 1.0, math.inf, 2.0)]
    assert tune.ranked(scores, ("a",)) == [1, 3, 0, 2]


def test_with_several_objectives_the_front_comes_first():
    rows = [{"a": a, "b": b} for a, b in [(1, 9), (2, 2), (9, 1), (3, 3), (10, 10)]]
    values = np.array([[row["a"], row["b"]] for row in rows])
    assert tune.on_front(values).tolist() == [True, True, True, False, False]
    order = tune.ranked(rows, ("a", "b"))
    assert order[0] == 1
    assert set(order[:3]) == {0, 1, 2}
    assert order[3:] == [3, 4]


def test_finalists_were_trained_to_the_end_and_the_start_is_always_one():
    trials = [make_trial(0, 0.9, ended="stopped"), make_trial(1, 0.1, ended="stopped")]
    trials += [make_trial(2, 0.5), make_trial(3, 0.4), make_trial(4, math.inf)]
    chosen = tune.finalists(trials, ("frechet_distance",), count=1)
    assert [trial.number for trial in chosen] == [3, 0]
    chosen = tune.finalists([make_trial(0, 0.2), *trials[1:]], ("frechet_distance",), count=2)
    assert [trial.number for trial in chosen] == [0, 3]


def test_a_summary_holds_mean_and_standard_error_and_says_where_training_diverged():
    table = tune.summary([{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": math.inf}])
    assert table["a"] == {"mean": 2.0, "standard_error": 1.0, "values": [1.0, 3.0]}
    assert table["b"] == {"mean": None, "standard_error": None, "values": [1.0, None]}


# -- writing --------------------------------------------------------------------------------------


def make_comparison(settings: dict[str, float], *, better: bool = True) -> dict[str, Any]:
    winner, start = [{"frechet_distance": v} for v in (1.0, 2.0)], [{"frechet_distance": 3.0}] * 2
    test = {
        "winner": tune.summary(winner),
        "start": tune.summary(start),
        "winner_minus_start": tune.summary(tune.differences(winner, start)),
    }
    return {
        "objectives": ["frechet_distance"],
        "winner": {"trial": 1, "settings": settings},
        "test": test if better else None,
    }


def test_the_winner_is_an_overlay_that_sets_exactly_its_values(tmp_path):
    settings = rounded({"loss.gamma_image": 1.23456e-5, "training.learning_rate": 0.00123456})
    assert settings == {"loss.gamma_image": 1.23e-5, "training.learning_rate": 0.00123}
    params.write_overlay(settings, tmp_path / "tuned.yaml", comment="two\nlines")
    assert (tmp_path / "tuned.yaml").read_text().startswith("# two\n# lines\nloss:\n")
    file = tmp_path / "params.yaml"
    shutil.copy(PARAMS, file)
    assert len(params.apply_overlay(tmp_path / "tuned.yaml", file)) == 2
    before, after = (params.load(LossConfig, path) for path in (PARAMS, file))
    assert after == replace(before, gamma_image=1.23e-5)
    assert params.load(TrainingConfig, file).learning_rate == 0.00123


@pytest.mark.parametrize("objective", ["frechet_distance", "pareto"])
@pytest.mark.parametrize("count", [2, 6])  # too few to weigh settings, and enough
def test_results_are_a_table_an_overlay_a_comparison_and_three_pictures(tmp_path, objective, count):
    trials = [make_trial(i, 1 / (i + 1)) for i in range(count)]
    trials += [make_trial(count, math.inf), make_trial(count + 1, 0.7, ended="stopped", step=2)]
    trials[-1].history.pop(6)
    trials += [make_trial(count + 2, 1.0, ended="failed", step=0, scores={})]
    config = replace(CONFIG, objective=objective)
    tune.write(trials, make_comparison(trials[1].settings), config, tmp_path / "tune")
    names = {path.name for path in (tmp_path / "tune").iterdir()}
    pictures = {"slices.png", "parallel_coordinates.png", "importance.png"}
    assert names == pictures | {"trials.csv", "tuned.yaml", "comparison.json"}
    for picture in pictures:
        assert np.asarray(Image.open(tmp_path / "tune" / picture)).std() > 0
    with (tmp_path / "tune/trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [str(i) for i in range(count + 3)]
    assert [row["ended"] for row in rows][-3:] == ["diverged", "stopped", "failed"]
    front = {row["trial"] for row in rows if row["on_front"] == "1"}
    finished = {str(i) for i in range(count)}
    assert front == (finished if objective == "pareto" else {str(count - 1)})
    assert json.loads((tmp_path / "tune/comparison.json").read_text())["winner"]["trial"] == 1


def test_the_verdict_says_by_how_much_or_that_nothing_was_better():
    [line] = tune.verdict(make_comparison({}))
    assert "1.5 +- 0.5, params.yaml 3 +- 0; difference -1.5 +- 0.5, better with 2 of 2" in line
    [line] = tune.verdict(make_comparison({}, better=False))
    assert "No trial was better" in line


# -- MLflow ---------------------------------------------------------------------------------------


def test_a_trial_is_nested_in_its_search_once_however_often_it_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    trial: dict[str, Any] = {
        "search": "tune-0",
        "experiment": "aegan",
        "params": {"loss.gamma_image": 0.5},
        "points": [search_runs.Point("train/loss", 1.0, 2, 1_700_000_000.0)],
        "tags": {"ended": "finished"},
    }
    for name in ("trial 000", "trial 001", "trial 000"):
        search_runs.log_trial(name, **trial)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.set_terminated(
        next(r for r in every_run(client) if r.info.run_name == "trial 001").info.run_id, "FAILED"
    )
    search_runs.log_trial("trial 001", **trial)  # which was cut off, as it seems
    search_runs.log_trial("trial 000", **{**trial, "tags": {"ended": "stopped"}})
    parent = search_runs.log_search("tune-0", experiment="aegan", tags={"objective": "x"}, files=[])
    runs = {run.info.run_name: run for run in every_run(client)}
    assert sorted(run.info.run_name for run in every_run(client)) == [
        "trial 000",
        "trial 001",
        "tune-0",
    ]
    assert runs["trial 000"].data.tags["ended"] == "stopped"
    for name in ("trial 000", "trial 001"):
        assert runs[name].data.tags["mlflow.parentRunId"] == parent
        assert runs[name].info.status == "FINISHED"
        assert runs[name].data.params == {"loss.gamma_image": "0.5"}
        assert runs[name].data.metrics == {"train/loss": 1.0}


def every_run(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("aegan").experiment_id]))
