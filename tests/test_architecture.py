"""The rules of docs/architecture.md that ruff cannot hold: who may import what."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines import identity

ROOT = Path(__file__).parent.parent
OWNERS = {  # library => the only modules of pipelines/ that may import it
    "boto3": {"storage"},
    "botocore": {"storage"},
    "mlflow": {"mlflow_page", "mlflow_store", "serving", "tracking"},
    "ray": {
        "cluster",
        "decode_on_ray",
        "metrics_export",
        "process_group",
        "ray_address",
        "ray_jobs",
        "search",
        "train",
        "worker",
    },
    "optuna": {"search", "search_plots"},
    "ruamel": {"params"},
    "uvicorn": {"endpoint", "mlflow_page", "serve"},
    "kagglehub": {"download"},
}
STAGES = {
    "download", "preprocess", "train", "evaluate", "interpolate", "report", "register", "tune",
}  # fmt: skip
DVC_FILES = {"tune": "tune/dvc.yaml"}  # of stages that `dvc repro` does not run by default
MAY_IMPORT = {"tune": {"train"}}  # a search consists of trainings
NOT_IN_OUTPUTS = {  # modules of ours that stages import but need not depend on, and why
    "aegan/__init__.py": "names of other modules, which count themselves",
    "aegan/arguments.py": "what is refused",
    "aegan/config.py": "types of the parameters; dvc.yaml names the parameters",
    "aegan/files.py": "how a file comes into its place",
    "pipelines/checks.py": "whether the machine is large enough",
    "pipelines/cluster.py": "where training and decoding run",
    "pipelines/errors.py": "how a stage ends when it fails",
    "pipelines/identity.py": "names results; changes none",
    "pipelines/follow.py": "what is shown meanwhile, and metrics of the machine",
    "pipelines/locks.py": "who may run",
    "pipelines/metrics_export.py": "what is shown meanwhile",
    "pipelines/mlflow_files.py": "where MLflow's files are",
    "pipelines/mlflow_names.py": "which names MLflow takes",
    "pipelines/names.py": "how names are shown in errors; where they are kept, dvc.yaml names it",
    "pipelines/outputs.py": "which files are not the user's",
    "pipelines/outside.py": "which names from outside are refused",
    "pipelines/params.py": "dvc.yaml names the parameters",
    "pipelines/process_group.py": "how workers meet",
    "pipelines/progress.py": "what is shown meanwhile",
    "pipelines/ray_address.py": "where training and decoding run",
    "pipelines/run_store.py": "where checkpoints are kept; each is verified by its hash",
    "pipelines/shard_store.py": "where shards are kept; each is verified by its hash",
    "pipelines/worker_death.py": "words for workers that died",
}
NOT_IN_WEIGHTS = {  # the same for `train` and `tune`: weights, and what is known of them
    "aegan/colour.py": "how aegan/image_files.py reads",
    "aegan/file_kinds.py": "words for files that are no images",
    "aegan/image_files.py": "aegan/sampling.py reads files with it; training has shards",
    "aegan/image_headers.py": "how aegan/image_files.py reads",
    "aegan/sample_depth.py": "how aegan/image_files.py reads",
    "aegan/model_folder.py": "pipelines/tracking.py loads models; training has checkpoints",
    "aegan/service.py": "what a registered model answers",
    "pipelines/files.py": "how the finished folder comes into place",
    "pipelines/mlflow_store.py": "where models are kept that weights start from",
    "pipelines/serving.py": "pipelines/tracking.py registers it",
    "pipelines/storage.py": "how bytes travel",
    "pipelines/tracking.py": "fetches weights to start from; their hash is in the run's name",
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
    assert imported & STAGES - {stage} - MAY_IMPORT.get(stage, set()) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "aegan").rglob("*.py")), ids=lambda path: path.stem)
def test_the_library_needs_no_pipeline_package(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert roots & {*OWNERS, "dvc", "pipelines", "tests"} == set()


def code_of(stage: str) -> set[str]:
    """The files of all modules of ours that a stage imports, directly or through others."""
    return {str(file.relative_to(ROOT)) for file in identity.code_of([f"pipelines.{stage}"])}


def dependencies_of(stage: str) -> set[str]:
    """The modules that dvc.yaml names for a stage, those in folders included."""
    file = ROOT / DVC_FILES.get(stage, "dvc.yaml")
    named = YAML(typ="safe").load(file.read_text())["stages"][stage]["deps"]
    code = [ROOT / name for name in named if name.startswith(("aegan", "pipelines"))]
    files = {file for path in code for file in (path.rglob("*.py") if path.is_dir() else [path])}
    return {str(file.relative_to(ROOT)) for file in files if file.suffix == ".py"}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_runs_again_when_code_that_determines_its_output_changes(stage):
    exempt = NOT_IN_OUTPUTS | (NOT_IN_WEIGHTS if stage in ("train", "tune") else {})
    assert code_of(stage) - exempt.keys() - dependencies_of(stage) == set()


@pytest.mark.parametrize("stage", sorted(STAGES - {"register"}))  # which hashes the whole library
def test_a_stage_does_not_run_again_for_code_that_it_does_not_use(stage):
    assert dependencies_of(stage) - code_of(stage) == set()


def test_only_modules_that_a_stage_uses_are_exempt_from_being_dependencies():
    assert NOT_IN_OUTPUTS.keys() - set().union(*map(code_of, STAGES)) == set()
    assert NOT_IN_WEIGHTS.keys() - code_of("train") == set()
