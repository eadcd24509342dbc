"""What a submitted job is made of: files that git knows, as they are in the working folder now.

Nothing of what this machine keeps secret goes along, also where git knows it: neither by its name,
nor by what it says, nor through a link.
"""

import functools
import hashlib
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.base.errors import UserError
from pipelines.base.git import git
from pipelines.base.names import shown
from pipelines.base.outputs import fits
from pipelines.jobs.job import DVC_LOCK

NOT_NEEDED = (  # of the files that git knows, as git's patterns: a job does not depend on them
    *("benchmarks", "docs", "infra", "tests", ".ci", ".github", "*.md", "LICENSE", "Makefile"),
    *("artifacts", "data", "report", "runs", ".venv"),
)
SECRET_FOLDERS = (
    *(".aws", ".azure", ".config/gcloud", ".docker", ".gnupg", ".kaggle", ".kube", ".secrets"),
    *(".password-store", ".ssh", ".stack", ".vault", "secrets"),
)
SECRET_FILES = (
    *(".env*", "*.env", ".envrc", ".git-credentials", ".htpasswd", ".my.cnf", ".netrc", "_netrc"),
    *(".npmrc", ".pgpass", ".pypirc", ".s3cfg", ".boto", ".vault-token", ".yarnrc.yml"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.key", "*.pem", "*.ppk", "*.p8"),
    *("*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdb", "*.kdbx", "*.asc", "*.gpg", "*.age"),
    *("credentials", "credentials.*", "*_credentials*", "*-credentials*", "client_secret*.json"),
    *("secret", "secret.*", "secrets.*", "*-secret.*", "*_secret.*", "*-secrets.*", "*_secrets.*"),
    *("kaggle.json", "kubeconfig*", "*.kubeconfig", "service-account*.json"),
    *("service_account*.json", "serviceaccount*.json", "application_default_credentials.json"),
    *("*.tfstate", "*.tfstate.*", "*.tfvars", "*.tfvars.json", "token", "token.*", "*.token"),
    *("passwd", "password*", "passwords*", "*.ovpn", "*.keytab", "config.local"),
)
CODE = "*.py"  # whose names say what it does, secrets.py; what it holds is looked at
MAX_SHIPPED_BYTES = 100 * 2**20  # Ray keeps the package in its head's memory
NO_SECRETS = ("IPPublicDetector",)  # of the scanner's kinds
PLACEHOLDERS = ("password",)  # https://user:password@host, in explanations
ALLOWED = "pragma: allowlist secret"  # on a line that is none: the scanner's own mark


@dataclass
class Shipment:
    """What goes along with a job, and what does not."""

    files: dict[str, bytes] = field(default_factory=dict)  # by name
    secret: list[str] = field(default_factory=list)  # known to git, kept here: names of secrets
    folders: list[str] = field(default_factory=list)  # links to folders, other repositories
    refused: list[str] = field(default_factory=list)  # sentences: nothing is sent while there are


def collect() -> Shipment:
    """Read what would be shipped, and say of the rest why it would not."""
    found = Shipment()
    project = Path.cwd().resolve()
    for name in sorted(_git_files("--cached") | {str(DVC_LOCK)}):
        path = Path(name)
        target = path.resolve()
        inside = target.is_relative_to(project)
        if is_secret_name(name):
            found.secret.append(name)
        elif path.exists() and not inside:
            found.refused.append(
                f"{shown(name)} is a link that leads out of this folder: put the file itself there"
            )
        elif path.is_dir():
            found.folders.append(name)
        elif path.is_file():
            if is_secret_name(target.relative_to(project).as_posix()):
                found.refused.append(
                    f"{shown(name)} is a link to a file with the name of a secret: remove it"
                )
                continue
            found.files[name] = path.read_bytes()
            found.refused += find_secrets(name, found.files[name].decode(errors="replace"))
    if sum(map(len, found.files.values())) > MAX_SHIPPED_BYTES:
        largest = max(found.files, key=lambda name: len(found.files[name]))
        found.refused.append(
            f"git knows more than {MAX_SHIPPED_BYTES >> 20} MiB here, too much to ship with a job; "
            f"the largest file is {shown(largest)}: data belongs into data.source"
        )
    return found


def shipped_files() -> dict[str, bytes]:
    """Names and contents of the files that a job is made of; UserError where any is refused."""
    found = collect()
    if found.refused:
        more = f" (and {len(found.refused) - 1} more)" if len(found.refused) > 1 else ""
        raise UserError(f"not shipped: {found.refused[0]}{more}; see `aegan submit --dry-run`")
    return found.files


def is_secret_name(name: str) -> bool:
    """Whether a file's name, in whatever case, is one of those that secrets are kept under."""
    path = PurePosixPath(name.lower())
    folders = f"/{path.parent}/"
    if any(f"/{folder}/" in folders for folder in SECRET_FOLDERS):
        return True
    return fits(path.name, SECRET_FILES) and not fits(path.name, (CODE,))


def find_secrets(name: str, text: str) -> Iterator[str]:
    """A sentence for each line that has a secret whose form a scanner knows: keys, tokens."""
    for number, line in enumerate(text.splitlines(), start=1):
        if ALLOWED in line:
            continue
        for detector in _detectors():
            if set(detector.analyze_string(line)) - set(PLACEHOLDERS):
                kind = detector.secret_type
                yield (
                    f"{shown(name)}, line {number}, looks like a secret ({kind}): take it out, or "
                    f"write `{ALLOWED}` behind it if it is none"
                )


@functools.cache
def _detectors() -> list[Any]:
    """Those that know a secret by its form, without asking anyone on the network."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    kinds: Any = get_mapping_from_secret_type_to_class().values()
    return [
        kind()
        for kind in kinds
        if issubclass(kind, RegexBasedDetector) and kind.__name__ not in NO_SECRETS
    ]


def unknown_files() -> list[str]:
    """New files that would be shipped if git knew them."""
    new = _git_files("--others", "--exclude-standard") - {str(DVC_LOCK)}
    return sorted(name for name in new if not is_secret_name(name))


def _git_files(*which: str) -> set[str]:
    patterns = [f":(exclude){pattern}" for pattern in NOT_NEEDED]
    listed = git(
        *("ls-files", "-z", *which, "--", ".", *patterns),
        need="a job is made of the files that git knows",
        cure="`git init` and `git add` first",
    )
    return set(listed.split("\0")) - {""}


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
