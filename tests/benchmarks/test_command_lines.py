import importlib
import sys
from pathlib import Path

import pytest

from pipelines.base.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks"
COMMANDS = [
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in sorted(FOLDER.rglob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]
STARTED_BY_ANOTHER = {"all_reduce", "launch_ray", "launch_torch"}  # with a file of settings
WITHOUT_A_FILE = {"decisions", "gan_and_aegan", "serving"}  # they print their figures


@pytest.mark.parametrize("name", sorted({*COMMANDS} - STARTED_BY_ANOTHER))
def test_every_benchmark_says_what_it_takes(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main()
    assert ("--json" in capsys.readouterr().out) == (name not in WITHOUT_A_FILE)


@pytest.mark.parametrize(
    ("name", "words"),
    [("decisions", "MLFLOW_TRACKING_URI is not set"), ("gan_and_aegan", "`make run` first")],
)
def test_a_benchmark_that_lacks_what_it_measures_says_so(name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(UserError, match=words):
        importlib.import_module(f"benchmarks.{name}").main()
    assert not list(tmp_path.iterdir())
