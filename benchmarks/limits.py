"""What this machine reaches at best, and how much of it a piece of work needs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCT_SIDE = 4096
COPY_BYTES = 2**28


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


def needs(work: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs of matrix products and convolutions; bytes that all other operations read and write."""
    with _Count() as count:
        work()
    return count.flops, count.bytes


class _Count(TorchDispatchMode):
    """Every tensor that an operation takes or gives counts once; views are free.

    PyTorch's own FlopCounterMode has the formulas but fails on gradients of gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = operation(*arguments, **keywords)
        if operation.overloadpacket in flop_registry:
            formula = flop_registry[operation.overloadpacket]
            self.flops += formula(*arguments, **keywords, out_val=result)
        elif not operation.is_view:
            tensors = [leaf for leaf in tree_leaves((arguments, result)) if torch.is_tensor(leaf)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result
