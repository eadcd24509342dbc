"""What is exported to ONNX answers like torch, for any number of images or latents at once."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from aegan.config import ModelConfig
from aegan.networks import AEGAN
from aegan.onnx_export import NETWORKS, OPSET, export_onnx, plain_form

BATCHES = (1, 2, 3, 7, 64)
TOLERANCE = 1e-4  # of numbers about as large as 1
MODELS = {  # architecture, prior, image size, channels, and whether there is an encoder
    "demo": ("demo", "normal", 16, 3, True),
    "paper": ("paper", "normal", 48, 3, True),
    "classes": ("demo", "label(3) * normal(5)", 16, 3, True),
    "gray, of a gan": ("demo", "normal", 16, 1, False),
}
PRIORS = {
    "uniform": "uniform",
    "sphere": "sphere",
    "bernoulli": "bernoulli",
    "categorical": "categorical",
    "product": "categorical(3) * sphere(3) * uniform(2)",
}


@cache
def networks(architecture: str, prior: str, size: int, channels: int, encoder: bool) -> AEGAN:
    torch.manual_seed(0)
    config = ModelConfig(architecture=architecture, latent_dim=8, prior=prior, base_channels=4)
    model = AEGAN(config, image_size=size, image_channels=channels, encoder=encoder, packing=2)
    for parameter in model.parameters():  # biases and gains that are not those of a new network
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def answers(network: nn.Module, session: onnxruntime.InferenceSession, count: int) -> float:
    """The largest difference between a network and its export, for random inputs."""
    given = {
        known.name: torch.randn(count, *known.shape[1:]).clamp(-2, 2)
        for known in session.get_inputs()
    }
    expected = network(*given.values())
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    assert found.shape == tuple(expected.shape)
    return float((torch.from_numpy(found) - expected).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_every_network_answers_like_torch_at_any_batch(name: str, tmp_path: Path) -> None:
    model = networks(*MODELS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    files = export_onnx(model, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert list(files) == [n for n in NETWORKS if getattr(model, n) is not None]
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    for kind, file in files.items():
        written = onnx.load(file)
        assert [one.version for one in written.opset_import if one.domain == ""] == [OPSET]
        assert len(written.graph.node) < 80  # the training form of the paper's has 1,689
        session = onnxruntime.InferenceSession(file)
        known = [*session.get_inputs(), *session.get_outputs()]
        assert [one.shape[0] for one in known] == ["batch"] * len(known)
        assert all(isinstance(size, int) for one in known for size in one.shape[1:])
        network = getattr(model, kind)
        if kind == "encoder":
            network = nn.Sequential(network, Given(model))
        assert max(answers(network, session, count) for count in BATCHES) < TOLERANCE


class Given(nn.Module):
    """What `aegan.encode` does after E."""

    def __init__(self, model: AEGAN) -> None:
        super().__init__()
        self.prior = model.prior

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        return self.prior.given(output)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_the_encoder_gives_latents_of_the_models_prior(prior: str, tmp_path: Path) -> None:
    config = ModelConfig(architecture="demo", latent_dim=8, prior=prior, base_channels=4)
    model = AEGAN(config, image_size=16, image_channels=1, encoder=False, discriminators=False)
    model.encoder = nn.Sequential(nn.Conv2d(1, 8, 16), nn.Flatten())  # quick to export
    model.generator = None  # type: ignore[assignment]
    (file,) = export_onnx(model, tmp_path).values()
    session = onnxruntime.InferenceSession(file)
    network = nn.Sequential(model.encoder, Given(model))
    assert max(answers(network, session, count) for count in BATCHES) < TOLERANCE


@pytest.mark.parametrize("architecture", ["demo", "paper"])
@pytest.mark.parametrize("size", [16, 48, 64])
def test_the_form_that_is_exported_is_the_same_function(architecture: str, size: int) -> None:
    model = networks(architecture, "normal", size, 3, True)
    x, z = torch.randn(2, 3, size, size), torch.randn(2, 8)
    for name in NETWORKS:
        network = getattr(model, name)
        given = {"encoder": x, "image_discriminator": torch.cat([x, x], 1)}.get(name, z)
        torch.testing.assert_close(plain_form(network)(given), network(given), rtol=0, atol=2e-5)


def test_the_library_works_where_onnx_is_not_installed() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime')));"
        "import aegan, aegan.onnx_export, aegan.sampling"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
