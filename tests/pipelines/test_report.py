"""The report of a tiny made-up run: what it says, what it hides, what it refuses."""

import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegan.config import InterpolateConfig
from aegan.metrics import METRICS
from aegan.pictures import save_png
from pipelines.base.errors import UserError
from pipelines.interpolate import interpolate
from pipelines.report import (
    MAX_MOMENTS,
    build,
    draw_curves,
    in_words,
    read_curves,
    read_quarantine,
    verdict,
)
from tests.latents import add_density, small_density
from tests.pictures import blocks
from tests.reports import HOSTILE, write_inputs, write_json
from tests.shards import write_shards

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, not to be changed."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def project(inputs: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(inputs, tmp_path / "project"))


@pytest.fixture(scope="module")
def page(inputs: Path) -> str:
    return report(inputs)


def report(root: Path) -> str:
    return build(root / "artifacts", root / "shards")


class Parsed(HTMLParser):
    """A page's elements and its text, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", "".join(self.pieces))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


def test_the_page_says_what_was_trained_on_what(page: str) -> None:
    text = Parsed(page).text
    for statement in (
        "What a model learned from 21 images",
        "21 to learn from",
        "3 to choose the best moment",
        "8 held out",
        "16 × 16",
        "1 min 15 s",
        "made-up features",
        "no factors known",
        "https://example.com/faces.zip",
    ):
        assert statement in text


def test_the_page_shows_classes_and_what_is_to_be_known_about_the_splits(page: str) -> None:
    text = Parsed(page).text
    for statement in ("cats 20", "<b>dogs 1", "Mind the splits.", "8 held-out images"):
        assert statement in text


def test_a_page_without_held_out_split_says_that_training_images_were_measured(
    project: Path,
) -> None:
    file = project / "artifacts/evaluate/metrics.json"
    figures = json.loads(file.read_text()) | {"split": "train", "note": "Nothing about new images."}
    file.write_text(json.dumps(figures))
    text = Parsed(report(project)).text
    assert "Measured on 8 training images." in text
    assert "Nothing about new images." in text
    assert "never trained" not in text.partition("An AEGAN is")[0]


def test_every_measured_metric_stands_there_with_its_explanation(page: str) -> None:
    text = Parsed(page).text
    for name, metric in METRICS.items():
        assert (metric.explanation in text) == (not name.startswith("factor_"))


def test_a_figure_stands_with_its_error_where_that_is_known(page: str) -> None:
    text = Parsed(page).text
    assert text.count("0.25 ± 0.06") == text.count("0.5 ± 0.03") == 1
    assert text.count("0.125 ± 0.001") == 1
    assert text.count("±") == 4  # and what it means


def test_figures_and_samples_of_fitted_latents_are_shown_where_there_are_any(
    project: Path, page: str
) -> None:
    assert "fitted" not in Parsed(page).text
    file = project / "artifacts/evaluate/metrics.json"
    figures = json.loads(file.read_text())
    figures["precision"]["fitted"] = 0.7654
    figures["fitted_latents"] = {"components": 12}
    write_json(file, figures)
    add_density(project / "artifacts/train/model", small_density(8))
    config = InterpolateConfig(num_pairs=1, num_frames=3, path="slerp", seed=0)
    folder = project / "artifacts"
    interpolate(folder / "train/model", project / "shards", folder / "interpolate", config)
    text = Parsed(report(project)).text
    for statement in ("0.765", "(12 components)", "The same generator, but latent vectors drawn"):
        assert statement in text


def test_the_page_loads_nothing(page: str) -> None:
    parsed = Parsed(page)
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "href", "xlink:href", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "#"))
    assert "@import" not in page
    assert all(found.startswith("#") for found in re.findall(r"url\(['\"]?([^)]*)", page))
    policies = [a["content"] for _, a in parsed.elements if "http-equiv" in a]
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'; img-src data:;")


def test_names_of_rejected_files_and_classes_are_text_and_nothing_else(
    page: str, project: Path
) -> None:
    parsed = Parsed(page)
    for name in (*HOSTILE, "<b>dogs"):
        assert name in parsed.text
    (project / "artifacts/preprocess/quarantine.csv").write_text("source,reason\n")
    write_json(project / "artifacts/preprocess/statistics.json", {"classes": {}, "warnings": []})
    harmless = Parsed(report(project))
    assert {tag for tag, _ in parsed.elements} - {tag for tag, _ in harmless.elements} == {"bdi"}
    scripts = [tag for tag, _ in parsed.elements if tag == "script"]
    assert len(scripts) == 1


def test_passwords_and_signatures_of_the_source_stay_out(page: str) -> None:
    assert "pa55word" not in page
    assert "s1gned" not in page


def test_the_same_inputs_give_the_same_page(page: str, inputs: Path) -> None:
    assert report(inputs) == page


def test_a_plain_gans_page_shows_what_there_is_and_says_why_no_more(tmp_path: Path) -> None:
    text = Parsed(report(write_inputs(tmp_path, encoder=False))).text
    assert "no encoder" in text
    assert "Made from nothing" in text
    assert "Reconstructions" not in text


def test_many_sample_grids_are_thinned_to_first_and_last_and_some_between(project: Path) -> None:
    folder = project / "artifacts/train/samples"
    for step in range(60, 2000, 20):
        shutil.copy(folder / "step-00000020-samples.png", folder / f"step-{step:08d}-samples.png")
    parsed = Parsed(report(project))
    steps = [int(a["data-step"] or 0) for _, a in parsed.elements if "data-step" in a]
    assert len(steps) == MAX_MOMENTS
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (20, 1980)


def test_large_pictures_do_not_make_a_large_page(project: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    save_png(noise, project / "artifacts/preprocess/contact_sheet.png")
    assert len(report(project)) < 4_000_000


def test_a_long_curve_is_drawn_small_and_gaps_are_left_out(tmp_path: Path) -> None:
    rows = [f"{step},{math.sin(step)},{'nan' if step % 2 else ''}" for step in range(20_000)]
    file = tmp_path / "curves.csv"
    file.write_text("\n".join(["step,image_reconstruction,never_finite", *rows]))
    (curve,) = draw_curves(read_curves(file))
    assert curve["title"] == "Image reconstruction"
    assert curve["last"] == math.sin(19_999)
    assert len(curve["drawing"]) < 60_000


def test_reasons_are_counted_by_what_stands_before_the_colon(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.csv"
    file.write_text("source,reason\na,empty\nb,same as: x\nc,same as: y\n")
    assert read_quarantine(file) == [
        {"reason": "same as", "count": 2, "examples": ["b", "c"]},
        {"reason": "empty", "count": 1, "examples": ["a"]},
    ]


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("shards/manifest.json", "preprocess"),
        ("artifacts/preprocess/contact_sheet.png", "preprocess"),
        ("artifacts/preprocess/quarantine.csv", "preprocess"),
        ("artifacts/train/run.json", "train"),
        ("artifacts/train/curves.csv", "train"),
        ("artifacts/train/samples", "train"),
        ("artifacts/evaluate/metrics.json", "evaluate"),
        ("artifacts/evaluate/latent.png", "evaluate"),
        ("artifacts/interpolate/index.json", "interpolate"),
        ("artifacts/interpolate/mirror.webp", "interpolate"),
    ],
)
def test_a_missing_input_names_the_stage_that_makes_it(
    project: Path, file: str, stage: str
) -> None:
    path = project / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}.*run the stage {stage} first"):
        report(project)


def test_a_model_of_other_data_is_refused(project: Path) -> None:
    write_shards(project / "shards", {"train": blocks(4, seed=9), "test": blocks(4, seed=8)})
    with pytest.raises(UserError, match=r"comes from other data .* run the stage train"):
        report(project)


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("file", ["train/run.json", "evaluate/metrics.json"])
def test_a_damaged_input_is_one_clear_error(project: Path, file: str, content: str) -> None:
    (project / "artifacts" / file).write_text(content)
    stages = "run the stage (train|evaluate) again|run dvc repro"
    with pytest.raises(UserError, match=stages):
        report(project)


@pytest.mark.parametrize(
    ("better", "value", "floor", "words"),
    [
        ("lower", 0.1, 0.2, "reached"),
        ("lower", 0.4, 0.2, "2 × that"),
        ("lower", 0.4, 0.0, "not reached"),
        ("higher", 0.9, 0.8, "reached"),
        ("higher", 0.4, 0.8, "50% of that"),
        ("higher", -0.4, -0.1, "not reached"),
        ("floor", 0.51, 0.5, "about the same"),
        ("floor", 0.6, 0.5, "higher"),
        ("floor", 0.4, 0.5, "lower"),
    ],
)
def test_a_verdict_says_how_a_figure_compares(
    better: str, value: float, floor: float, words: str
) -> None:
    assert verdict(better, value, floor) == words


@given(st.floats(0, 1e6))
def test_a_duration_in_words_is_right_to_its_smallest_unit(seconds: float) -> None:
    units = {"h": 3600, "min": 60, "s": 1}
    parts = re.findall(r"(\d+) (h|min|s)\b", in_words(seconds))
    total = sum(int(number) * units[unit] for number, unit in parts)
    assert abs(total - seconds) <= units[parts[-1][1]]


def test_the_source_of_a_trainings_first_weights_is_named(project, page):
    file = project / "artifacts/train/run.json"
    start = {"address": "models:/<b>@best", "sha256": "ab" * 32, "networks": ["generator"]}
    write_json(file, {**json.loads(file.read_text()), "start": start})
    text = Parsed(report(project)).text
    assert "began with weights of models:/<b>@best (sha256 abababababab): generator." in text
    assert "began with weights" not in Parsed(page).text


def test_the_page_says_first_whether_the_model_collapsed_and_what_to_do_next(project):
    file = project / "artifacts/evaluate/metrics.json"
    figures = json.loads(file.read_text())
    figures["latent_reconstruction_mse"]["ema"] = 0.05
    write_json(file, figures)
    text = Parsed(report(project)).text
    assert text.index("Has it collapsed?") < text.index("Curves")
    assert "No sign of it: random samples differ from each other 86% as much" in text
    assert "More images: 21 are few." in text
    assert ".venv/bin/dvc exp run -S training.augmentation_target=0.6" in text
    figures["ms_ssim"]["ema"] = 0.9
    write_json(file, figures)
    text = Parsed(report(project)).text
    assert "Alarm. The generator may have collapsed" in text
    assert "No sign of it" not in text


def test_the_explorer_is_linked_only_if_it_is_there(inputs, page):
    links = [a["href"] for tag, a in Parsed(page).elements if tag == "a"]
    assert links == []
    with_link = build(inputs / "artifacts", inputs / "shards", explorer="explorer.html")
    assert [a["href"] for tag, a in Parsed(with_link).elements if tag == "a"] == ["explorer.html"]


def test_headings_are_in_order_and_every_picture_has_words(page):
    elements = Parsed(page).elements
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in itertools.pairwise(levels))
    assert all(a.get("alt") for tag, a in elements if tag == "img")
