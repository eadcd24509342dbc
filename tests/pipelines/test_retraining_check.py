"""What is found about a new snapshot before anything is trained on it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aegan.config import PreprocessConfig, RetrainConfig
from aegan.data import designed_faces
from aegan.data.dataset import load_columns
from aegan.metrics.features import RANDOM_FEATURES
from pipelines.base import params
from pipelines.base.errors import UserError
from pipelines.ingest.quarantine import write_quarantine
from pipelines.retraining import check as module
from pipelines.retraining.check import Check, Finding, Preprocessed
from tests.damage import gray
from tests.shards import write_shards
from tests.tiny import PARAMS

OLD, ADDED, SIZE = 100, 60, 32
CONFIG = replace(params.load(RetrainConfig, PARAMS), min_new_images=40)
PREPROCESS = params.load(PreprocessConfig, PARAMS)
Rows = list[tuple[str, str]]


def preprocessed(folder: Path, train: np.ndarray, quarantine: Rows | None = None) -> Preprocessed:
    """Sources are train/0.png, train/1.png, ..."""
    write_shards(folder / "shards", {"train": train})
    write_quarantine(quarantine or [], folder / "quarantine.csv")
    return Preprocessed(shards=folder / "shards", quarantine=folder / "quarantine.csv")


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    """Old images, new ones, and one that the reference holds."""
    return designed_faces.generate(0, OLD + ADDED + 1, seed=0, image_size=SIZE)[0]


@pytest.fixture(scope="module")
def before(tmp_path_factory, faces) -> Preprocessed:
    rows = [("train/old.png", "not an image: text")]
    return preprocessed(tmp_path_factory.mktemp("before"), faces[:OLD], rows)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, faces) -> Path:
    folder = write_shards(tmp_path_factory.mktemp("reference"), {"test": faces[-1:]})
    return folder / "test-00000.parquet"


@pytest.fixture
def check(tmp_path, before, reference):
    """Of all training images of now, and the files that are in no shard."""

    def check(
        train: np.ndarray,
        quarantine: Rows | None = None,
        *,
        reference: Path = reference,
        preprocess: PreprocessConfig = PREPROCESS,
        **changes: float,
    ) -> Check:
        return module.check(
            preprocessed(tmp_path / "now", train, quarantine),
            before,
            reference=reference,
            model=None,
            features=RANDOM_FEATURES,
            preprocess=preprocess,
            config=replace(CONFIG, **changes),
            sheet=tmp_path / "odd.png",
        )

    return check


def of(found: Check, name: str) -> Finding:
    (finding,) = (finding for finding in found.findings if finding.name == name)
    return finding


def test_new_images_of_the_same_kind_raise_nothing(check, faces, tmp_path):
    found = check(faces[: OLD + ADDED], [("train/old.png", "not an image: text")])
    assert found.verdict == "ok", found.findings
    assert of(found, "new images").value == ADDED
    assert of(found, "quarantined files").value == 0  # that one was known
    assert of(found, "formats").sentence == "new images by the ends of their names: 60 .png"
    assert found.left_out == ()
    assert found.drift is not None
    with Image.open(tmp_path / "odd.png") as sheet:  # four by four, at least 64 pixels each
        assert sheet.size == (4 * 64 + 5 * 4, 4 * 64 + 5 * 4)


def test_new_images_of_another_kind_are_asked_about_with_what_differs(check, faces):
    found = check(np.concatenate([faces[:OLD], gray(faces[OLD : OLD + ADDED], 1)]))
    assert found.verdict == "ask"
    assert "saturation -1.00" in of(found, "drift").sentence
    assert "new images are of another kind" in of(found, "drift").sentence
    assert of(found, "drift").value == 1
    unnoticed = check(faces[: OLD + ADDED], drift_min_effect=1.0)
    assert of(unnoticed, "drift").verdict == "ok"


def test_too_many_unusable_files_are_refused_and_copies_are_none(check, faces):
    corrupt = [(f"train/bad{i}.png", "cannot be decoded: damaged") for i in range(30)]
    found = check(faces[: OLD + ADDED], corrupt)
    finding = of(found, "quarantined files")
    assert (found.verdict, finding.verdict) == ("refuse", "refuse")
    assert finding.value == pytest.approx(30 / 90)
    assert finding.sentence == (
        "30 of 90 new files are unusable (30 cannot be decoded); at most 10% may"
    )
    copies = [(f"train/c{i}.png", "duplicate: train/0.png") for i in range(30)]
    found = check(faces[: OLD + ADDED], [*copies, (".DS_Store", "hidden or system file")])
    assert of(found, "quarantined files").value == 0
    assert of(found, "duplicates").value == pytest.approx(30 / 90)
    assert of(found, "duplicates").verdict == "ok"
    assert of(check(faces[: OLD + 60], copies, max_duplicate_fraction=0.3), "duplicates"
    ).verdict == "ask"  # fmt: skip


def test_near_duplicates_among_new_and_old_images_are_counted(check, faces):
    added = faces[OLD : OLD + ADDED].copy()
    added[:10] = faces[:10]
    added[:10, 0, 0] ^= 1  # other images, which look the same
    added[20:25] = added[30]
    added[20:25, 0, 0] ^= np.arange(5, dtype=np.uint8)[:, None] + 1
    found = of(check(np.concatenate([faces[:OLD], added])), "duplicates")
    assert found.value == pytest.approx(15 / 60)
    assert "0 copies, 10 near old images, 5 near new ones" in found.sentence


def test_what_is_near_to_the_reference_is_left_out_and_counted(check, faces):
    leaking = faces[-1:].copy()
    leaking[0, 0, 0] ^= 1
    train = np.concatenate([faces[: OLD + ADDED], leaking, faces[-1:]])
    found = check(train)
    assert len(found.left_out) == of(found, "near duplicates of the reference").value == 2
    assert of(found, "new images").value == ADDED
    exact = check(train, preprocess=replace(PREPROCESS, near_duplicate_distance=0.0))
    assert len(exact.left_out) == 1
    kept_out = [(f"train/{number}.png", "near duplicate of a reference image") for number in "ab"]
    finding = of(check(train, kept_out), "near duplicates of the reference")
    assert finding.value == 4
    assert "2 of them kept out of training" in finding.sentence
    assert of(check(train, kept_out), "quarantined files").value == 0


def test_too_few_new_images_wait(check, faces):
    few = check(faces[: OLD + 5])
    assert few.verdict == "wait"
    assert of(few, "new images").sentence == "5 new images; a retraining waits for 40"
    none = check(faces[:OLD])
    assert (none.verdict, none.drift) == ("wait", None)
    assert of(none, "duplicates").value == 0


def test_images_that_vanished_or_changed_are_refused_beyond_a_fraction(check, faces):
    assert check(faces[:40]).verdict == "refuse"
    found = check(faces[:70])
    assert of(found, "vanished images").value == pytest.approx(0.3)
    assert of(found, "changed images").value == 0
    changed = np.concatenate([faces[:70], faces[OLD : OLD + 30]])  # in the places of others
    assert of(check(changed), "changed images").value == pytest.approx(0.3)
    damaged = [(f"train/{i}.png", "cannot be decoded") for i in range(70, 100)]
    assert of(check(faces[:70], damaged), "changed images").value == pytest.approx(0.3)
    assert of(check(faces[:70], damaged), "vanished images").verdict == "ok"


def test_files_that_moved_or_were_set_aside_have_not_vanished(check, faces):
    moved = check(faces[:OLD][::-1])
    aside = [
        (f"train/{i}.png", "near duplicate of an image in another split: train/1.png")
        for i in range(70, 100)
    ]
    for found in (moved, check(faces[:70], aside)):
        assert of(found, "vanished images").value == of(found, "changed images").value == 0


def test_images_of_another_form_are_refused_before_anything_is_compared(check, faces):
    found = check(faces[:, ::2, ::2])
    assert found.verdict == "refuse"
    (finding,) = found.findings
    assert finding.sentence == (
        "the champion knows images of another form: image_size was 32 and is 16"
    )


def test_a_reference_that_cannot_be_used_is_one_line(check, faces, tmp_path):
    (tmp_path / "text.parquet").write_text("no images")
    other = write_shards(tmp_path / "other", {"test": faces[:1, ::2, ::2]}) / "test-00000.parquet"
    pq.write_table(pq.read_table(other, columns=["source"]), tmp_path / "columns.parquet")
    for name in ("missing.parquet", "text.parquet", str(other), "columns.parquet"):
        with pytest.raises(UserError, match=r"the reference .* 32x32x3") as caught:
            check(faces[: OLD + 5], reference=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_new_test_images_are_those_that_were_not_there_and_are_not_like_the_reference(
    tmp_path, faces
):
    before, now = (
        Preprocessed(
            shards=write_shards(tmp_path / name, {"train": faces[:30], "test": test}),
            quarantine=tmp_path,
        )
        for name, test in (("before", faces[30:40]), ("now", faces[35:50]))
    )
    ids = load_columns(now.shards, "test", ["image_id"])["image_id"]
    found = module.new_test_images(now, before, without=[ids[-1]])
    kept = {image.tobytes() for image in found.numpy()}
    assert kept == {image.tobytes() for image in faces[40:49]}
    assert module.new_test_images(before, before, without=[]).shape == (0, SIZE, SIZE, 3)
