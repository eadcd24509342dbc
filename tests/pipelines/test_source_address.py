import json
from pathlib import Path

import pytest

from aegan.config import DataConfig
from pipelines.base.errors import UserError
from pipelines.base.outputs import FOLDERS
from pipelines.download import download
from pipelines.ingest import source_address

pytestmark = pytest.mark.usefixtures("project")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The working folder is a project's."""
    folder = tmp_path / "project"
    (folder / "data/faces").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "source",
    [
        *("artifacts", "artifacts/raw", "artifacts/raw/faces", "artifacts/raw/set.zip"),
        *(str(folder) for folder in FOLDERS),
        *("report", "runs", "runs/faces", "mlruns", ".dvc", ".git", ".venv/faces"),
        "./artifacts/../artifacts/shards",
    ],
)
def test_a_source_at_below_or_above_an_output_is_refused_and_nothing_is_touched(project, source):
    picture = project / "artifacts/raw/faces/a.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    with pytest.raises(UserError, match=r"where runs write and delete: move the images"):
        source_address.resolve(source)
    with pytest.raises(UserError):
        download(_config(source), Path("artifacts/raw"))
    assert picture.read_bytes() == b"a picture"


def test_a_source_that_a_link_leads_to_an_output_is_refused_whichever_of_the_two_is_the_link(
    project, tmp_path
):
    (project / "artifacts").mkdir()
    (tmp_path / "disk").mkdir()
    (project / "artifacts/shards").symlink_to(tmp_path / "disk")
    (project / "data/pictures").symlink_to("../artifacts/raw")
    for source in ("data/pictures", str(tmp_path / "disk"), str(tmp_path / "disk/faces")):
        with pytest.raises(UserError, match="where runs write"):
            source_address.resolve(source)


@pytest.mark.parametrize("source", [".", "..", "/", "data/.."])
def test_a_source_that_contains_the_project_is_refused(source):
    with pytest.raises(UserError, match="is or contains the folder of this project"):
        source_address.resolve(source)


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_source_is_refused(source):
    with pytest.raises(UserError, match=r"data\.source is empty: expected manifold, a folder"):
        source_address.resolve(source)


def test_a_source_may_be_written_with_a_tilde_a_variable_or_as_a_file_address(
    project, monkeypatch, tmp_path
):
    faces = tmp_path / "home/my faces"
    faces.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PICTURES", str(faces))
    for source in (
        "~/my faces",
        "$HOME/my faces",
        "${PICTURES}",
        f"file://{tmp_path}/home/my%20faces",
    ):
        assert Path(source_address.resolve(source)) == faces
    assert Path(source_address.resolve("data/faces")) == project / "data/faces"
    for remote in ("manifold", "s3://bucket/faces", "https://host/a.zip?download=1", "kaggle:a/b"):
        assert source_address.resolve(remote) == remote


def test_a_folder_whose_name_looks_like_a_variable_is_a_source(project):
    (project / "$faces").mkdir()
    assert Path(source_address.resolve("$faces")) == project / "$faces"


def test_a_source_with_an_unknown_variable_names_it():
    with pytest.raises(UserError, match=r"the environment variable \$NO_SUCH_THING is not set"):
        source_address.resolve("$NO_SUCH_THING/faces")


@pytest.mark.parametrize(
    ("source", "cure"),
    [
        ("https://me:s3cr3t@host/set.zip", r"~/\.netrc"),
        ("https://s3cr3t@host/set.zip", r"~/\.netrc"),
        ("s3://key:s3cr3t@bucket/faces", "AWS_SECRET_ACCESS_KEY"),
        ("https://host/set.zip?X-Amz-Signature=s3cr3t", "environment variable"),
        ("https://host/set.zip?X-Amz-Security-Token=s3cr3t", "environment variable"),
        ("https://host/set.zip?Signature=s3cr3t&Expires=1", "environment variable"),
        ("https://host/set.zip?sv=2020&sig=s3cr3t", "environment variable"),
        ("https://host/set.zip?access_token=s3cr3t", "environment variable"),
        ("https://host/set.zip?api-key=s3cr3t", "environment variable"),
    ],
)
def test_a_source_with_a_secret_is_refused_without_repeating_it(source, cure):
    with pytest.raises(UserError, match=cure) as caught:
        source_address.resolve(source)
    assert "s3cr3t" not in str(caught.value)


def test_a_secret_address_may_stand_in_a_variable_of_which_only_the_name_is_a_source(monkeypatch):
    monkeypatch.setenv("FACES", "https://host/set.zip?sig=s3cr3t")
    assert source_address.resolve("$FACES") == "https://host/set.zip?sig=s3cr3t"


def test_a_source_above_what_an_earlier_version_left_is_told_to_delete_that_first(project):
    old = project / "data/raw"
    old.mkdir()
    (old / "manifest.json").write_text(json.dumps({"schema_version": 1, "source_sha256": "0"}))
    (old / "files-00000.parquet").touch()
    for source in ("data", "data/raw", "data/raw/faces"):
        with pytest.raises(UserError, match=r"nothing reads it any more .*: delete it with `rm -r"):
            source_address.resolve(source)
    (old / "mine.png").touch()
    with pytest.raises(
        UserError, match=r"move your own files out of it \(mine\.png\), then delete"
    ):
        source_address.resolve("data")
    assert source_address.resolve("data/faces")  # beside it


def test_pictures_in_a_folder_of_that_old_name_are_a_source_like_any_other(project):
    (project / "data/raw").mkdir()
    assert Path(source_address.resolve("data/raw")) == project / "data/raw"


def _config(source: str) -> DataConfig:
    return DataConfig(
        source=source, in_place=False, manifold_images=1, manifold_size=16, manifold_seed=0
    )
