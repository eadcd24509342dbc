import tracemalloc

import numpy as np
import pytest
import torch

from aegan.data.dataset import load_images
from aegan.data.reader import WINDOW_ROW_GROUPS, _read_ahead, resident_reader, streamed_reader
from tests.shards import write_shards

ROWS = 16 * WINDOW_ROW_GROUPS * 2 + 5  # three windows of the streamed reader, the last one short
CPU = torch.device("cpu")


def reader_ahead(*arguments, **keywords):
    """What feeds a GPU from the host's memory."""
    return _read_ahead(streamed_reader(*arguments, **keywords), CPU)


READERS = pytest.mark.parametrize("reader", [resident_reader, streamed_reader, reader_ahead])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Images that carry their own number."""
    numbers = np.arange(ROWS, dtype=np.uint16)
    images = np.zeros((ROWS, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers & 255, numbers >> 8
    return write_shards(tmp_path_factory.mktemp("shards"), {"train": images})


def numbers_of(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() + 256 * images[:, 0, 0, 1].int()).tolist()


def open_reader(reader, shards, *, share=slice(None), seed=0, batch_size=10):
    return reader(shards, batch_size=batch_size, share=share, seed=seed, device=CPU)


@READERS
def test_an_epoch_shows_every_image_once_but_for_the_rest_of_a_batch(reader, shards):
    read = open_reader(reader, shards)
    batches = ROWS // 10
    for epoch in range(2):
        shown = [n for b in range(batches) for n in numbers_of(read(epoch * batches + b))]
        assert len(shown) == len(set(shown)) == batches * 10


@READERS
def test_epochs_and_seeds_give_different_orders(reader, shards):
    read, other = open_reader(reader, shards), open_reader(reader, shards, seed=1)
    batches = ROWS // 10
    first = numbers_of(read(0))
    assert first != numbers_of(read(batches))
    assert first != numbers_of(other(0))


@READERS
def test_a_batch_depends_on_its_number_only_not_on_what_was_read_before(reader, shards):
    forwards = open_reader(reader, shards)
    expected = [numbers_of(forwards(number)) for number in range(60)]
    for number in (59, 13, 26, 0, 40):
        assert numbers_of(open_reader(reader, shards)(number)) == expected[number]


@READERS
@pytest.mark.parametrize("world_size", [2, 5])
def test_the_workers_shares_add_up_to_the_global_batch(reader, shards, world_size):
    whole = numbers_of(open_reader(reader, shards)(17))
    size = 10 // world_size
    shares = [slice(rank * size, (rank + 1) * size) for rank in range(world_size)]
    parts = [numbers_of(open_reader(reader, shards, share=share)(17)) for share in shares]
    assert [number for part in parts for number in part] == whole


def test_loading_a_split_gives_its_images_in_order(shards):
    assert numbers_of(torch.from_numpy(load_images(shards, "train"))) == list(range(ROWS))
    assert load_images(shards, "test").shape == (0, 2, 2, 3)


def test_a_limit_takes_images_from_all_over_a_split_and_always_the_same_ones(shards):
    few, more = (
        numbers_of(torch.from_numpy(load_images(shards, "train", limit=limit)))
        for limit in (100, 200)
    )
    assert (len(few), len(more)) == (100, 200)
    assert few == sorted(few)
    assert set(few) < set(more)
    of_quarters = np.histogram(few, bins=4, range=(0, ROWS))[0]
    assert of_quarters.min() > 10  # of folders in the order of their classes: of every class
    assert numbers_of(torch.from_numpy(load_images(shards, "train", limit=100))) == few
    assert load_images(shards, "train", limit=0).shape == (0, 2, 2, 3)


def test_a_split_is_loaded_without_a_copy_of_its_row_groups(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 256, 256, 3), np.uint8)
    shards = write_shards(tmp_path, {"train": images})
    row_group = images[:16].nbytes
    tracemalloc.start()
    loaded = load_images(shards, "train")
    _, peak = tracemalloc.get_traced_memory()  # of NumPy's arrays, not of Arrow's buffers
    tracemalloc.stop()
    assert np.array_equal(loaded, images)
    assert peak < loaded.nbytes + row_group / 2
