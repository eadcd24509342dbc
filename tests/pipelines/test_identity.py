import shutil
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.base import identity

ROOT = Path(identity.__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of ours with a module, one that it imports, and one that it does not."""
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    (tmp_path / "aegan").mkdir()
    write(tmp_path, "__init__", "")
    write(tmp_path, "loop", "from aegan import layers\nfrom aegan.noise import draw\n")
    write(tmp_path, "layers", "import math\nWIDTH = 3\n")
    write(tmp_path, "noise", "def draw(x):\n    return f'{x:.2f}'\n")
    write(tmp_path, "pictures", "SIZE = 3\n")
    return tmp_path


def write(root: Path, module: str, code: str) -> None:
    (root / f"aegan/{module}.py").write_text(textwrap.dedent(code))


def hash_of_loop(*, without: Sequence[str] = ("aegan",)) -> str:
    return identity.code_sha256(identity.code_of(["aegan.loop"], without=without))


def test_the_code_of_a_module_is_what_it_imports_directly_or_through_others(project):
    files = identity.code_of(["aegan.loop"], without=["aegan"])
    assert [file.stem for file in files] == ["layers", "loop", "noise"]


@pytest.mark.parametrize(
    "same",
    [
        "# why\nimport math\n\n\nWIDTH = (\n    3\n)\n",
        '"""What it is."""\n\nimport math\nWIDTH = 3\n',
    ],
)
def test_layout_comments_and_docstrings_do_not_count(project, same):
    before = hash_of_loop()
    write(project, "layers", same)
    assert hash_of_loop() == before


@pytest.mark.parametrize("other", ["import math\nWIDTH = 4\n", "WIDTH = 3\n", "import math\n"])
def test_what_the_code_says_counts(project, other):
    before = hash_of_loop()
    write(project, "layers", other)
    assert hash_of_loop() != before


def test_what_is_not_imported_or_left_out_does_not_count(project):
    before = hash_of_loop()
    write(project, "pictures", "SIZE = 4\n")
    assert hash_of_loop() == before
    without = hash_of_loop(without=["aegan", "aegan.layers"])
    write(project, "layers", "WIDTH = 4\n")
    assert hash_of_loop(without=["aegan", "aegan.layers"]) == without


def interpreter(name: str) -> str | None:
    """Where a Python is: on the PATH, or beside the others that pyenv has installed."""
    elsewhere = sorted(
        Path.home().glob(f".pyenv/versions/{name.removeprefix('python')}*/bin/{name}")
    )
    found = [*map(str, elsewhere), *filter(None, [shutil.which(name)])]
    return next(
        (
            path
            for path in found
            if subprocess.run([path, "-V"], capture_output=True).returncode == 0
        ),
        None,
    )


@pytest.mark.parametrize("python", ["python3.12", "python3.13"])
def test_the_hash_is_the_same_on_every_python(python, tmp_path):
    found = interpreter(python)
    if found is None:
        pytest.skip(f"{python} is not installed")
    shutil.copyfile(identity.__file__, tmp_path / "identity.py")
    code = (
        "import identity, pathlib, sys; identity.ROOT = pathlib.Path(sys.argv[1]);"
        "print(identity.weights_code_sha256())"
    )
    done = subprocess.run(
        [found, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == identity.weights_code_sha256()
