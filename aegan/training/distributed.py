"""The few collective operations of training; all are the identity in a single process."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP around a module with trainable parameters, if a process group is up.

    Gradients are averaged over ranks: each rank's loss must weigh as much as its share.
    """
    trainable = any(parameter.requires_grad for parameter in module.parameters())
    if not (dist.is_initialized() and trainable):
        return module
    device_ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer PyTorch has another name for this argument, older ones know only this one.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)


def averaging(module: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Inside, backward passes average gradients over ranks, or only add them up on each."""
    if enabled or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    no_sync: AbstractContextManager[None] = module.no_sync()
    return no_sync


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if it is true on one; every rank must call it."""
    if not dist.is_initialized():
        return flag
    tensor = torch.tensor([float(flag)], device=device)
    dist.all_reduce(tensor)
    return tensor.item() > 0


def total(value: Tensor) -> Tensor:
    """The sum over ranks; every rank must call it."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def from_rank_0(function: Callable[[], Result], device: torch.device) -> Result:
    """What the function returns, or raises, on rank 0, which alone calls it; on every rank."""
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # raised below, on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=device)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]
