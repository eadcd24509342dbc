"""No secret stands in a file; those of compose.yaml are made at random."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SECRET_NAME = re.compile(r"[A-Z0-9_]*(PASSWORD|SECRET|TOKEN|KEY)[A-Z0-9_]*")
# ${NAME:?what to do}; in GitHub's workflows ${{ secrets.NAME }}
REQUIRED = re.compile(r"\$\{[A-Z0-9_]+:\?[^}]+\}|\$\{\{ secrets\.[A-Z0-9_]+ \}\}")
IN_URL = re.compile(r"://[^/\s:@]+:[^/\s@]+@")


def literal_secrets(document: Any) -> Iterator[str]:
    """Settings of a YAML document that hold a password, or a default for one, as they stand."""
    if isinstance(document, dict):
        if SECRET_NAME.fullmatch(str(document.get("name"))) and "value" in document:
            yield f"{document['name']}={document['value']}"  # Kubernetes: {name: ..., value: ...}
        for key, value in document.items():
            if isinstance(value, str | int) and SECRET_NAME.fullmatch(str(key)):
                if not REQUIRED.fullmatch(str(value)):
                    yield f"{key}={value}"
            else:
                yield from literal_secrets(value)
    elif isinstance(document, list):
        for value in document:
            name, _, content = str(value).partition("=")
            option = name.lstrip("-").replace("-", "_").upper()
            if content and SECRET_NAME.fullmatch(option) and not REQUIRED.fullmatch(content):
                yield str(value)
            else:
                yield from literal_secrets(value)
    elif isinstance(document, str) and IN_URL.search(document):
        yield document


@pytest.mark.parametrize("file", sorted(INFRA.rglob("*.yaml")), ids=lambda file: file.name)
def test_no_yaml_file_holds_a_secret(file):
    documents = YAML(typ="safe").load_all(file.read_text())
    assert [secret for document in documents for secret in literal_secrets(document)] == []


@pytest.mark.parametrize(
    "text",
    [
        "environment: {POSTGRES_PASSWORD: postgres}",
        "environment: {RAY_AUTH_TOKEN: '${RAY_TOKEN:-changeme}'}",
        "environment: {RAY_AUTH_TOKEN: '${RAY_TOKEN}'}",
        "environment: [AWS_SECRET_ACCESS_KEY=minioadmin]",
        "environment: {AWS_SECRET_ACCESS_KEY: 12345678}",
        "command: [server, --root-password=admin]",
        "command: [mlflow, server, 'postgresql://mlflow:mlflow@postgres/mlflow']",
        "env: [{name: RAY_AUTH_TOKEN, value: abc}]",
    ],
)
def test_a_secret_in_a_file_would_be_found(text):
    assert len(list(literal_secrets(YAML(typ="safe").load(text)))) == 1


def test_the_example_has_no_value_for_a_secret():
    assert [
        name
        for name, value in settings(INFRA / ".env.example").items()
        if is_set_secret(name, value)
    ] == []


def is_set_secret(name: str, value: str) -> bool:
    return bool(SECRET_NAME.fullmatch(name) and value)


def settings(file: Path) -> dict[str, str]:
    """NAME=value lines of a file."""
    lines = [line for line in file.read_text().splitlines() if re.match(r"[A-Z]", line)]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A project folder with what makes and reads infra/.env."""
    (tmp_path / "infra").mkdir()
    for name in (".env.example", "make_env.sh", "client.sh"):
        shutil.copy(INFRA / name, tmp_path / "infra" / name)
    return tmp_path


def make_env(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [folder / "infra/make_env.sh"], capture_output=True, text=True, check=False
    )


def test_every_secret_is_made_at_random_and_only_its_owner_reads_it(folder):
    made = []
    for _ in range(2):
        assert make_env(folder).returncode == 0
        file = folder / "infra/.env"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        made.append(settings(file))
        file.unlink()
    example = settings(folder / "infra/.env.example")
    assert made[0].keys() == made[1].keys() == example.keys()
    values = [values[name] for values in made for name in example if not example[name]]
    assert len(set(values)) == len(values)  # none is used twice, none is the same the next time
    assert min(map(len, values)) >= 26
    assert all(made[0][name] == value for name, value in example.items() if value)


def test_secrets_in_use_are_not_overwritten(folder):
    assert make_env(folder).returncode == 0
    before = (folder / "infra/.env").read_text()
    second = make_env(folder)
    assert second.returncode == 1
    assert second.stderr.startswith("error: infra/.env exists")
    assert (folder / "infra/.env").read_text() == before


def test_a_shell_that_reads_client_sh_has_the_secrets(folder):
    make_env(folder)
    inherited = {"PATH": os.environ["PATH"], "AWS_SESSION_TOKEN": "of another account"}
    command = ["sh", "-euc", ". infra/client.sh; env"]
    run = subprocess.run(
        command, cwd=folder, env=inherited, capture_output=True, text=True, check=True
    )
    found = dict(line.split("=", 1) for line in run.stdout.splitlines())
    secrets = settings(folder / "infra/.env")
    assert found["RAY_AUTH_TOKEN"] == secrets["RAY_TOKEN"]
    assert found["MLFLOW_TRACKING_PASSWORD"] == secrets["MLFLOW_PASSWORD"]
    assert found["AWS_ACCESS_KEY_ID"] == secrets["S3_ACCESS_KEY_ID"]
    assert found["AWS_SECRET_ACCESS_KEY"] == secrets["S3_SECRET_ACCESS_KEY"]
    assert "AWS_SESSION_TOKEN" not in found


def test_git_ignores_the_secrets():
    command = ["git", "check-ignore", "--quiet", "infra/.env"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
