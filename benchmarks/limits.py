"""What this machine reaches at best, and how much of it a piece of work needs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PRODUCT_SIDE = 4096
COPY_BYTES = 2**28
PRODUCTS = ("conv", "mm", "linear")  # parts of the names of operations that multiply matrices


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matrix_product_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
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


def needs(work: Callable[[], Any]) -> tuple[float, float]:
    """FLOPs of the products and bytes that all other operations read and write."""
    with FlopCounterMode(display=False) as flops, _CountBytes() as traffic:
        work()
    return float(flops.get_total_flops()), float(traffic.total)


class _CountBytes(TorchDispatchMode):
    """Every tensor that an operation takes or gives counts once; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        if not (operation.is_view or any(name in str(operation) for name in PRODUCTS)):
            tensors = [leaf for leaf in tree_leaves((arguments, result)) if torch.is_tensor(leaf)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
