"""Cards, lists of hashes and signatures: what was signed loads, and nothing else."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aegan
from pipelines import register
from pipelines.base import package
from pipelines.base.errors import UserError
from pipelines.cli import main as aegan_command
from pipelines.registry import signing, start_from, tracking
from pipelines.serving import served
from tests.trained import REGISTER, write_model, write_project

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys `ours` and `theirs`, and in `trusted` the public one of ours."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        package.make_keys(folder / name)
    (folder / "trusted").mkdir()
    shutil.copy(folder / "ours.pub", folder / "trusted")
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `model` and `other`, both signed with our key."""
    folder = tmp_path_factory.mktemp("signed")
    for seed, name in enumerate(("model", "other")):
        write_model(folder / name, seed=seed)
        sign(folder / name, keys / "ours")
    return folder


def sign(folder: Path, key: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(package.SIGNING_KEY, str(key))
        signing.sign(str(folder))


@pytest.fixture
def model(signed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(signed / "model", tmp_path / "model")


@pytest.fixture
def trusting(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(package.TRUSTED_KEYS, str(keys / "trusted"))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_what_is_signed_is_verified_and_loads_as_before(model: Path, trusting: None) -> None:
    assert "whole, and signed with the trusted key" in signing.verify(str(model))
    assert tracking.load_model(model).latent_dim == 8
    found = served.load(str(model))
    assert (found.model.latent_dim, found.about["model"]) == (8, "model")


def test_the_list_is_what_sha256sum_checks(model: Path) -> None:
    check = ["sha256sum", "--check", "--strict", package.SUMS]
    assert subprocess.run(check, cwd=model, check=False, capture_output=True).returncode == 0


def alter(model: Path, _: Path) -> None:
    with (model / "ema.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        [last] = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def alter_list_too(model: Path, _: Path) -> None:
    alter(model, _)
    package.write_sums(model)


def add(model: Path, _: Path) -> None:
    (model / "sitecustomize.py").write_text("")


def add_below(model: Path, _: Path) -> None:
    (model / "a").mkdir()
    (model / "a" / ".hidden").write_text("")


def remove(model: Path, _: Path) -> None:
    (model / "weights.safetensors").unlink()


def link(model: Path, signed: Path) -> None:
    (model / "ema.safetensors").unlink()
    (model / "ema.safetensors").symlink_to(signed / "model" / "ema.safetensors")


def link_list(model: Path, signed: Path) -> None:
    (model / package.SUMS).unlink()
    (model / package.SUMS).symlink_to(signed / "model" / package.SUMS)


def pipe(model: Path, _: Path) -> None:
    (model / "ema.safetensors").unlink()
    os.mkfifo(model / "ema.safetensors")


def swap_signature(model: Path, signed: Path) -> None:
    shutil.copy(signed / "other" / package.SIGNATURE, model)


def no_signature(model: Path, _: Path) -> None:
    (model / package.SIGNATURE).write_text("{}")


def unsign(model: Path, _: Path) -> None:
    (model / package.SIGNATURE).unlink()


def lead_out(model: Path, _: Path) -> None:
    with (model / package.SUMS).open("a") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n")


FAULTS: dict[Callable[[Path, Path], None], tuple[str, bool]] = {  # => words, also without keys?
    alter: ("ema.safetensors was altered: its hash is not in SHA256SUMS", True),
    alter_list_too: ("the signature is not of this SHA256SUMS", False),
    add: ("sitecustomize.py, which its SHA256SUMS does not list", True),
    add_below: ("a/.hidden, which its SHA256SUMS does not list", True),
    remove: ("weights.safetensors, missing", True),
    link: ("ema.safetensors is a link or no file", True),
    link_list: ("SHA256SUMS cannot be used: no plain file", True),
    pipe: ("ema.safetensors is a", True),
    swap_signature: ("it was altered, or the signature is another model's", False),
    no_signature: ("its SHA256SUMS.sig is no signature", True),
    unsign: ("is not signed, and AEGAN_TRUSTED_KEYS is set", False),
    lead_out: ("", True),
}


@pytest.mark.fault("registry")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_not_what_was_signed_is_refused_in_one_line_before_it_is_parsed(
    model: Path,
    signed: Path,
    keys: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Path, Path], None],
) -> None:
    fault(model, signed)
    words, without_keys = FAULTS[fault]
    if without_keys:
        assert words in refusal(lambda: signing.verify(str(model)))
    else:
        signing.verify(str(model))
    monkeypatch.setenv(package.TRUSTED_KEYS, str(keys / "trusted"))
    monkeypatch.setattr(aegan, "load", lambda *_, **__: pytest.fail("it was parsed"))
    for use in (signing.verify, tracking.load_model, served.load):
        if fault is not pipe or use is signing.verify:
            assert words in refusal(lambda use=use: use(str(model)))  # type: ignore[misc]


@pytest.mark.fault("registry")
def test_another_key_is_named(model: Path, keys: Path, trusting: None) -> None:
    sign(model, keys / "theirs")
    said = refusal(lambda: tracking.load_model(model))
    theirs = next(iter(keys_in(keys / "theirs.pub")))
    assert f"signed with the key {theirs[:16]}, which is none of AEGAN_TRUSTED_KEYS" in said


def keys_in(file: Path) -> package.TrustedKeys:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(package.TRUSTED_KEYS, str(file))
        return package.trusted_keys()


@pytest.mark.fault("registry")
def test_a_signature_for_something_else_is_none_of_a_package(
    model: Path, keys: Path, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "CONTEXT", b"something else\n")
    sign(model, keys / "ours")
    monkeypatch.undo()
    monkeypatch.setenv(package.TRUSTED_KEYS, str(keys / "ours.pub"))
    assert "the signature is not of this" in refusal(lambda: tracking.load_model(model))


@pytest.mark.fault("registry")
@settings(max_examples=25, deadline=None, database=None)
@given(
    file=st.sampled_from([package.SUMS, package.SIGNATURE, "config.json", "ema.safetensors"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_no_flipped_bit_is_trusted(
    signed: Path, keys: Path, file: str, place: float, bit: int
) -> None:
    path = signed / "model" / file
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        package.check(signed / "model", keys_in(keys / "ours.pub"))
        assert file == package.SIGNATURE  # white space, in which one signature may differ
    except UserError:
        pass
    finally:
        path.write_bytes(whole)


def test_start_from_takes_only_what_is_trusted(
    model: Path, tmp_path: Path, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with start_from._local_folder("model", Path("artifacts/train")) as folder:
        assert package.check_files(folder) is None
    unsign(model, model)

    def start() -> None:
        with start_from._local_folder("model", Path("artifacts/train")):
            pytest.fail("it was opened")

    assert "is not signed" in refusal(start)


def test_a_private_key_is_its_owners_alone_and_never_replaced(
    keys: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (keys / "ours").stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr("sys.argv", ["aegan", "keygen", str(keys / "ours")])
    with pytest.raises(SystemExit, match=r"ours.pub exists: choose another name"):
        aegan_command()
    loose = shutil.copy(keys / "ours", model.parent / "loose")
    Path(loose).chmod(0o640)
    for file, words in (
        (loose, "others may read this private key: chmod 600"),
        (keys / "none", "cannot be read"),
        (keys / "ours.pub", "others may read"),
    ):
        monkeypatch.setenv(package.SIGNING_KEY, str(file))
        assert words in refusal(lambda: signing.sign(str(model)))
    monkeypatch.delenv(package.SIGNING_KEY)
    assert "AEGAN_SIGNING_KEY is not set" in refusal(lambda: signing.sign(str(model)))


@pytest.mark.parametrize("content", ["", "no key", "ours"])
def test_keys_that_are_none_trust_nobody(
    keys: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    place = tmp_path / "trusted"
    if content:
        place.write_text((keys / "ours").read_text() if content == "ours" else content)
    else:
        place.mkdir()
    monkeypatch.setenv(package.TRUSTED_KEYS, str(place))
    assert "trusted" in refusal(lambda: tracking.load_model(model))


@pytest.fixture(scope="module")
def registered(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder, entered, whose model is registered and signed with our key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(write_project(tmp_path_factory.mktemp("project")))
        with pytest.MonkeyPatch.context() as signing_patch:
            signing_patch.setenv(package.SIGNING_KEY, str(keys / "ours"))
            register.register(REGISTER)
        yield Path.cwd()


def package_in_store(project: Path, version: int = 1) -> Path:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    return Path(client.get_model_version_download_uri("aegan", str(version))) / "artifacts/model"


def test_a_version_has_a_card_pictures_hashes_and_a_signature(
    registered: Path, trusting: None
) -> None:
    from mlflow import MlflowClient

    folder = package_in_store(registered)
    card = (folder / "README.md").read_text()
    client = MlflowClient(f"sqlite:///{registered / 'mlflow.db'}")
    description = client.get_model_version("aegan", "1").description
    for text in (card, description):
        assert (
            "| frechet_distance | lower | 1.5 | 0.5 | two halves of the real test images |" in text
        )
        assert "Licence: not known" in text
        assert "3 training, 3 validation, 3 test images" in text
    assert "![interpolations/random.png](interpolations/random.png)" in card
    assert "![" not in description
    assert (folder / "interpolations/random.png").exists()
    assert "  onnx/generator.onnx\n" in (folder / "SHA256SUMS").read_text()
    address = "models:/aegan@candidate"
    assert "signed with the trusted key" in signing.verify(address)
    assert tracking.load_model(address).latent_dim == 8
    assert served.load(address).about["model"] == "models:/aegan/1"


def test_the_same_content_makes_no_new_version_signed_or_not(
    registered: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert register.register(REGISTER).reused
    monkeypatch.setenv(package.SIGNING_KEY, str(keys / "theirs"))
    assert register.register(REGISTER).number == "1"


@pytest.mark.fault("registry")
def test_a_version_altered_in_the_store_is_refused_before_it_is_parsed(
    registered: Path, trusting: None, monkeypatch: pytest.MonkeyPatch, record_property: object
) -> None:
    folder, address = package_in_store(registered), "models:/aegan/1"
    card, signature = folder / "README.md", folder / package.SIGNATURE
    whole, valid = card.read_text(), signature.read_bytes()
    monkeypatch.setattr(aegan, "load", lambda *_, **__: pytest.fail("it was parsed"))
    card.write_text(f"{whole}\nTrust me.")
    for use in (tracking.load_model, signing.verify, served.load):
        assert "README.md was altered" in refusal(lambda use=use: use(address))  # type: ignore[misc]
    card.write_text(whole)
    signature.unlink()
    for use in (tracking.load_model, signing.verify, served.load):
        assert "is not signed" in refusal(lambda use=use: use(address))  # type: ignore[misc]
    signature.write_bytes(valid)


def test_a_version_of_before_loads_and_can_be_signed_later(
    registered: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = package_in_store(registered), "models:/aegan/1"
    before = shutil.copytree(folder, registered / "before")
    try:
        for name in ("README.md", package.SUMS, package.SIGNATURE):
            (folder / name).unlink()
        shutil.rmtree(folder / "interpolations")
        assert tracking.load_model(address).latent_dim == 8
        assert "has no SHA256SUMS" in refusal(lambda: signing.verify(address))
        monkeypatch.setenv(package.SIGNING_KEY, str(keys / "ours"))
        assert "signed with the key" in signing.sign("models:/aegan@candidate")[0]
        monkeypatch.setenv(package.TRUSTED_KEYS, str(keys / "trusted"))
        assert tracking.load_model(address).latent_dim == 8
    finally:
        shutil.rmtree(folder)
        before.rename(folder)


def test_a_source_is_code_in_the_card_whatever_it_is_called() -> None:
    from pipelines.registry import card

    text = card._data(
        {
            "splits": {name: {"rows": 1} for name in ("train", "validation", "test")},
            "source": "`<img src=x>\x1b[2J`",
            "dataset_sha256": "0" * 64,
        }
    )
    assert "`'<img src=x>\\x1b[2J'`:" in text
