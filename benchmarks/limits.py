"""What this machine reaches at best, and how much of it a piece of work needs."""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PRODUCT_SIDE = 4096
COPY_BYTES = 2**28


def keep_memory() -> None:
    """From now on the C library keeps freed memory of large tensors, as the train stage has it.

    By default glibc maps more than 32 MiB anew each time. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matrix_product_rate(dtype: torch.dtype, device: torch.device, repeats: int = 1) -> float:
    """FLOP/s of a large square matrix product, median."""
    a, b = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device).to(dtype) for _ in range(2))
    a @ b
    times = [seconds(lambda: a @ b, device) for _ in range(repeats)]
    return 2 * PRODUCT_SIDE**3 / statistics.median(times)


def copy_rate(device: torch.device, repeats: int = 9) -> float:
    """Bytes/s read and written by a large copy, median."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(repeats)]
    return 2 * COPY_BYTES / statistics.median(times)


class Counter(TorchDispatchMode):
    """Counts operations, FLOPs of matrix products by PyTorch's formulas, and bytes of all others.

    Views cost nothing, and memory that is only reserved is neither read nor written. PyTorch's own
    FlopCounterMode cannot be used: its hooks on modules forbid `autograd.grad`, which R1 needs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.flops = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if func.is_view or "empty" in packet.__name__:
            return result
        self.operations += 1
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        else:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if torch.is_tensor(leaf))
        return result
