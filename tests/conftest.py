import signal
from collections.abc import Iterator

import pytest
import torch

# A shell's background job ignores Ctrl-C, and so would every stage that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # a test that fails does so again


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks run faster, and sums come out the same, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
