"""The public functions: what they say of arguments that do not fit; that they fit each other."""

import copy
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import aegan
from aegan.config import IMAGE_SIZES, ModelConfig
from aegan.networks.layers import winograd_from
from tests.plain import make_plain
from tests.trained import write_model

ROOT = Path(__file__).parent.parent.parent
LATENT_DIM = 8
LATENTS = torch.zeros(2, LATENT_DIM)
IMAGES = np.zeros((2, 16, 16, 3), np.uint8)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(*, channels: int = 3, encoder: bool = True) -> aegan.Model:
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="demo", latent_dim=LATENT_DIM, prior="normal", base_channels=4
    )
    model = aegan.Model(
        config, image_size=16, image_channels=channels, encoder=encoder, discriminators=False
    )
    return model.eval()


@pytest.fixture(scope="module", params=[1, 3], ids=["gray", "rgb"])
def model(request: pytest.FixtureRequest) -> aegan.Model:
    return build(channels=request.param)


@pytest.fixture(scope="module")
def rgb() -> aegan.Model:
    return build()


# -- arguments that do not fit --------------------------------------------------------------------

MISFITS: dict[str, tuple[Callable[[aegan.Model], Any], str]] = {
    "weights": (
        lambda model: aegan.load("nowhere", weights="best"),  # type: ignore[arg-type]
        "weights is best; it must be one of ema, raw",
    ),
    "kind of path": (
        lambda model: aegan.interpolate(model, LATENTS, LATENTS, num_frames=3, path="cubic"),  # type: ignore[arg-type]
        "path is cubic; it must be one of slerp, linear",
    ),
    "one frame": (
        lambda model: aegan.interpolate(model, LATENTS, LATENTS, num_frames=1),
        "num_frames is 1; expected a whole number, 2 or more",
    ),
    "ends of different number": (
        lambda model: aegan.interpolate(model, LATENTS, LATENTS[:1], num_frames=3),
        "start is float32 [2, 8], end is float32 [1, 8]; expected float [..., D]",
    ),
    "floats to encode": (
        lambda model: aegan.encode(model, torch.zeros(2, 16, 16, 3)),
        "images is float32 [2, 16, 16, 3]; expected uint8 [N, 16, 16, 3]",
    ),
    "channels first": (
        lambda model: aegan.reconstruct(model, torch.zeros(2, 3, 16, 16, dtype=torch.uint8)),
        "images is uint8 [2, 3, 16, 16]; expected uint8 [N, 16, 16, 3]",
    ),
    "images of another size": (
        lambda model: aegan.encode(model, np.zeros((2, 32, 32, 3), np.uint8)),
        "images is uint8 [2, 32, 32, 3]; expected uint8 [N, 16, 16, 3]",
    ),
    "gray for an RGB model": (
        lambda model: aegan.encode(model, IMAGES[..., :1]),
        "images is uint8 [2, 16, 16, 1]; expected uint8 [N, 16, 16, 3]",
    ),
    "a single image": (
        lambda model: aegan.encode(model, IMAGES[0]),
        "images is uint8 [16, 16, 3]; expected uint8 [N, 16, 16, 3]: of a single one, images[None]",
    ),
    "a list of images": (
        lambda model: aegan.encode(model, list(IMAGES)),  # type: ignore[arg-type]
        "images is a list; expected a tensor or an array",
    ),
    "words": (
        lambda model: aegan.encode(model, np.array(["a.png"])),
        "images is <U5; expected an array of numbers",
    ),
    "no encoder": (
        lambda model: aegan.encode(build(encoder=False), IMAGES),
        "this model has no encoder: it was trained as a plain GAN (training.arm)",
    ),
    "latents of another length": (
        lambda model: aegan.decode(model, torch.zeros(2, 9)),
        "latents is float32 [2, 9]; expected float32 [N, 8]",
    ),
    "a single latent": (
        lambda model: aegan.decode(model, LATENTS[0]),
        "latents is float32 [8]; expected float32 [N, 8]: of a single one, latents[None]",
    ),
    "whole numbers as latents": (
        lambda model: aegan.decode(model, LATENTS.long()),
        "latents is int64 [2, 8]; expected float32 [N, 8]",
    ),
    "a folder as the model": (
        lambda model: aegan.sample("artifacts/train/model", 1, seed=0),  # type: ignore[arg-type]
        "model is a str; expected what aegan.load returns",
    ),
    "the arguments swapped": (
        lambda model: aegan.read_images(model, ["a.png"]),  # type: ignore[arg-type]
        "model is a list; expected what aegan.load returns",
    ),
    "networks that no folder describes": (
        lambda model: aegan.read_images(
            ["a.png"],
            aegan.AEGAN(  # type: ignore[arg-type]
                ModelConfig(architecture="demo", latent_dim=4, prior="normal", base_channels=4),
                image_size=16,
                image_channels=3,
            ),
        ),
        "model is a AEGAN; expected what aegan.load returns",
    ),
    "a count of 0": (
        lambda model: aegan.sample(model, 0, seed=0),
        "count is 0; expected a whole number, 1 or more",
    ),
    "a negative count": (
        lambda model: aegan.random_latents(model, -1, seed=0),
        "count is -1; expected a whole number, 1 or more",
    ),
    "a size instead of a model": (
        lambda model: aegan.random_latents(8, 1, seed=0),  # type: ignore[arg-type]
        "model is a int; expected what aegan.load returns",
    ),
    "a seed that is a float": (
        lambda model: aegan.sample(model, 1, seed=0.5),  # type: ignore[arg-type]
        f"seed is 0.5; expected a whole number, 0 to {2**63 - 1}",
    ),
    "a negative seed": (
        lambda model: aegan.sample(model, 1, seed=-1),
        f"seed is -1; expected a whole number, 0 to {2**63 - 1}",
    ),
    "a single path": (
        lambda model: aegan.read_images("a.png", model),
        "paths is one path, a.png; expected a list of paths",
    ),
    "a single Path": (
        lambda model: aegan.read_images(Path("a.png"), model),  # type: ignore[arg-type]
        "paths is one path, a.png; expected a list of paths",
    ),
    "no paths": (
        lambda model: aegan.read_images([], model),
        "paths is empty; expected at least one image file",
    ),
    "a place that is no list": (
        lambda model: aegan.lerp(LATENTS, LATENTS, torch.tensor(0.5)),
        "t is float32 []; expected shares of the way [T]",
    ),
    "whole numbers as ends": (
        lambda model: aegan.slerp(LATENTS.int(), LATENTS.int(), torch.zeros(1)),
        "start is int32 [2, 8], end is int32 [2, 8]; expected float [..., D]",
    ),
    "a grid of one image": (
        lambda model: aegan.grid(IMAGES[0], columns=1),
        "images is uint8 [16, 16, 3]; expected uint8 [N, H, W, C], C 1 or 3",
    ),
    "a grid of floats": (
        lambda model: aegan.grid(IMAGES / 255, columns=1),
        "images is float64 [2, 16, 16, 3]; expected uint8 [N, H, W, C], C 1 or 3",
    ),
    "a grid of images of two sizes": (
        lambda model: aegan.grid([IMAGES[0], IMAGES[0, :8]], columns=1),
        "images are no images of one shape; expected uint8 [N, H, W, C]",
    ),
    "a grid of nothing": (
        lambda model: aegan.grid(IMAGES[:0], columns=1),
        "images is empty, [0, 16, 16, 3]; expected at least one pixel",
    ),
    "no columns": (
        lambda model: aegan.grid(IMAGES, columns=0),
        "columns is 0; expected a whole number, 1 or more",
    ),
    "a negative gap": (
        lambda model: aegan.grid(IMAGES, columns=1, gap=-1),
        "gap is -1; expected a whole number, 0 or more",
    ),
    "a batch as one picture": (
        lambda model: aegan.save_png(IMAGES, "x.png"),
        "image is uint8 [2, 16, 16, 3]; expected uint8 [H, W, C], C 1 or 3",
    ),
    "another format": (
        lambda model: aegan.save_png(IMAGES[0], "x.jpg"),
        "path is x.jpg; expected a name that ends in .png",
    ),
    "no format": (
        lambda model: aegan.save_png(IMAGES[0], Path("x")),
        "path is x; expected a name that ends in .png",
    ),
    "half a pixel": (
        lambda model: aegan.save_png(IMAGES[0], "x.png", scale=0.5),  # type: ignore[arg-type]
        "scale is 0.5; expected a whole number, 1 or more",
    ),
    "an animation of one picture": (
        lambda model: aegan.save_animation(IMAGES[0], "x.webp", frames_per_second=9),
        "frames is uint8 [16, 16, 3]; expected uint8 [T, H, W, C], C 1 or 3",
    ),
    "an animation of paths": (
        lambda model: aegan.save_animation(IMAGES[None], "x.webp", frames_per_second=9),
        "frames is uint8 [1, 2, 16, 16, 3]; expected uint8 [T, H, W, C], C 1 or 3",
    ),
    "another format of animation": (
        lambda model: aegan.save_animation(IMAGES, "x.avi", frames_per_second=9),
        "path is x.avi; expected a name that ends in .webp or .gif or .mp4",
    ),
    "an animation that stands still": (
        lambda model: aegan.save_animation(IMAGES, "x.webp", frames_per_second=0),
        "frames_per_second is 0; expected above 0, at most 1000",
    ),
    "networks of no size": (
        lambda model: aegan.AEGAN(
            ModelConfig(architecture="demo", latent_dim=0, prior="normal", base_channels=4),
            image_size=16,
            image_channels=3,
        ),
        "model.latent_dim is 0; it must be 1 or more and at most 65536",
    ),
    "networks of no kind": (
        lambda model: aegan.AEGAN(
            ModelConfig(architecture="large", latent_dim=4, prior="normal", base_channels=4),  # type: ignore[arg-type]
            image_size=16,
            image_channels=3,
        ),
        "model.architecture is 'large'; allowed: demo, paper",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_argument_that_does_not_fit_is_one_sentence(
    name: str, rgb: aegan.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, sentence = MISFITS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call(rgb)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_usable_image_is_named(rgb: aegan.Model, tmp_path: Path) -> None:
    aegan.save_png(IMAGES[0], tmp_path / "sound.png")
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("words.png", "not an image"),
        ("missing.png", "No such file or directory"),
        ("folder.png", "Is a directory"),
    ):
        sentence = f"^{re.escape(str(tmp_path / name))}: {reason}"
        with pytest.raises(aegan.UnusableImageError, match=sentence):
            aegan.read_images([tmp_path / "sound.png", str(tmp_path / name)], rgb)


def test_every_error_of_the_library_is_a_value_error() -> None:
    names = {name for name in aegan.__all__ if name.endswith("Error")}
    assert names == {"ConfigError", "ModelError", "UnusableImageError"}
    assert all(issubclass(getattr(aegan, name), ValueError) for name in names)
    assert all(name in (aegan.__doc__ or "") for name in names)


# -- functions fit each other ---------------------------------------------------------------------


def test_every_function_takes_what_the_others_return(model: aegan.Model, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    images = aegan.sample(model, 3, seed=1)
    aegan.save_png(images[0], str(folder / "one.png"))
    assert torch.equal(aegan.read_images([str(folder / "one.png")], model), images[:1])
    read = aegan.read_images([folder / "one.png"], model)
    assert torch.equal(
        aegan.reconstruct(model, read), aegan.decode(model, aegan.encode(model, read))
    )
    latents = aegan.random_latents(model, 2, seed=3)
    frames = aegan.interpolate(model, latents, latents.flip(0), num_frames=4)
    aegan.save_animation(frames[0], str(folder / "path.webp"), frames_per_second=12.5)
    with Image.open(folder / "path.webp") as animation:
        assert animation.n_frames == 6  # there and back
    assert aegan.encode(model, frames).shape == (2, 4, LATENT_DIM)
    walk = aegan.slerp(latents, latents.flip(0), torch.linspace(0, 1, 4))
    assert torch.equal(aegan.decode(model, walk), frames)
    rows = aegan.grid(frames, columns=4)
    assert np.array_equal(rows, aegan.grid(frames.flatten(0, 1).numpy(), columns=4))
    assert np.array_equal(rows[: 16 + 4], aegan.grid(frames[0], columns=4))
    assert np.array_equal(aegan.grid(list(frames[0]), columns=4), aegan.grid(frames[0], columns=4))
    aegan.save_png(rows, folder / "rows.PNG", scale=2)
    with Image.open(folder / "rows.PNG") as picture:
        assert picture.size == (2 * rows.shape[1], 2 * rows.shape[0])
    assert sorted(file.name for file in folder.iterdir()) == ["one.png", "path.webp", "rows.PNG"]


def test_arrays_give_what_tensors_give(model: aegan.Model) -> None:
    images = aegan.sample(model, 3, seed=1)
    latents = aegan.encode(model, images)
    array = latents.numpy().astype(">f8")  # big-endian, as FITS files are
    array.setflags(write=False)
    assert torch.equal(aegan.encode(model, images.numpy()), latents)
    mirrored = aegan.encode(model, images.flip(2))
    assert torch.equal(aegan.encode(model, images.numpy()[:, :, ::-1]), mirrored)
    assert torch.equal(aegan.decode(model, array), aegan.decode(model, latents))
    assert torch.equal(
        aegan.interpolate(model, array[:1], array[1:2], num_frames=3),
        aegan.interpolate(model, latents[:1], latents[1:2], num_frames=3),
    )
    t = np.linspace(0, 1, 3)
    for walk in (aegan.slerp, aegan.lerp):
        expected = walk(latents[0].double(), latents[1].double(), torch.from_numpy(t))
        assert torch.equal(walk(array[0], array[1], t), expected)


def test_an_empty_batch_gives_an_empty_batch(model: aegan.Model) -> None:
    images = aegan.decode(model, LATENTS[:0])
    assert images.shape == (0, 16, 16, model.image_channels)
    assert aegan.encode(model, images).shape == (0, LATENT_DIM)


def python_in(file: str) -> str:
    """The Python examples of a page, one after another."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL))


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_examples_of_the_library_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "artifacts/train/model")
    for name in ("a.png", "b.jpg"):
        Image.effect_noise((30, 20), 50).save(tmp_path / name)
    exec(python_in(page), {})
    with Image.open("path.png") as picture:
        assert picture.width >= 10 * 16


# -- sides of 3 x 2^n -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["demo", "paper"])
@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_networks_of_every_allowed_side_make_and_read_images_of_it(
    architecture: Any, image_size: int
) -> None:
    config = ModelConfig(architecture=architecture, latent_dim=5, prior="normal", base_channels=1)
    model = aegan.AEGAN(config, image_size=image_size, image_channels=3)
    with torch.no_grad():
        x = model.generator(torch.zeros(1, 5))
        assert x.shape == (1, 3, image_size, image_size)
        assert model.encoder is not None
        assert model.encoder(x).shape == (1, 5)
        assert model.image_discriminator is not None
        assert model.image_discriminator(x).shape == (1, 1)


@pytest.mark.parametrize("architecture", ["demo", "paper"])
@pytest.mark.parametrize("image_size", [48, 96, 192])
def test_a_side_of_3_x_2_to_the_n_has_the_layers_of_the_next_power_of_two(
    architecture: Any, image_size: int
) -> None:
    config = ModelConfig(architecture=architecture, latent_dim=5, prior="normal", base_channels=4)
    shapes = []
    for side in (image_size, image_size // 3 * 4):
        with torch.device("meta"):
            model = aegan.AEGAN(config, image_size=side, image_channels=3)
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
    assert shapes[0].keys() == shapes[1].keys()
    differing = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    at_the_smallest_map = {name for name in differing if "stem." in name or ".weight" in name}
    assert differing == at_the_smallest_map
    assert len(differing) == 4  # the generator's first map; the last linear maps of E and D_x


@pytest.mark.parametrize(
    ("architecture", "image_size"), [("demo", 48), ("paper", 48), ("paper", 96)]
)
def test_fast_networks_of_a_side_of_3_x_2_to_the_n_equal_the_plain_ones(
    architecture: Any, image_size: int
) -> None:
    config = ModelConfig(architecture=architecture, latent_dim=5, prior="normal", base_channels=4)
    fast = aegan.AEGAN(config, image_size=image_size, image_channels=3).double().eval()
    plain = copy.deepcopy(fast)
    make_plain(plain)
    fast.to(memory_format=torch.channels_last)
    z = torch.randn(2, 5, dtype=torch.float64)
    derivatives = []
    for model in (fast, plain):
        assert model.encoder is not None
        assert model.image_discriminator is not None
        with winograd_from(1):  # every fast form, on a 3x3 map too
            x = model.generator(z)
        outputs = [x, model.encoder(x), model.image_discriminator(x)]
        loss = sum((out.square().mean() for out in outputs), torch.zeros(()))
        used = [p for name, p in model.named_parameters() if "latent_discr" not in name]
        derivatives.append([*outputs, *torch.autograd.grad(loss, used)])
    for ours, reference in zip(*derivatives, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.integers(-5, 3000))
def test_a_side_that_no_networks_have_is_refused(image_size: int) -> None:
    config = ModelConfig(architecture="demo", latent_dim=5, prior="normal", base_channels=1)
    allowed = [n * 2**k for n in (1, 3) for k in range(4, 11) if n * 2**k <= 1024]
    with torch.device("meta"):
        if image_size in allowed:
            aegan.AEGAN(config, image_size=image_size, image_channels=3)
            return
        with pytest.raises(aegan.ConfigError, match=f"image_size is {image_size}; allowed: 16, "):
            aegan.AEGAN(config, image_size=image_size, image_channels=3)


def test_the_allowed_sides_ascend() -> None:
    assert all(smaller < larger for smaller, larger in pairwise(IMAGE_SIZES))
    assert all(side % 16 == 0 for side in IMAGE_SIZES)  # areas of the near-duplicate search
