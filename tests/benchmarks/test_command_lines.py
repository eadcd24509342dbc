import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
COMMANDS = [path.stem for path in sorted(FOLDER.glob("*.py")) if "argparse" in path.read_text()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_says_what_it_takes(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main()
    assert "--json" in capsys.readouterr().out
