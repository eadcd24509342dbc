"""Ranks of one training as processes of this machine."""

from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def start_ranks(worker: Callable[..., None], arguments: tuple[Any, ...], *, count: int) -> None:
    """Calls `worker(rank, *arguments)` in `count` processes and waits for them.

    They are forked from a server that has made the slow imports once, also the one that waits for
    an optimizer's first step: these take longer than what a test asks for.
    """
    imports = [worker.__module__, "torch._dynamo"]
    mp.get_context("forkserver").set_forkserver_preload(imports)
    mp.start_processes(worker, arguments, nprocs=count, start_method="forkserver")
