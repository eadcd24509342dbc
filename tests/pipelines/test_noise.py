"""The noise over training seeds: real trainings, as small as they come."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.base.errors import UserError
from pipelines.registry import noise, reference
from pipelines.registry.comparison import GATED
from tests.project import make_project
from tests.tiny import tiny_shards

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shards = tiny_shards(tmp_path / "shards")
    project = make_project(tmp_path / "project", shards, compute__device="cpu")
    monkeypatch.chdir(project)
    return project


def test_the_noise_of_other_seeds_is_kept_with_the_reference(entered: Path) -> None:
    first = reference.current_or_first(Path("artifacts/shards"))
    shares = noise.measure_noise(seeds=2, num_steps=4)
    assert shares.keys() == GATED.keys()
    assert shares["frechet_distance"] > 0  # the seeds do differ
    assert shares["reconstruction_mae"] > 0
    kept = reference.current()
    assert kept is not None
    assert kept.sha256 == first.sha256
    assert kept.noise["shares"] == shares
    assert (kept.noise["seeds"], kept.noise["steps"]) == ([1, 2], 4)
    assert kept.facts["reason"] == first.facts["reason"]
    assert list(Path("runs").glob("noise-*")) == []
    assert "2 trainings of 4 steps" in reference.said(kept)[0]


def test_one_that_was_cut_short_goes_on_to_the_same_noise(
    entered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine, calls = noise.Examination.examine, []

    def cut_short(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return examine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(noise.Examination, "examine", cut_short)
    with pytest.raises(KeyboardInterrupt):
        noise.measure_noise(seeds=2, num_steps=4)
    kept = reference.current()
    assert kept is not None
    assert kept.noise == {}
    assert len(list(Path("runs").glob("noise-*"))) == 2
    torch.manual_seed(5)
    shares = noise.measure_noise(seeds=2, num_steps=4)
    assert shares == noise.measure_noise(seeds=2, num_steps=4)  # trained anew


def test_a_training_from_given_weights_has_no_noise_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tiny_shards(tmp_path / "shards")
    monkeypatch.chdir(make_project(tmp_path / "project", shards, training__start_from="x"))
    with pytest.raises(UserError, match=r"empty training.start_from for it"):
        noise.measure_noise(seeds=2, num_steps=4)
