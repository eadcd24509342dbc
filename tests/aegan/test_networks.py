import pytest
import torch
from scipy.stats import kstest, norm

from aegan.config import ModelConfig
from aegan.networks import AEGAN
from aegan.networks.noise import GaussianNoise

ARCHITECTURES = pytest.mark.parametrize("architecture", ["demo", "paper"])


def build(architecture: str, *, image_size: int = 16, channels: int = 3, width: int = 4) -> AEGAN:
    config = ModelConfig(
        architecture=architecture, latent_dim=5, prior="normal", base_channels=width
    )
    return AEGAN(config, image_size=image_size, image_channels=channels)


@ARCHITECTURES
@pytest.mark.parametrize("image_size", [16, 32, 48, 64, 96, 128, 192])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_ranges_fit_together_at_every_size(architecture, image_size, channels):
    model = build(architecture, image_size=image_size, channels=channels)
    x = model.generator(torch.randn(2, 5))
    assert x.shape == (2, channels, image_size, image_size)
    assert x.abs().max() <= 1
    z = model.encoder(x)
    assert z.shape == (2, 5)
    assert model.image_discriminator(x).shape == model.latent_discriminator(z).shape == (2, 1)


def test_the_paper_architecture_at_64_pixels_has_the_layers_of_the_paper():
    config = ModelConfig(architecture="paper", latent_dim=16, prior="normal", base_channels=64)
    model = AEGAN(config, image_size=64, image_channels=3)
    generator = [layer.weight.shape for layer in model.generator.convolutions]
    assert [shape[0] for shape in generator] == [256, 128, 128, 64, 64, 3]
    assert all(shape[2:] == (4, 4) for shape in generator)
    assert [layer.scale for layer in model.generator.convolutions] == [2, 2, 2, 2, 1, 1]
    for network, kernel in ((model.encoder, 4), (model.image_discriminator, 3)):
        layers = [layer for layer in network if hasattr(layer, "stride")]
        assert [layer.weight.shape[0] for layer in layers] == [64, 64, 128, 128, 128, 256]
        assert [layer.stride for layer in layers] == [2, 2, 2, 2, 1, 1]
        assert all(layer.weight.shape[2:] == (kernel, kernel) for layer in layers)
    dense = model.latent_discriminator.layers
    assert [layer.in_features for layer in dense] == [16 + 16 * i for i in range(16)]


@ARCHITECTURES
def test_no_layer_depends_on_the_rest_of_the_batch(architecture):
    model = build(architecture).eval()
    z = torch.randn(4, 5)
    x = model.generator(z)
    torch.testing.assert_close(x[:2], model.generator(z[:2]))
    torch.testing.assert_close(model.encoder(x)[:2], model.encoder(x[:2]))
    torch.testing.assert_close(model.image_discriminator(x)[:2], model.image_discriminator(x[:2]))


def test_the_papers_noise_is_there_in_training_only():
    model = build("paper")
    x = torch.rand(2, 3, 16, 16)
    for network in (model.encoder, model.image_discriminator):
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("multiplicative", [False, True])
def test_noise_has_the_standard_deviation_it_is_given(multiplicative):
    noise = GaussianNoise(0.1, multiplicative=multiplicative)
    torch.manual_seed(0)
    difference = noise(torch.full((10, 4, 50, 50), 3.0)) - 3.0
    expected = 0.3 if multiplicative else 0.1
    assert difference.std().item() == pytest.approx(expected, rel=0.02)
    assert difference.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_normal_and_independent(dtype):
    torch.manual_seed(0)
    noise = GaussianNoise(1.0)(torch.zeros(10, 4, 101, 99, dtype=dtype)).flatten().float()
    assert kstest(noise, norm.cdf).statistic < (0.004 if dtype == torch.float32 else 0.008)
    for lag in (1, 2, 3, 4, 8):
        assert abs(float((noise[lag:] * noise[:-lag]).mean())) < 0.01
    torch.manual_seed(0)
    again = GaussianNoise(1.0)(torch.zeros(10, 4, 101, 99, dtype=dtype)).flatten().float()
    assert torch.equal(noise, again)
