import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from aegan.data.node_memory import once_per_node
from tests.forked import on_ranks

IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def _worker(rank: int, nodes: list[str], folder: Path) -> None:
    """Writes into <rank>.json what a rank of these nodes did and found."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(nodes)
    )
    socket.gethostname = lambda: nodes[rank]
    loads = 0

    def load() -> np.ndarray:
        nonlocal loads
        loads += 1
        return IMAGES

    found = once_per_node(load)
    equal = bool((found == IMAGES).all())
    maps = Path("/proc/self/maps").read_text(encoding="ascii")
    inode = re.search(r"(\d+) +/memfd:aegan", maps)
    found[0] = rank  # stays its own
    dist.barrier()
    own = bool((found[0] == rank).all())

    def fail() -> np.ndarray:
        raise OSError("the disk is gone")

    try:
        once_per_node(fail)
        error = ""
    except OSError as failure:
        error = str(failure)
    report = {
        "loads": loads,
        "equal": equal,
        "own": own,
        "error": error,
        "file": inode and inode[1],
    }
    (folder / f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory only are Linux's")
def test_the_ranks_of_a_node_map_one_copy_and_those_of_another_node_another(tmp_path):
    nodes = ["one", "two", "one"]
    on_ranks(_worker, nodes, tmp_path, world_size=len(nodes))
    reports = [
        json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(3)
    ]
    assert [report["loads"] for report in reports] == [1, 1, 0]
    assert reports[0]["file"] == reports[2]["file"] != reports[1]["file"]
    for report in reports:
        assert report["file"]
        assert report["equal"]
        assert report["own"]
        assert report["error"] == "the disk is gone"


def test_a_single_process_loads_for_itself():
    assert once_per_node(lambda: IMAGES) is IMAGES
