"""Versions in a real MLflow store, and whether the gate lets them become the champion."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import aegan
from aegan.data import designed_faces
from aegan.model_folder import OPTIONAL
from aegan.networks import AEGAN
from aegan.training import loop
from aegan.training.latents import fit_latents
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from pipelines import register
from pipelines.base.errors import UserError
from pipelines.base.files import hash_files
from pipelines.registry import champions, decisions, gate, mlflow_files, reference
from pipelines.registry.comparison import CACHE, compare, compare_on_new
from pipelines.registry.mlflow_store import StoreError
from tests.disks import largest_file
from tests.s3 import s3_server
from tests.shards import write_shards
from tests.tiny import tiny_config
from tests.trained import CONFIG as SIZES
from tests.trained import REGISTER, ROOT, write_model, write_project

STEPS = 150
CONFIG = replace(REGISTER, experiment="gate", model_name="faces", promote="gate")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder, entered, with a model that has learnt a little of designed faces."""
    root = write_project(tmp_path_factory.mktemp("gate"))
    images = designed_faces.generate(0, 400, seed=0, image_size=16)[0]
    shards = root / "artifacts/shards"
    parts = dict(zip(("train", "validation", "test"), np.split(images, [350, 384]), strict=True))
    write_shards(shards, parts)
    run = RunFolder(root / "run")
    config = tiny_config(
        loss={"lambda_image_reconstruction": 30.0},
        num_steps=STEPS,
        checkpoint_interval_steps=STEPS,
        sample_interval_steps=STEPS,
        batch_size=16,
        learning_rate=3e-3,
        ema_half_life_images=200,
    )
    model = replace(config.model, latent_dim=16, base_channels=8)
    torch.set_num_threads(1)
    loop.train(
        replace(config, model=model),
        shards=shards,
        run_folder=run.path,
        device=torch.device("cpu"),
    )
    export_model(run.checkpoint(STEPS), root / "sound")
    fit_latents(root / "sound", shards, mirrored=True, seed=0)
    facts = json.loads((root / "artifacts/train/run.json").read_text())
    manifest = json.loads((shards / "manifest.json").read_text())
    facts["dataset_sha256"] = manifest["dataset_sha256"]
    (root / "artifacts/train/run.json").write_text(json.dumps(facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        yield root


def add(model: Path, name: str) -> str:
    """Register a folder as one more version of a name; returns its number."""
    shutil.rmtree("artifacts/train/model")
    shutil.copytree(model, "artifacts/train/model")
    scores = Path("artifacts/evaluate/metrics.json")
    before = json.loads(scores.read_text())
    scores.write_text(json.dumps(before | {"times": before.get("times", 0) + 1}))
    return register.register(replace(CONFIG, model_name=name)).number


def judge(
    name: str, version: str, *, new_images: torch.Tensor | None = None, **changes: Any
) -> gate.Verdict:
    config = replace(CONFIG, model_name=name, **changes)
    return gate.gate(config, version, new_images=new_images)


def promote(name: str, version: str) -> None:
    decisions.decide(name, kind="promotion", start=None, to=version, reasons=("by hand",))


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def tags(name: str, version: str) -> dict[str, str]:
    found: dict[str, str] = client().get_model_version(name, version).tags
    return found


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model whose weights were changed, as if they had been written so."""
    shutil.copytree(model, folder)
    for name in ("ema", "weights"):
        tensors = load_file(folder / f"{name}.safetensors")
        change(tensors)
        save_file(tensors, folder / f"{name}.safetensors")
    forget_hashes(folder)
    return folder


def forget_hashes(folder: Path) -> None:
    """As in a folder from before hashes were recorded, which had nothing optional."""
    for name in OPTIONAL:
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(config))


def add_noise(tensors: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    for weight in tensors.values():
        weight += 0.5 * weight.std(correction=0) * torch.randn_like(weight)


# -- the figures ----------------------------------------------------------------------------------


def test_the_first_version_is_held_to_floors_and_an_equal_one_to_it_and_a_damaged_one_is_refused(
    project: Path, tmp_path: Path
) -> None:
    first = judge("a", add(project / "sound", "a"))
    assert first.passed, first.reasons
    assert judge("a", "1").reasons == ("version 1 is the champion already",)
    [decision] = decisions.history("a")
    assert (decision.kind, decision.start, decision.to) == ("promotion", None, "1")
    assert "only absolute floors were held" in " ".join(decision.reasons)
    kept = reference.current()
    assert kept
    assert decision.reference == kept.sha256
    assert {"gate": "passed", "gate_reference": kept.sha256}.items() <= tags("a", "1").items()

    cached = CACHE / f"{kept.sha256}.safetensors"
    assert len(load_file(cached)) == 2
    cached.write_bytes(b"half")  # is made anew
    second = judge("a", add(project / "sound", "a"))
    assert (second.passed, second.champion, decisions.champion("a")) == (True, "1", "2")
    assert sum("0.0%" in reason for reason in second.reasons) == 3  # one model twice
    assert "the margin alone counts" in second.reasons[-1]
    assert len(load_file(cached)) == 2

    damaged = changed(project / "sound", tmp_path / "damaged", add_noise)
    theirs = aegan.sample(aegan.load(damaged), 40, seed=99)  # of which nobody else draws as many
    third = judge("a", add(damaged, "a"), new_images=theirs)
    assert (third.passed, third.champion, decisions.champion("a")) == (False, "2", "2")
    assert any("worse, 5.0% worse is allowed (register.gate_margin)" in r for r in third.reasons)
    assert {"gate": "refused", "gate_champion": "2"}.items() <= tags("a", "3").items()
    assert "it is better on the new images and the reference decides" in third.reasons
    page = Path("artifacts/gate/index.html").read_text()
    assert "Version 3 is" in page
    assert third.reasons[0].partition(":")[0] in page
    figures = json.loads(Path("artifacts/gate/comparison.json").read_text())
    assert [len(figures[role]["draws"]) for role in ("candidate", "champion")] == [5, 5]


def test_images_that_came_after_the_champion_are_compared_too_and_the_reference_decides(
    project: Path, tmp_path: Path
) -> None:
    sound = project / "sound"
    damaged = changed(sound, tmp_path / "damaged", add_noise)
    new = torch.from_numpy(designed_faces.generate(1000, 40, seed=0, image_size=16)[0])
    promote("new", add(damaged, "new"))
    few = compare_on_new(new[:5], aegan.load(sound), aegan.load(damaged))
    assert gate._said_of_new(few, refused=False) == (
        "on the new images nothing was compared: 5 test images came after the champion, 8 are "
        "needed",
    )

    better = judge("new", add(sound, "new"), new_images=new)
    assert (better.passed, decisions.champion("new")) == (True, "2")
    [figures] = [reason for reason in better.reasons if reason.startswith("on the new images (40")]
    assert figures.count("better") == 3
    assert "it is better on the new images and within what is allowed on the reference" in (
        better.reasons
    )
    page = Path("artifacts/gate/index.html").read_text()
    assert "On the new images" in page
    assert "better on all of them" in page
    kept = json.loads(Path("artifacts/gate/comparison.json").read_text())["new_images"]
    assert (kept["count"], len(kept["candidate"]), len(kept["changes"])) == (40, 5, 3)


def test_what_noise_explains_is_no_reason_to_refuse() -> None:
    names = ("frechet_distance", "coverage_random", "reconstruction_mae")
    champion = [dict(zip(names, (1.0, 0.5, 0.1), strict=True))] * 5
    candidate = [dict(zip(names, (1.2, 0.4, 0.12), strict=True))] * 5
    for noise, refused in ({}, True), ({"frechet_distance": 0.3}, False):
        change = compare(candidate, champion, margin=0.1, noise=noise)[0]
        assert (change.metric, change.refused) == ("frechet_distance", refused)
        assert change.worse == pytest.approx(0.2)
    assert [c.refused for c in compare(candidate, champion, margin=0.21, noise={})] == [False] * 3
    lost = [one | {"frechet_distance": float("nan")} for one in candidate]
    assert compare(lost, champion, margin=0.9, noise={})[0].refused


def test_samples_that_are_all_alike_are_refused_also_as_the_first(
    project: Path, tmp_path: Path
) -> None:
    def collapse(tensors: dict[str, torch.Tensor]) -> None:
        tensors["generator.stem.weight"].zero_()  # whatever the latent, one image

    verdict = judge("alike", add(changed(project / "sound", tmp_path / "one", collapse), "alike"))
    assert not verdict.passed
    assert "its samples have collapsed: their variety is 0.00" in verdict.reasons[0]
    assert decisions.champion("alike") is None


def test_a_model_without_encoder_is_judged_by_its_samples_and_that_is_said(
    project: Path, tmp_path: Path
) -> None:
    def forget_encoder(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("encoder.")]:
            del tensors[name]

    gan = changed(project / "sound", tmp_path / "gan", forget_encoder)
    config = json.loads((gan / "config.json").read_text()) | {"has_encoder": False, "arm": "gan"}
    (gan / "config.json").write_text(json.dumps(config))
    promote("gan", add(project / "sound", "gan"))
    verdict = judge("gan", add(gan, "gan"), gate_margin=0.9)
    assert verdict.passed, verdict.reasons
    assert "it cannot encode: reconstructions were not compared" in verdict.reasons
    assert sum("is allowed" in reason for reason in verdict.reasons) == 2


def test_a_gray_version_is_not_compared_on_images_in_colour(project: Path, tmp_path: Path) -> None:
    gray = write_model(tmp_path / "gray")
    networks = AEGAN(SIZES, image_size=16, image_channels=1, encoder=True, discriminators=False)
    weights = {name: value.contiguous() for name, value in networks.state_dict().items()}
    for name in ("ema", "weights"):
        save_file(weights, gray / f"{name}.safetensors")
    config = json.loads((gray / "config.json").read_text()) | {"image_channels": 1}
    (gray / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"makes images of 16x16x1.*`aegan reference new"):
        judge("gray", add(gray, "gray"))
    assert decisions.history("gray") == []


def test_the_command_tells_promotion_refusal_and_error_by_its_exit_code(
    project: Path, tmp_path: Path
) -> None:
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("model_name: aegan", "model_name: command"))
    damaged = changed(project / "sound", tmp_path / "damaged", add_noise)
    versions = [add(folder, "command") for folder in (project / "sound", damaged)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    codes, outputs = [], []
    for version in (*versions, "7"):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "gate", version],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        codes.append(done.returncode)
        outputs.append(done.stdout + done.stderr)
    assert codes == [0, 3, 1], outputs
    assert "gate: version 1 passed" in outputs[0]
    assert "gate: version 2 refused" in outputs[1]
    assert outputs[2].startswith("error: there is no version 7 of command")


# -- the files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged_version(project: Path) -> str:
    return add(project / "sound", "files")


@pytest.fixture
def stored(project: Path, damaged_version: str) -> Iterator[Path]:
    """The files of a version where MLflow keeps them; put back afterwards."""
    place = client().get_model_version_download_uri("files", damaged_version)
    folder = Path(place.removeprefix("file://")) / "artifacts/model"
    before = tags("files", damaged_version)["model_sha256"]
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(project / "sound", folder)
    client().set_model_version_tag("files", damaged_version, "model_sha256", before)


def trust(folder: Path, version: str) -> None:
    """As if a registry's owner had registered the files as they are."""
    forget_hashes(folder)
    with TemporaryDirectory() as alone:  # without card, pictures, list of files
        model = Path(alone) / "model"
        model.mkdir()
        for file in folder.iterdir():
            if file.suffix == ".safetensors" or file.name == "config.json":
                shutil.copy(file, model)
        sha256 = hash_files([model])
    client().set_model_version_tag("files", version, "model_sha256", sha256)


def write_pickle(folder: Path) -> None:
    torch.save({"generator.stem.bias": torch.zeros(8)}, folder / "ema.safetensors")


def write_long_header(folder: Path) -> None:
    content = (10 * 2**30).to_bytes(8, "little") + b"{" + bytes(100)
    (folder / "ema.safetensors").write_bytes(content)


def rename_weight(folder: Path) -> None:
    tensors = load_file(folder / "ema.safetensors")
    tensors["generator.steam.bias"] = tensors.pop("generator.stem.bias")
    save_file(tensors, folder / "ema.safetensors")


def write_nan(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        next(iter(tensors.values())).view(-1)[0] = torch.nan
        save_file(tensors, folder / file)

    return change


DAMAGES: dict[str, tuple[Callable[[Path], Any], bool, str]] = {  # change, trusted, what is said
    "a pickle": (write_pickle, True, "no file of weights|header"),
    "a header of 10 GB": (write_long_header, True, "no file of weights"),
    "a wrong key": (rename_weight, True, '"generator.steam.bias" is F32'),
    "averaged weights that are no numbers": (
        write_nan("ema.safetensors"), True, "ema.safetensors.*not finite numbers",
    ),
    "last weights that are no numbers": (
        write_nan("weights.safetensors"), True, "/weights.safetensors.*not finite numbers",
    ),
    "an extra file": (
        lambda folder: (folder / "model.pkl").write_bytes(b"x"), False,
        "holds model.pkl, which is no file of a model",
    ),
    "a pickle, not as registered": (write_pickle, False, "not those that were registered"),
}  # fmt: skip


@pytest.mark.fault("damaged files")
@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_are_no_sound_model_are_refused_with_the_reason(
    name: str, stored: Path, damaged_version: str
) -> None:
    damage, trusted, sentence = DAMAGES[name]
    damage(stored)
    if trusted:
        trust(stored, damaged_version)
    verdict = judge("files", damaged_version)
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    [reason] = verdict.reasons
    assert re.search(sentence, reason), reason
    assert "\n" not in reason
    assert "/tmp" not in reason
    assert decisions.champion("files") is None
    assert tags("files", damaged_version)["gate"] == "refused"


@pytest.mark.fault("damaged files")
def test_a_link_that_leads_out_is_not_followed(stored: Path, damaged_version: str) -> None:
    (stored / "ema.safetensors").unlink()
    (stored / "ema.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="outside the artifact directory"):
        judge("files", damaged_version)
    assert decisions.champion("files") is None


@pytest.mark.fault("damaged files")
def test_a_flipped_byte_anywhere_is_refused(
    stored: Path, damaged_version: str, record_property: Any
) -> None:
    random = np.random.default_rng(0)
    files = sorted(file.name for file in Path("sound").iterdir())
    assert "discriminators.safetensors" in files
    for file in files:
        content = bytearray((stored / file).read_bytes())
        content[random.integers(len(content))] ^= 1
        (stored / file).write_bytes(content)
        assert not judge("files", damaged_version).passed
        shutil.copy(Path("sound") / file, stored / file)
    record_property("faults", len(files))


@pytest.mark.fault("registry")
def test_a_champion_whose_files_are_gone_is_one_line_with_the_cure(project: Path) -> None:
    versions = [add(project / "sound", "gone") for _ in range(2)]
    promote("gone", versions[0])
    place = client().get_model_version_download_uri("gone", versions[0])
    shutil.rmtree(Path(place.removeprefix("file://")) / "artifacts")
    with pytest.raises(
        UserError, match=r"the champion, models:/gone/1, cannot be.*--force"
    ) as said:
        judge("gone", versions[1])
    assert "\n" not in str(said.value)
    assert decisions.champion("gone") == versions[0]
    assert "gate" not in tags("gone", versions[1])


@pytest.mark.fault("disk")
def test_a_full_disk_is_one_line_and_promotes_nothing(project: Path) -> None:
    version = add(project / "sound", "full")
    reference.current_or_first(Path("artifacts/shards"))
    with largest_file(3000), pytest.raises(UserError) as said:
        judge("full", version)
    assert "\n" not in str(said.value)
    assert decisions.champion("full") is None


@pytest.fixture
def copy(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the project, entered, with what an S3 server asks for."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    folder = shutil.copytree(project, tmp_path / "copy")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.integration
@pytest.mark.fault("bucket")
def test_a_bucket_that_is_gone_is_one_line_and_decides_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        version = add(copy / "sound", "bucket")
        boto3.resource("s3").create_bucket(Bucket="other")
        mlflow_files.move(copy / "mlflow.db", "s3://gone/mlruns")
        with pytest.raises(UserError, match="bucket") as said:
            judge("bucket", version)
    assert "\n" not in str(said.value)
    assert decisions.history("bucket") == []


@pytest.mark.integration
@pytest.mark.fault("bucket")
def test_a_rollback_passes_over_no_version_because_the_bucket_does_not_answer(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [add(copy / "sound", "silent") for _ in range(2)]
    promote("silent", versions[0])
    decisions.decide(
        "silent", kind="promotion", start=versions[0], to=versions[1], reasons=["better"]
    )
    mlflow_files.move(copy / "mlflow.db", "s3://models/mlruns")
    with s3_server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(StoreError) as said:  # that server has ended
        champions.rollback("silent")
    assert "\n" not in str(said.value)
    assert decisions.champion("silent") == versions[1]


def test_a_model_answers_alone_and_one_that_needs_the_network_does_not(
    project: Path, tmp_path: Path
) -> None:
    code = "import sys, socket, runpy; hook = []; sys.argv = sys.argv[1:]\n"
    code += "import aegan; load = aegan.load\n"
    code += (
        "def asking(*a, **k): socket.create_connection(('127.0.0.1', 9)); return load(*a, **k)\n"
    )
    code += "aegan.load = asking; runpy.run_path(sys.argv[0], run_name='__main__')"
    for start, expected in (([], 0), (["-c", code], 1)):
        command = [sys.executable, *start, str(gate.FRESH_PROCESS), str(project / "sound")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
    assert "it asked for the network" in done.stderr
