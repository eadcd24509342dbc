"""The few collective operations of training; all are the identity in a single process."""

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DDP around a module with trainable parameters, if a process group is up.

    Gradients are averaged over ranks, so each rank's loss must be a mean over equal shares.
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


def same_on_all_ranks(value: int, device: torch.device) -> bool:
    """Whether every rank passes the same number; every rank must call it."""
    if not dist.is_initialized():
        return True
    of_rank_0 = torch.tensor([value], device=device)
    dist.broadcast(of_rank_0, src=0)
    return not any_rank(of_rank_0.item() != value, device)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
