import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from aegan.config import (
    ComputeConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    RetrainConfig,
    Schedule,
    TrainConfig,
    TrainingConfig,
)
from pipelines.base import identity, params
from pipelines.base.errors import UserError

ROOT = Path(params.__file__).parents[2]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    return path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", params.SECTIONS)
def test_every_section_of_the_projects_own_parameters_is_valid(name):
    section = params.SECTIONS[name]
    assert isinstance(params.load(section, ROOT / "params.yaml"), section)


def test_a_file_without_a_section_that_is_new_as_a_whole_is_taken_as_if_it_had_it(file):
    today = params.load(RetrainConfig, file)
    text = file.read_text()
    file.write_text(text[: text.index("\nretrain:")])
    assert params.load(RetrainConfig, file) == today
    assert params.apply_overlay(ROOT / "presets/paper.yaml", file)
    assert params.load(RetrainConfig, file) == today


@pytest.mark.fault("names from outside")
def test_names_that_mlflow_refuses_are_said_before_any_stage_works(file, record_property):
    wrong = {
        "alias": ["latest", "LATEST", "v3", "V12", "", "the best", "a/b", "ä", "a\nb", "x" * 300],
        "model_name": ["", " ", "a/b", "a:b", "a@b", "a?b", "a#b", ".", "..", "a\\", "a ", "a\nb"],
        "experiment": ["", " ", "a\nb", "x" * 600],
    }
    wrong["model_name"].append("""a'b"c""")  # MLflow's filters could not hold it
    good, yaml = file.read_text(), YAML()
    for key, values in wrong.items():
        for value in values:
            document = yaml.load(good)
            document["register"][key] = value
            yaml.dump(document, file)
            with pytest.raises(UserError, match=rf"params.yaml: register.{key} is '"):
                params.load(DataConfig, file)  # what the first stage reads
    record_property("faults", sum(map(len, wrong.values())))


@pytest.mark.fault("names from outside")
def test_a_mistake_in_the_last_stages_section_is_said_before_the_first_works(file):
    edit(file, "alias: candidate", "alias: 3")
    with pytest.raises(UserError, match=r"register.alias is 3; expected str"):
        params.load(DataConfig, file)


def test_a_latent_of_automatic_length_has_the_images_dimension(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    edit(file, "latent_dim: 16", "latent_dim: auto")
    params.load(DataConfig)  # before there are images
    with pytest.raises(UserError, match=r"manifest.json not found: run the stage preprocess first"):
        params.load(TrainConfig)
    manifest = file.parent / "artifacts/shards/manifest.json"
    manifest.parent.mkdir(parents=True)
    for dimension, latent_dim in ((7.6, 8), (8, 8), (23.2, 24)):
        manifest.write_text(json.dumps({"intrinsic_dimension": dimension}))
        assert params.load(TrainConfig).model.latent_dim == latent_dim
        assert params.load(ModelConfig).latent_dim == latent_dim
    for shards in ({}, {"intrinsic_dimension": None}):
        manifest.write_text(json.dumps(shards))
        with pytest.raises(UserError, match="latent_dim is auto, but preprocess has not estimated"):
            params.load(TrainConfig)
        params.load(DataConfig)


def test_numbers_in_scientific_notation_are_numbers(file):
    edit(file, "learning_rate: 5.0e-4\n  disc", "learning_rate: 2e-4\n  disc")
    assert params.load(TrainingConfig, file).learning_rate == 0.0002


def test_a_schedule_stands_in_place_of_a_number(file):
    edit(
        file,
        "learning_rate: 5.0e-4\n  disc",
        "learning_rate: {schedule: cosine, start: 5e-4, end: 0, images: 100000}\n  disc",
    )
    rate = params.load(TrainingConfig, file).learning_rate
    assert rate == Schedule(schedule="cosine", start=5e-4, end=0.0, images=100_000)
    assert type(rate.end) is float  # whole numbers serve here too
    overlay = file.with_name("overlay.yaml")
    overlay.write_text("training:\n  beta2: {schedule: linear, start: 0.9, end: 0.99, images: 0}\n")
    assert params.apply_overlay(overlay, file) == [
        'training.beta2: 0.99 -> {"schedule": "linear", "start": 0.9, "end": 0.99, "images...'
    ]
    assert params.load(TrainingConfig, file).beta2.start == 0.9


def test_settings_of_an_earlier_version_that_were_parted_are_said_in_one_line(file):
    text = file.read_text()
    for kind in ("x", "z"):
        text = text.replace(f"  lambda_{kind}_tilde_adversarial: 1.0\n", "")
    text = text.replace("lambda_x_hat_adversarial", "lambda_image_adversarial")
    text = text.replace("lambda_z_hat_adversarial: 1", "lambda_latent_adversarial: 1")
    file.write_text(text)
    with pytest.raises(UserError) as error:
        params.load(DataConfig, file)
    assert str(error.value) == (
        "params.yaml: loss.lambda_image_adversarial is called loss.lambda_x_hat_adversarial and "
        "loss.lambda_x_tilde_adversarial now; loss.lambda_latent_adversarial is called "
        "loss.lambda_z_hat_adversarial and loss.lambda_z_tilde_adversarial now: rename it there"
    )


def test_a_whole_number_serves_where_a_fraction_is_expected(file):
    edit(file, "\n  lambda_image_reconstruction: ", "\n  lambda_image_reconstruction: 12 # ")
    assert params.load(LossConfig, file).lambda_image_reconstruction == 12.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "gamma_image: 1",
            "gama: 1",
            "keys of loss: unknown: gama; missing: gamma_image; valid: l",
        ),
        (
            "\n  gamma_image: ",
            "\n  gamma_image: lots # ",
            "loss.gamma_image is 'lots'; expected float",
        ),
        ("adversarial: bce", "adversarial: hing", "loss.adversarial is 'hing'; allowed: bce, rel"),
        ("num_steps: ", "num_steps: -1.5 # ", "training.num_steps is -1.5; expected int"),
        ("horizontal_flip: true", "horizontal_flip: 1", "horizontal_flip is 1; expected bool"),
        ("interpolate:", "interpolation:", "unknown: interpolation; missing: interpolate; valid: "),
        ("loss:", "loss: [", "not valid YAML"),
        ("adversarial: bce", "adversarial: [a]", r'loss.adversarial is \["a"\]; allowed: bce, rel'),
        ("adversarial: bce", "adversarial:", "loss.adversarial is empty; allowed: bce"),
        (
            "gamma_image: 1.0",
            "gamma_image: {a: 1}",
            "keys of loss.gamma_image: unknown: a; missing: sch",
        ),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(file, old, new, message):
    edit(file, old, new)
    section = TrainingConfig if "training" in message or "flip" in message else LossConfig
    with pytest.raises(UserError, match=message):
        params.load(section, file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("neighbours: 5", "neighbours: 0", "evaluate.neighbours is 0; it must be 1 or more"),
        ("gamma_image: 1.0", "gamma_image: .nan", "loss.gamma_image is NaN; it must be 0 or more"),
        (
            "gamma_image: 1.0",
            f"gamma_image: {10**400}",
            r"loss.gamma_image is 10+\.\.\.; it must be at most 10+$",
        ),
        ("gamma_image: 1.0", f"gamma_image: {'9' * 5000}", "is not valid YAML: Exceeds the limit"),
        ("latent_dim: 16", "latent_dim: true", "model.latent_dim is true; expected int"),
        (
            "update_rule: shared",
            "update_rule: reference",
            "reference shows real ones and fakes in turn",
        ),
        ("loss:", "loss: [", r"not valid YAML: [^\n]*$"),
    ],
)
def test_every_stage_says_a_wrong_value_of_any_section_in_one_line(file, old, new, message):
    edit(file, old, new)
    with pytest.raises(UserError, match=message) as error:
        params.load(DataConfig, file)  # what the first stage reads
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["compile", "cuda_graphs"])
def test_a_setting_of_an_earlier_version_that_is_off_is_skipped_with_one_note(file, key, caplog):
    edit(file, "compute:\n", f"compute:\n  {key}: false\n")
    with caplog.at_level("INFO"):
        compute = [params.load(ComputeConfig, path) for path in (file, file, ROOT / "params.yaml")]
    assert compute[0] == compute[1] == compute[2]
    assert caplog.messages == [
        f"params.yaml: compute.{key} is no setting any more; the line can be removed"
    ]
    edit(file, f"{key}: false", f"{key}: true")
    with pytest.raises(UserError, match=f"compute.{key} is no setting any more: remove the line"):
        params.load(DataConfig, file)


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(UserError, match="run from the project's root folder"):
        params.load(LossConfig, tmp_path / "params.yaml")


def test_an_overlay_changes_its_values_and_keeps_every_comment(file, tmp_path):
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("loss:\n  gamma_image: 2.0\n")
    before = params.load(LossConfig, file).gamma_image
    assert params.apply_overlay(overlay, file) == [f"loss.gamma_image: {before} -> 2.0"]
    assert params.load(LossConfig, file).gamma_image == 2.0
    assert [line for line in file.read_text().splitlines() if line.startswith("#")] == comments


def test_an_overlay_with_a_mistake_changes_nothing(file, tmp_path):
    before = file.read_text()
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("loss:\n  gamma_image: 2.0\n  lambda: 1.0\n")
    with pytest.raises(UserError, match="unknown: lambda; valid:"):
        params.apply_overlay(overlay, file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("overlay", "own", "message"),
    [
        ("", None, "overlay.yaml must hold sections, of data, "),
        ("- loss", None, "overlay.yaml must hold sections, of data, "),
        ("loss: [", None, "overlay.yaml is not valid YAML: "),
        ("\xff", None, "overlay.yaml is not valid YAML: "),
        ("training: 5", None, "overlay.yaml: training must hold the keys arm, "),
        ("training:", None, "overlay.yaml: training must hold the keys arm, "),
        (None, None, r"overlay.yaml cannot be read \(Is a directory\)"),
        ("loss: {gamma_image: 2.0}", "loss: [", "params.yaml is not valid YAML: "),
        ("loss: {gamma_image: 2.0}", "", "params.yaml must hold sections, of data, "),
        ("loss: {gamma_image: 2.0}", "loss: 5", "params.yaml: sections: missing: data, "),
    ],
)
def test_what_is_no_overlay_or_no_file_of_parameters_is_one_line(
    file, tmp_path, overlay, own, message
):
    path = tmp_path / "overlay.yaml"
    path.mkdir() if overlay is None else path.write_text(overlay, encoding="latin-1")
    if own is not None:
        file.write_text(own)
    before = file.read_text()
    with pytest.raises(UserError, match=message) as error:
        params.apply_overlay(path, file)
    assert "\n" not in str(error.value)
    assert file.read_text() == before


def test_a_section_of_the_parameters_that_is_none_is_said_with_its_keys(file, tmp_path):
    head, _, rest = file.read_text().partition("\nloss:")
    file.write_text(f"{head}\nloss: 5\n" + rest[rest.index("\ntraining:") :])
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("loss:\n  gamma_image: 2.0\n")
    for work in (
        lambda: params.apply_overlay(overlay, file),
        lambda: params.load(DataConfig, file),
    ):
        with pytest.raises(UserError, match=r"params.yaml: loss must hold the keys lambda"):
            work()


def test_an_overlay_may_set_what_is_new_in_a_file_of_an_earlier_version(file, tmp_path):
    text = file.read_text()
    file.write_text(text[: text.index("\nretrain:") + 1])
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("retrain:\n  start: anew\n")
    params.apply_overlay(overlay, file)
    assert params.load(RetrainConfig, file).start == "anew"


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_fits_the_parameters(file, preset):
    params.apply_overlay(preset, file)
    for section in params.SECTIONS.values():
        params.load(section, file)


def test_a_run_is_named_by_the_code_and_the_parameters_that_dvc_tracks():
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    train = stages["train"]
    tracked = [ROOT / dep for dep in train["deps"] if dep.startswith("aegan/")]
    files = {file for dep in tracked for file in (dep.rglob("*.py") if dep.is_dir() else [dep])}
    roots = ["aegan.training.loop", "aegan.training.start"]
    code = set(identity.code_of(roots, without=identity.NOT_IN_WEIGHTS))
    assert code <= files
    more = {str(file.relative_to(ROOT)) for file in files - code if file.name != "__init__.py"}
    assert more == {
        "aegan/pictures.py",  # lays out the samples, an output of the stage
        "aegan/training/run_folder.py",  # in a folder whose other files all count
        *("aegan/training/latents.py", "aegan/latent_density.py"),  # fitted to finished weights
    }
    assert train["params"] == ["model", "loss", "training"]
