import os
import signal
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Side by side, threads of several processes would wait for one another on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

# A shell's background job ignores Ctrl-C, and so would every stage that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="every death at every step, not one a step"
    )


@pytest.fixture(scope="session")
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether a sweep tries everything; if not, it tries each of its parts at least once."""
    return bool(pytestconfig.getoption("thorough"))


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # a test that fails does so again


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks run faster, and sums come out the same, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OneProcessForRay(LoadScopeScheduling):
    """Under xdist a module stays in one process, and all that start Ray in the same.

    Two Rays at once on two cores start so slowly that what waits for one of them gives up.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return "ray" if starts_ray(self.config.rootpath / module) else module


@cache
def starts_ray(module: Path) -> bool:
    return "pytest.mark.ray" in module.read_text(encoding="utf-8")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneProcessForRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first = ("ray", "integration")
    items.sort(key=lambda item: [not item.get_closest_marker(name) for name in longest_first])
    for item in items:
        for marker in item.iter_markers("fault"):
            item.user_properties.append(("fault", marker.args[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many faults of each kind were tried, and how many of them ended well.

    A test is one fault, or as many as its `record_property("faults", number)` says.
    """
    tried: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            properties = dict(report.user_properties)
            if "fault" in properties and (report.when == "call" or outcome == "failed"):
                count = properties.get("faults", 1)
                tried[properties["fault"]] += count
                passed[properties["fault"]] += count * (outcome == "passed")
    if tried:
        terminalreporter.section("faults: ended well / tried")
        for kind, count in sorted(tried.items()):
            terminalreporter.write_line(f"{passed[kind]:5} / {count:<5} {kind}")
        terminalreporter.write_line(f"{passed.total():5} / {tried.total():<5} in all")
