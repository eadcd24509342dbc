"""Conditioning on the classes of images: G and D_x are told them, E is asked for them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import aegan
from aegan import operations
from aegan.config import ConfigError, ModelConfig, TrainConfig, check_classes
from aegan.data.dataset import load_labels, read_manifest
from aegan.data.reader import WINDOW_ROW_GROUPS, _read_ahead, resident_reader, streamed_reader
from aegan.losses import OBJECTIVES, encoder_generator_loss, make_fakes
from aegan.networks import AEGAN
from aegan.networks.projection import Projection
from aegan.priors import LabelPrior, make_prior
from aegan.training import checkpoint, start
from aegan.training.loop import train
from aegan.training.run_folder import RunFolder
from aegan.training.state import export_model
from aegan.training.updates import Discriminators
from tests.shards import write_shards
from tests.tiny import tiny_config

CPU = torch.device("cpu")
PRIOR = "label(2) * normal(2)"
NAMES = ("dark", "light")

pytestmark = pytest.mark.usefixtures("one_thread")


def dark_and_light(folder: Path, classes: tuple[str, ...] = NAMES) -> Path:
    """Images of random pixels, dark and light in turn."""
    random = np.random.default_rng(0)
    images = {}
    for split, rows in {"train": 40, "validation": 12, "test": 12}.items():
        pixels = random.integers(0, 64, (rows, 16, 16, 3))
        images[split] = (pixels + 192 * (np.arange(rows) % 2)[:, None, None, None]).astype(np.uint8)
    return write_shards(folder, images, classes=classes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return dark_and_light(tmp_path_factory.mktemp("shards"))


def run(config: TrainConfig, shards: Path, folder: Path, **keywords):
    return train(config, shards=shards, run_folder=folder, device=CPU, **keywords)


def tensors_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load(RunFolder(folder).checkpoint(step))[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards) -> Path:
    """A model folder after some training: it knows dark from light."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    config = tiny_config(prior=PRIOR, num_steps=100, learning_rate=2e-3)
    run(config, shards, folder / "run")
    export_model(RunFolder(folder / "run").checkpoint(100), folder / "model")
    return folder / "model"


# -- labels beside images --------------------------------------------------------------------------


def reader_ahead(*arguments, **keywords):
    return _read_ahead(streamed_reader(*arguments, **keywords), CPU)


@pytest.mark.parametrize("reader", [resident_reader, streamed_reader, reader_ahead])
@pytest.mark.parametrize("share", [slice(None), slice(3, 7)])
def test_a_reader_of_labels_gives_those_of_the_images_of_a_reader_of_images(
    tmp_path, reader, share
):
    rows = 16 * WINDOW_ROW_GROUPS * 2 + 5
    images = np.zeros((rows, 2, 2, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(rows) % 7
    shards = write_shards(tmp_path, {"train": images}, classes=tuple("abcdefg"))
    keywords = {"batch_size": 10, "share": share, "seed": 0, "device": CPU}
    read_images, read_labels = (
        reader(shards, **keywords, column=column) for column in ("image", "label")
    )
    for number in (0, 1, 17, 40, 3):
        labels = read_labels(number)
        assert labels.dtype == torch.int64
        assert torch.equal(read_images(number)[:, 0, 0, 0].long(), labels)


def test_latents_hold_a_label_in_its_place():
    prior = make_prior("normal(2) * label(3)", 5)
    assert prior.label == slice(2, 5)
    z = prior.sample(4, torch.Generator().manual_seed(0))
    told = prior.with_labels(z, torch.tensor([0, 2, 1, 1]))
    assert torch.equal(told[:, :2], z[:, :2])
    assert told[:, 2:].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert make_prior("label", 3) == LabelPrior(3)
    assert make_prior("normal", 3).label is None
    with pytest.raises(ValueError, match="no part called label"):
        make_prior("normal", 3).with_labels(z, torch.zeros(4, dtype=torch.int64))


# -- what each network is told ---------------------------------------------------------------------


def test_the_projection_adds_the_classs_vector_times_the_features_worked_out_by_hand():
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1))
    for parameter, value in zip(
        network.parameters(),
        ([[1.0, 0.0], [0.0, 2.0]], [0.0, 1.0], [[1.0, -1.0]], [0.5]),
        strict=True,
    ):
        parameter.data = torch.tensor(value)
    projection = Projection(network, num_classes=2)
    projection.of_class.weight.data = torch.tensor([[10.0, 0.0], [0.0, 100.0]])  # class 0, class 1
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # features [1, 5] and [3, 9]
    labels = torch.eye(2)
    by_hand = [[1 - 5 + 0.5 + 10 * 1], [3 - 9 + 0.5 + 100 * 9]]
    assert projection(x, labels).tolist() == by_hand
    both_kinds = projection(torch.cat([x, x.flip(0)]), labels)
    assert both_kinds.tolist() == [*by_hand, [3 - 9 + 0.5 + 10 * 3], [1 - 5 + 0.5 + 100 * 5]]
    double = projection.double()
    inputs = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: double(x, labels.double()), inputs)
    assert torch.autograd.gradgradcheck(lambda x: double(x, labels.double()), inputs)


@pytest.mark.parametrize("architecture", ["demo", "paper"])
def test_generator_and_discriminators_are_told_the_class_and_the_encoder_is_asked_for_it(
    architecture,
):
    torch.manual_seed(0)
    sizes = ModelConfig(architecture=architecture, latent_dim=4, prior=PRIOR, base_channels=4)
    model = AEGAN(sizes, image_size=16, image_channels=3)
    x, z = torch.rand(6, 3, 16, 16) * 2 - 1, torch.randn(6, 4)
    dark, light = (model.prior.with_labels(z, torch.full((6,), label)) for label in (0, 1))
    told = [
        (model.generator(latents), *Discriminators(model)(x, latents, labels=latents[:, :2]))
        for latents in (dark, light)
    ]
    assert all(not torch.allclose(one, other) for one, other in zip(*told, strict=True))

    objective = OBJECTIVES["aegan"]
    fakes = make_fakes(model.generator, model.encoder, x, dark, objective, prior=model.prior)
    _, values = encoder_generator_loss(
        lambda images, latents: (None, None),
        *(x, dark, fakes),
        objective=objective,
        weights=tiny_config().loss,
        prior=model.prior,
    )
    logits = fakes.z_hat_output[:, :2]
    expected = nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(values["label_prediction"], expected.detach())
    model.prior.label_distance(fakes.z_hat_output, dark).backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.generator.parameters())


def test_the_encoder_learns_to_tell_classes_and_the_generator_to_show_them(trained, shards):
    model = aegan.load(trained)
    assert model.classes == NAMES
    dark, light = (aegan.sample(model, 16, seed=0, label=name).float().mean() for name in NAMES)
    assert dark < 100 < 150 < light
    images = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (30, 220)])
    assert aegan.encode(model, images)[:, :2].tolist() == [[1, 0], [0, 1]]


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "training"),
    [
        ("resident", {}),
        ("streamed", {"loss": {"gamma": 1.0}}),
        ("streamed", {"update_rule": "reference"}),
        ("resident", {"arm": "gan", "loss": {"adversarial": "relativistic"}}),
        ("resident", {"arm": "aae"}),
    ],
)
def test_a_training_with_classes_resumes_exactly(shards, tmp_path, reader, training):
    config = tiny_config(prior=PRIOR, reader=reader, **training)
    run(config, shards, tmp_path / "whole")
    looks = iter(range(100))
    run(config, shards, tmp_path / "cut", should_stop=lambda: next(looks) >= 0)
    run(config, shards, tmp_path / "cut")
    whole, cut = (tensors_at(tmp_path / side, 8) for side in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    has_encoder = training.get("arm") != "gan"
    assert ("label_prediction" in RunFolder(tmp_path / "whole").rows()[-1]) == has_encoder


def test_micro_batches_are_told_their_own_classes(shards, tmp_path):
    config = tiny_config(prior=PRIOR, num_steps=2, loss={"gamma": 1.0})
    run(config, shards, tmp_path / "whole")
    run(config, shards, tmp_path / "parts", micro_batch_size=3)
    whole, parts = (tensors_at(tmp_path / side, 2) for side in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=2e-5, msg=name)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ((), "but the images have no classes: put them into one folder a class"),
        (tuple("abc"), "but the images have 3 classes: write label(3) and set model.latent_dim to"),
    ],
)
def test_other_classes_than_the_priors_are_refused_before_anything_is_written(
    tmp_path, classes, said
):
    shards = dark_and_light(tmp_path / "shards", classes)
    with pytest.raises(ConfigError) as raised:
        run(tiny_config(prior=PRIOR), shards, tmp_path / "run")
    assert said in str(raised.value)
    assert not (tmp_path / "run").exists()
    check_classes(tiny_config().model, classes)  # who asks for none takes any


@pytest.mark.parametrize("reader", ["resident", "streamed"])
def test_an_image_without_a_class_is_refused(tmp_path, reader):
    shards = dark_and_light(tmp_path / "shards")
    [shard] = read_manifest(shards)["splits"]["train"]["shards"]
    table = pq.read_table(shards / shard["file"])
    labels = pa.array([None, *load_labels(shards, "train")[1:].tolist()], pa.int64())
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, "label", labels), shards / shard["file"])
    with pytest.raises(ConfigError, match="there are images without a class"):
        run(tiny_config(prior=PRIOR, reader=reader), shards, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_of_a_model_of_other_classes_are_refused(trained, shards):
    config, manifest = tiny_config(prior=PRIOR), read_manifest(shards)
    assert start.read(trained, config, manifest).networks == ("generator", "encoder")
    other = {**manifest, "classes": ["cat", "dog"]}
    with pytest.raises(ConfigError, match=r"classes is \['dark', 'light'\] there and \['cat', "):
        start.read(trained, config, other)
    plain = replace(config, model=replace(config.model, prior="normal"))
    with pytest.raises(ConfigError, match=r"model.prior is label\(2\) \* normal\(2\) there"):
        start.read(trained, plain, manifest)


@pytest.mark.parametrize("classes", [["dark"], ["dark", 1], "dark", None, []])
def test_a_model_folder_with_other_classes_than_its_prior_is_refused(trained, tmp_path, classes):
    config = json.loads((trained / "config.json").read_text())
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"classes": classes}))
    with pytest.raises(aegan.ModelError, match="classes"):
        aegan.load(tmp_path)


def test_a_label_is_a_name_or_a_position_of_a_class_that_the_model_knows(trained):
    model = aegan.load(trained)
    by_name, by_position = (
        aegan.random_latents(model, 3, seed=1, label=label) for label in ("light", 1)
    )
    assert torch.equal(by_name, by_position)
    assert by_name[:, :2].tolist() == [[0, 1]] * 3
    for label in ("grey", 2, -1, 0.5):
        with pytest.raises(ValueError, match=f"label is {label}; expected"):
            aegan.sample(model, 1, seed=0, label=label)
    params = {"operation": "generate", "count": 2, "seed": 3}
    records = operations.operate(model, [], {**params, "label": "light"})
    assert [record["latent"][:2] for record in records] == [[0, 1]] * 2
    for label in ("lihgt", 1, None):
        with pytest.raises(operations.RequestError, match=r"params.label is .*one of dark, light"):
            operations.operate(model, [], {**params, "label": label})

    sizes = ModelConfig(architecture="demo", latent_dim=4, prior="normal", base_channels=1)
    plain = AEGAN(sizes, image_size=16, image_channels=3, discriminators=False).eval()
    with pytest.raises(ValueError, match="knows no classes"):
        aegan.sample(plain, 1, seed=0, label="light")
    with pytest.raises(
        operations.RequestError, match=r"params.label is given, but this model's prior"
    ):
        operations.operate(plain, [], {**params, "label": "light"})
