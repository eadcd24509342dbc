"""The rules of docs/architecture.md that ruff cannot hold: who may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWNERS = {  # library => the only modules of pipelines/ that may import it
    "boto3": {"storage"},
    "botocore": {"storage"},
    "mlflow": {"tracking", "serving"},
    "ray": {"cluster", "loopback", "train"},
    "ruamel": {"params"},
    "kagglehub": {"download"},
}
STAGES = {"download", "preprocess", "train", "evaluate", "interpolate", "report", "register"}


def imports_of(path: Path) -> set[str]:
    """Dotted names of every import in a file, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


MODULES = sorted((ROOT / "pipelines").glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_a_library_is_imported_by_its_own_modules_only(module):
    used = {name.split(".")[0] for name in imports_of(module)} & OWNERS.keys()
    assert [library for library in used if module.stem not in OWNERS[library]] == []


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_meet_in_files_and_never_import_each_other(stage):
    imported = {
        name.removeprefix("pipelines.") for name in imports_of(ROOT / f"pipelines/{stage}.py")
    }
    assert imported & STAGES - {stage} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "aegan").rglob("*.py")), ids=lambda path: path.stem)
def test_the_library_needs_no_pipeline_package(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert roots & {*OWNERS, "dvc", "pipelines", "tests"} == set()
