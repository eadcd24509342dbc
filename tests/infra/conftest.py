import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def image(tmp_path) -> Path:
    """What `COPY . .` copies, under the rules of Dockerfile.dockerignore."""
    rules = (ROOT / "infra/Dockerfile.dockerignore").read_text().splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert [rule for rule in rules if rule[:1] not in ("!", "#")] == ["*", "**/__pycache__"]
    for name in allowed:
        source, target = ROOT / name, tmp_path / "app" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path / "app"
