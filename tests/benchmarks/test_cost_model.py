import math
from dataclasses import replace

import pytest
import torch

from aegan.losses import gradient_penalty
from aegan.networks.layers import UpsampleConv2d
from benchmarks.cost_model import (
    Counter,
    Device,
    Lab,
    Link,
    Shape,
    Work,
    all_reduce_seconds,
    compute_seconds,
    fit,
    fit_link,
)

DEVICE = Device(
    seconds_per_operation=2e-5, flops_per_second=4e10, half_batch=3.0, bytes_per_second=5e9
)
LINK = Link(bytes_per_second=1e9, latency_seconds=1e-4)


def flops_of(run) -> int:
    with Counter() as counter:
        run()
    return counter.flops


def test_the_count_sees_the_upsampling_convolution_as_it_is_computed():
    layer = UpsampleConv2d(8, 5, 3, scale=2)
    h = torch.randn(2, 8, 16, 16)
    product = 2 * 2 * 8 * 5  # of one tap at one pixel, both images
    fewest = product * 4 * (2 * 2) * 16 * 16  # four phases of 2x2 taps, on the small image
    plain = product * 9 * 32 * 32
    assert fewest <= flops_of(lambda: layer(h)) < plain / 1.5


def test_the_count_sees_the_backward_pass_of_a_gradient_penalty():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.LazyLinear(1)
    )
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    logits = network(x)
    once = flops_of(lambda: torch.autograd.grad(logits.sum(), x, retain_graph=True))
    assert flops_of(lambda: gradient_penalty(x, logits, 2).backward()) > 2.5 * once


def test_views_and_reserved_memory_cost_nothing():
    x = torch.ones(4, 4)
    with Counter() as counted:
        torch.empty(1000)
        x.view(16).t()
    assert (counted.operations, counted.bytes) == (0, 0)


def test_bytes_are_those_of_operations_without_matrix_products():
    x = torch.ones(4, 4)
    with Counter() as counted:
        x @ x
        x + x
    assert (counted.operations, counted.bytes) == (2, 3 * x.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["shared", "reference"])
def test_the_work_of_a_step_grows_evenly_with_the_batch(tmp_path, one_thread, rule):
    lab = Lab(tmp_path, device="cpu", threads=1)
    shape = Shape(preset="demo", image_size=16, base_channels=4, update_rule=rule)
    counted, interpolated = lab.count_of_batch(shape, 8), lab.count(shape, 8)
    assert counted == interpolated
    assert replace(counted, bytes=0.0) != replace(lab.count(shape, 16), bytes=0.0)


def test_fitted_constants_are_those_that_made_the_measurements():
    grid = [
        (o, f, y, b) for o in (1e3, 3e3) for f in (1e9, 9e9) for y in (1e8, 5e8) for b in (4, 32)
    ]
    works = [(Work(operations=o, flops=f, bytes=y), b) for o, f, y, b in grid]
    found = fit([(work, b, compute_seconds(DEVICE, work, b)) for work, b in works])
    assert vars(found) == pytest.approx(vars(DEVICE), rel=1e-6)


def test_a_fitted_link_is_the_one_that_made_the_measurements():
    seconds = {size: all_reduce_seconds(LINK, [size], 2) for size in (2**10, 2**16, 2**22)}
    assert vars(fit_link(seconds)) == pytest.approx(vars(LINK))


def test_one_worker_communicates_nothing():
    assert all_reduce_seconds(LINK, [2**20], 1) == 0


def test_an_all_reduce_sends_nearly_twice_the_gradients_with_many_workers():
    link = replace(LINK, latency_seconds=0.0)
    assert all_reduce_seconds(link, [10**9], 64) == pytest.approx(2 * 63 / 64)


def test_each_bucket_waits_for_the_link_once_for_every_doubling_of_workers():
    link = replace(LINK, bytes_per_second=math.inf)
    assert all_reduce_seconds(link, [1, 1], 8) == pytest.approx(2 * 2 * 3 * link.latency_seconds)
