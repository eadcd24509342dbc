import pytest
import torch
from torch import nn

from aegan.training.ema import RAMP, ema_decay, update_ema


def test_after_the_half_life_half_of_the_old_average_is_left():
    decay = ema_decay(32, 640, images_shown=10**9)
    assert decay ** (640 / 32) == pytest.approx(0.5)


def test_early_averages_forget_faster_and_the_first_one_is_the_weights_themselves():
    assert ema_decay(32, 10_000, images_shown=0) == 0
    assert ema_decay(32, 10_000, images_shown=1_000) == ema_decay(32, RAMP * 1_000, 10**9)


def test_the_average_follows_its_own_networks_and_ignores_others():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "other": nn.Linear(3, 3)})
    average = nn.ModuleDict({"a": nn.Linear(2, 2)})
    before = average["a"].weight.detach().clone()
    update_ema(average, module, 0.75)
    expected = 0.75 * before + 0.25 * module["a"].weight.detach()
    torch.testing.assert_close(average["a"].weight.detach(), expected)


def test_buffers_are_copied_not_averaged():
    module, average = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    module(torch.randn(8, 2))
    update_ema(average, module, 0.75)
    assert torch.equal(average.running_mean, module.running_mean)
    assert average.num_batches_tracked == 1
