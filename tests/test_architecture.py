"""The rules of docs/architecture.md that ruff cannot hold: who may import what."""

import ast
import re
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines.base import identity

ROOT = Path(__file__).parent.parent
WINGS = (  # imports run down this list, and never up
    "project",
    "retraining",
    "jobs",
    "serving",
    "search",
    "registry",
    "ingest",
    "cluster",
    "bucket",
    "base",
)
OWNERS = {  # library => the only modules and wings of pipelines/ that may import it
    "boto3": {"bucket.storage"},
    "botocore": {"bucket.storage"},
    "mlflow": {"registry", "serving.mlflow_page"},
    "ray": {"cluster", "ingest.decode_on_ray", "jobs.ray_jobs", "search.tuner", "train"},
    "optuna": {"search"},
    "ruamel": {"base.params"},
    "uvicorn": {"serve", "serving"},
    "kagglehub": {"ingest.kaggle"},
}
STAGES = {
    "download", "preprocess", "train", "evaluate", "interpolate", "explore", "report", "register",
    "tune",
}  # fmt: skip
COMMANDS = {"cli", "params", "retrain", "serve", "submit"}  # for people
DVC_FILES = {"tune": "tune/dvc.yaml"}  # of stages that `dvc repro` does not run by default
MAY_IMPORT = {"tune": {"train"}}  # a search consists of trainings
NOT_IN_OUTPUTS = {  # ours that stages import but need not depend on, and why
    "aegan/__init__.py": "names of other modules, which count themselves",
    "aegan/arguments.py": "what is refused",
    "aegan/config.py": "types of the parameters; dvc.yaml names the parameters",
    "aegan/files.py": "how a file comes into its place",
    "aegan/projection.py": "a command's; no stage calls it",
    "aegan/training/run_folder.py": "names of files; dvc.yaml says which are read",
    "pipelines/base": "how stages begin, end and speak; where names are kept, dvc.yaml says so",
    "pipelines/bucket": "how bytes travel; each object is verified by its hash",
    "pipelines/cluster": "where it runs, and what is shown meanwhile",
    "pipelines/registry/mlflow_files.py": "where MLflow's files are",
}
NOT_IN_WEIGHTS = {  # the same for `train` and `tune`: weights, and what is known of them
    "aegan/data": "how images are decoded; the readers of shards dvc.yaml names",
    "aegan/metrics/diagnosis.py": "when a training is ended that leads nowhere",
    "aegan/metrics/diversity.py": "by what that is noticed",
    "aegan/model_folder.py": "how finished weights are written, and read to start from",
    "pipelines/registry": "where weights to start from are kept; the run's name has their hash",
}


def imports_of(path: Path) -> set[str]:
    """Dotted names of every import in a file, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


MODULES = sorted((ROOT / "pipelines").glob("**/[a-z]*.py"))  # an __init__.py says a docstring


def name_of(path: Path) -> str:
    """`registry.tracking` of pipelines/registry/tracking.py."""
    return ".".join(path.relative_to(ROOT / "pipelines").with_suffix("").parts)


def is_within(name: str, places: Iterable[str]) -> bool:
    """Whether a dotted name or a path is one of these places or lies in one of them."""
    return any(name == place or name.startswith((f"{place}.", f"{place}/")) for place in places)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_library_is_imported_by_its_own_modules_only(module):
    used = {name.split(".")[0] for name in imports_of(module)} & OWNERS.keys()
    assert [library for library in used if not is_within(name_of(module), OWNERS[library])] == []


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_what_ray_keeps_for_itself_is_used_in_one_module_only(module):
    private = {name for name in imports_of(module) if re.search(r"^ray\..*\._|^ray\._", name)}
    base_class = {"ray.train.torch.config._TorchBackend"}  # which only a module's level can name
    assert private <= (base_class if name_of(module) == "cluster.process_group" else set()) or (
        name_of(module) == "cluster.ray_private"
    )


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_run_down_the_wings_and_never_up(module):
    wing = name_of(module).split(".")[0]
    imported = {name.split(".")[1] for name in imports_of(module) if name.startswith("pipelines.")}
    lower = WINGS[WINGS.index(wing) :] if wing in WINGS else (*WINGS, *STAGES, *COMMANDS)
    assert imported - {*lower} == set()


def test_no_module_of_ours_imports_itself_through_others():
    files = {*MODULES, *(ROOT / "aegan").rglob("[a-z]*.py")}
    graph = {file: {identity.file_of(name) for name in imports_of(file)} & files for file in files}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_top_level_is_the_stages_the_commands_and_the_wings():
    entries = [path for path in (ROOT / "pipelines").iterdir() if path.name[0] not in "._"]
    assert {path.stem for path in entries} - {"__init__", "__pycache__"} == {
        *STAGES,
        *COMMANDS,
        *WINGS,
        "pages",
    }
    assert len(entries) <= 25


@pytest.mark.parametrize("wing", [*WINGS, "pages"])
def test_a_wing_says_its_job_in_one_line(wing):
    tree = ast.parse((ROOT / f"pipelines/{wing}/__init__.py").read_text())
    assert len((ast.get_docstring(tree) or "").splitlines()) == 1
    assert len(tree.body) == 1


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_meet_in_files_and_never_import_each_other(stage):
    imported = {
        name.removeprefix("pipelines.") for name in imports_of(ROOT / f"pipelines/{stage}.py")
    }
    assert imported & STAGES - {stage} - MAY_IMPORT.get(stage, set()) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "aegan").rglob("*.py")), ids=lambda path: path.stem)
def test_the_library_needs_no_pipeline_package(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert roots & {*OWNERS, "dvc", "pipelines", "tests"} == set()


def test_only_the_layers_know_of_winograds_form():
    files = {
        path
        for folder in ("aegan", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    users = {path.stem for path in files if "aegan.networks.winograd" in imports_of(path)}
    assert users == {"layers"}


@cache
def code_of(stage: str) -> set[str]:
    """The files of all modules of ours that a stage imports, directly or through others."""
    return {str(file.relative_to(ROOT)) for file in identity.code_of([f"pipelines.{stage}"])}


def dependencies_of(stage: str) -> set[str]:
    """The modules and folders of code that dvc.yaml names for a stage."""
    file = ROOT / DVC_FILES.get(stage, "dvc.yaml")
    named = YAML(typ="safe").load(file.read_text())["stages"][stage]["deps"]
    code = {name for name in named if name.startswith(("aegan", "pipelines"))}
    return {name for name in code if Path(name).suffix in ("", ".py")}  # not the pages


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_runs_again_when_code_that_determines_its_output_changes(stage):
    exempt = NOT_IN_OUTPUTS | (NOT_IN_WEIGHTS if stage in ("train", "tune") else {})
    known = {*exempt, *dependencies_of(stage)}
    wings = {file for file in code_of(stage) if file.endswith("/__init__.py")}  # say no more
    assert {file for file in code_of(stage) - wings if not is_within(file, known)} == set()


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_does_not_run_again_for_code_that_it_does_not_use(stage):
    used = code_of(stage)
    assert {
        name
        for name in dependencies_of(stage)
        if not (ROOT / name).exists() or not any(is_within(file, [name]) for file in used)
    } == set()


def test_only_what_a_stage_uses_is_exempt_from_being_a_dependency():
    used = set().union(*map(code_of, STAGES))
    for exempt, code in ((NOT_IN_OUTPUTS, used), (NOT_IN_WEIGHTS, code_of("train"))):
        assert [name for name in exempt if not any(is_within(file, [name]) for file in code)] == []
