"""`.venv` as `make` finishes it, moved with the project's folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_moved_environment_runs_its_own_commands_on_its_own_projects_source(tmp_path):
    before = tmp_path / "my project"
    before.mkdir()
    (before / "pipelines").symlink_to(ROOT / "pipelines")
    run(sys.executable, "-m", "venv", before / ".venv", folder=before)
    [packages] = (before / ".venv/lib").glob("python*/site-packages")
    (packages / "theirs.pth").write_text(str(Path(typer.__file__).parents[1]))  # of our packages
    run(before / ".venv/bin/python", "-m", "pipelines.project.environment", folder=before)
    moved = tmp_path / "moved elsewhere"
    before.rename(moved)
    link = tmp_path / "a link to pip"
    link.symlink_to(moved / ".venv/bin/pip")
    for command in (moved / ".venv/bin/pip", link):
        assert f"from {moved}/.venv/lib" in run(command, "--version", folder=tmp_path)
    find = "import os, pipelines; print(pipelines.__path__[0], os.environ['DVC_NO_ANALYTICS'])"
    found = run(moved / ".venv/bin/python", "-c", find, folder=tmp_path)
    assert found == f"{moved}/pipelines 1\n"
    assert "Usage: aegan" in run(moved / ".venv/bin/aegan", "--help", folder=tmp_path)
