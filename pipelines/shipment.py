"""What a submitted job is made of: files that git knows, as they are in the working folder now."""

import hashlib
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import UserError
from pipelines.job import DVC_LOCK

NOT_SHIPPED = (  # of the files that git knows, as git's patterns: a job does not depend on them
    *("benchmarks", "docs", "infra", "tests", ".ci", ".github", "*.md", "LICENSE", "Makefile"),
    *("artifacts", "data", "report", "runs", ".venv"),
    *(".env*", "**/.env*", "*.key", "*.pem", ".dvc/config.local"),
)
MAX_SHIPPED_BYTES = 100 * 2**20  # Ray keeps the package in its head's memory


def shipped_files() -> dict[str, bytes]:
    """Names and contents of the files that git knows and the stages may use, and of dvc.lock."""
    names = sorted(_git_files("--cached") | {str(DVC_LOCK)})
    files = {name: Path(name).read_bytes() for name in names if Path(name).is_file()}
    if sum(map(len, files.values())) > MAX_SHIPPED_BYTES:
        largest = max(files, key=lambda name: len(files[name]))
        raise UserError(
            f"git knows more than {MAX_SHIPPED_BYTES >> 20} MiB here, too much to ship with a job; "
            f"the largest file is {largest}: data belongs into data.source"
        )
    return files


def unknown_files() -> list[str]:
    """New files that would be shipped if git knew them."""
    return sorted(_git_files("--others", "--exclude-standard") - {str(DVC_LOCK)})


def _git_files(*which: str) -> set[str]:
    patterns = [f":(exclude){pattern}" for pattern in NOT_SHIPPED]
    command = ["git", "ls-files", "-z", *which, "--", ".", *patterns]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError("git not found: a job is made of the files that git knows") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"git cannot list the files to ship: {error.stderr.strip()}") from None
    return set(done.stdout.split("\0")) - {""}


def hash_files(files: Mapping[str, bytes]) -> str:
    """Hash over names and contents, but for dvc.lock, which a job's results change."""
    lines = (
        f"{name}\0{hashlib.sha256(content).hexdigest()}\n"
        for name, content in sorted(files.items())
        if name != str(DVC_LOCK)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_lock() -> bytes:
    """dvc.lock, which says what data the job starts from; empty before the first run."""
    return DVC_LOCK.read_bytes() if DVC_LOCK.exists() else b""


def write_package(files: Mapping[str, bytes], path: Path) -> None:
    """A zip archive that depends on names and contents only: Ray uploads the same one once."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def git_commit() -> str:
    """The commit and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
