"""Training batches by number: the same number gives the same images, always.

The split is shown epoch after epoch, each in a fresh order that depends on seed and epoch only. So
a batch's number is all that is needed to resume, also in the middle of an epoch, and a global batch
does not depend on how many workers share it.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from aegan.data.dataset import (
    image_shape,
    load_images,
    load_labels,
    read_labels,
    read_manifest,
    read_row_group,
    row_groups,
)
from aegan.data.node_memory import once_per_node

GPU_SHARE = 0.5  # of its free memory that training images may take
WINDOW_ROW_GROUPS = 8  # how many row groups the streamed reader shuffles together

# Number of a batch => this worker's share, uint8 [N, H, W, C], or of the images' classes int64 [N].
ReadBatch = Callable[[int], Tensor]
Column = Literal["image", "label"]


def resident_reader(
    folder: Path,
    *,
    batch_size: int,
    share: slice,
    seed: int,
    device: torch.device,
    column: Column = "image",
) -> ReadBatch:
    """Keeps the whole training split in memory and shuffles it whole.

    On a GPU where it fits, else on the host, once for all workers there, read ahead of the GPU.
    `share` is what this worker keeps of each batch. There must be images for one. A reader of the
    labels gives those of the images that a reader of the images gives; raises ConfigError if an
    image has none.
    """
    load = load_images if column == "image" else load_labels
    images = torch.from_numpy(once_per_node(lambda: load(folder, "train")))
    batches_per_epoch = len(images) // batch_size
    fits = device.type != "cuda" or images.nbytes < GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    if fits:
        images = images.to(device)
    orders: dict[int, Tensor] = {}

    def read(number: int) -> Tensor:
        epoch, index = divmod(number, batches_per_epoch)
        if epoch not in orders:
            orders.clear()
            order = _random(seed, epoch).permutation(len(images))
            orders[epoch] = torch.from_numpy(order).to(images.device)
        rows = orders[epoch][index * batch_size : (index + 1) * batch_size][share]
        return images.index_select(0, rows)

    return read if fits else _read_ahead(read, device)


def _read_ahead(read_batch: ReadBatch, device: torch.device) -> ReadBatch:
    """Reads the next batch on a thread, into memory that copies to a GPU on its own (pinned)."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
    loading: dict[int, Future[Tensor]] = {}

    def load(number: int) -> Tensor:
        batch = read_batch(number)
        return batch.pin_memory() if device.type == "cuda" else batch

    def read(number: int) -> Tensor:
        batch = loading.pop(number, None) or thread.submit(load, number)
        loading.clear()
        loading[number + 1] = thread.submit(load, number + 1)
        return batch.result().to(device, non_blocking=True)

    return read


@dataclass(frozen=True)
class _Window:
    """Consecutive rows [start, stop) of an epoch: some row groups, shuffled together."""

    epoch: int
    start: int
    stop: int
    groups: tuple[tuple[Path, int], ...]  # (shard, row group)


def streamed_reader(
    folder: Path,
    *,
    batch_size: int,
    share: slice,
    seed: int,
    device: torch.device,
    column: Column = "image",
) -> ReadBatch:
    """Holds three windows of row groups at most: row groups are shuffled, then rows in a window.

    Arguments as of `resident_reader`. Every worker reads every row group and keeps its
    share of each batch: reading raw pixels is so much faster than training on them that this costs
    less than it simplifies.
    """
    manifest = read_manifest(folder)
    read_group: Callable[[Path, int], np.ndarray] = read_labels
    if column == "image":
        read_group = partial(read_row_group, shape=image_shape(manifest))
    else:
        load_labels(folder, "train")  # an image without one is refused before any training
    found = [*row_groups(folder, manifest, "train")]
    groups, sizes = [group[:2] for group in found], [rows for *_, rows in found]
    batches_per_epoch = sum(sizes) // batch_size
    thread = ThreadPoolExecutor(1, thread_name_prefix="shards")  # reads ahead
    loading: dict[_Window, Future[Tensor]] = {}

    def windows_of(epoch: int) -> list[_Window]:
        order = _random(seed, epoch).permutation(len(groups))
        windows: list[_Window] = []
        start = 0
        for first in range(0, len(order), WINDOW_ROW_GROUPS):
            chosen = order[first : first + WINDOW_ROW_GROUPS]
            stop = start + sum(sizes[group] for group in chosen)
            windows.append(_Window(epoch, start, stop, tuple(groups[group] for group in chosen)))
            start = stop
        return windows

    def load(window: _Window) -> Tensor:
        images = np.concatenate([read_group(*group) for group in window.groups])
        order = _random(seed, window.epoch, 1 + window.start).permutation(len(images))
        return torch.from_numpy(images[order])

    def read(number: int) -> Tensor:
        epoch, index = divmod(number, batches_per_epoch)
        start, stop = index * batch_size, (index + 1) * batch_size
        windows = windows_of(epoch)
        needed = [w for w in windows if w.start < stop and start < w.stop]
        ahead = [w for w in windows if w.start == needed[-1].stop]
        for window in set(loading) - {*needed, *ahead}:
            del loading[window]
        for window in (*needed, *ahead):
            if window not in loading:
                loading[window] = thread.submit(load, window)
        parts = [loading[w].result()[max(start - w.start, 0) : stop - w.start] for w in needed]
        return torch.cat(parts)[share]

    return _read_ahead(read, device) if device.type == "cuda" else read


def _random(*key: int) -> np.random.Generator:
    """Independent for different keys, but a key that ends in 0 equals the one without the 0."""
    return np.random.default_rng(key)
