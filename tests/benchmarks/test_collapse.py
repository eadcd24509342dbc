import json
import math
from argparse import Namespace

import pytest
import torch

from benchmarks.collapse import faces, lines, stacked_mnist
from benchmarks.collapse.__main__ import main
from benchmarks.collapse.latents import codes_of, fit, samples_from_prior
from benchmarks.collapse.mixture_table import ARMS, controls, prepare, scored
from benchmarks.collapse.mixtures import MIXTURES, grid, ring
from benchmarks.collapse.networks import SeedNetwork, of_seed, packed
from benchmarks.collapse.objectives import LOSSES
from benchmarks.collapse.train import Batches, Trainer, flops_of_step, train, train_encoder
from benchmarks.rows import Results, as_table, mean_and_error
from pipelines.base.errors import UserError

SMALL = {"generator": 8, "discriminator": 6, "learning_rate": 1e-2}
POINTS = grid().sample(500, torch.Generator().manual_seed(0))


def test_scores_of_samples_counted_by_hand():
    on_two_modes = torch.tensor([[-4.0, -4.0], [-4.0, -3.86], [0.0, 2.1], [4.0, 4.16], [1.0, 1.0]])
    score = grid().score(on_two_modes)  # within .15: two of the first, one of the second mode
    assert score["modes"] == 2
    assert score["high_quality"] == pytest.approx(60)
    assert score["reverse_kl"] == pytest.approx(
        2 / 3 * math.log(2 / 3 * 25) + 1 / 3 * math.log(1 / 3 * 25)
    )


def test_samples_that_are_nowhere_have_the_worst_scores():
    score = ring().score(torch.zeros(7, 2))
    worst = {"modes": 0, "high_quality": 0, "reverse_kl": pytest.approx(math.log(8)), "spread": 0}
    assert score == worst


def test_the_spread_is_that_of_each_mode_about_its_own_mean_in_noises_of_the_mixture():
    points = torch.tensor([[0.0, 0.05], [0.0, -0.05], [4.0, 4.1], [4.0, 4.0], [9.0, 9.0]])
    squares = 2 * 0.05**2 + 2 * 0.05**2  # of two modes with two points each: two degrees of freedom
    assert grid().score(points)["spread"] == pytest.approx(math.sqrt(squares / 2 / 2) / 0.05)


def test_a_generator_with_one_point_for_each_mode_has_all_modes_and_no_spread():
    score = grid().score(grid().centres.repeat(100, 1) + 0.1)
    assert (score["modes"], score["high_quality"]) == (25, 100)
    assert score["spread"] == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def control_rows() -> dict[tuple[str, str], dict[str, float]]:
    """Means over three seeds, by mixture and control."""
    found = {}
    for name, latent_dim in (("ring", 2), ("grid", 2), ("1200d", 8)):
        mixture = MIXTURES[name]()
        points = mixture.sample(5_000, torch.Generator().manual_seed(0))
        rows = [*controls(mixture, points, range(3), latent_dim)]
        for control in dict.fromkeys(row["arm"] for row in rows):
            chosen = [row for row in rows if row["arm"] == control]
            assert len(chosen) == 3
            scores = chosen[0].keys() - {"arm", "seed"}
            found[name, control] = {
                score: sum(row[score] for row in chosen) / 3 for score in scores
            }
    return found


@pytest.mark.parametrize(
    ("name", "modes", "high_quality", "reverse_kl"),  # docs of the protocols; 1200D: chi-squared
    [("ring", 8, 98.9, 0.0014), ("grid", 25, 98.9, 0.0048), ("1200d", 10, 99.8, 0.0018)],
)
def test_the_mixture_itself_has_the_scores_of_a_perfect_sampler(
    control_rows, name, modes, high_quality, reverse_kl
):
    perfect = control_rows[name, "perfect sampler"]
    assert perfect["modes"] == modes
    assert perfect["high_quality"] == pytest.approx(high_quality, abs=0.3)
    assert perfect["reverse_kl"] == pytest.approx(reverse_kl, rel=0.6)
    assert perfect["spread"] == pytest.approx(1, abs=0.04)


def test_controls_say_what_modes_and_quality_are_worth_without_any_network(control_rows):
    blob = control_rows["grid", "one Gaussian"]
    assert blob["modes"] > 15  # by chance alone
    assert blob["high_quality"] < 3
    fitted = control_rows["grid", "components, fitted"]
    assert fitted["modes"] == 25
    assert fitted["high_quality"] > 97
    flat = control_rows["1200d", "components, fitted"]  # eight dimensions of 700 have noise
    assert flat["modes"] == 10
    assert flat["spread"] < 0.2


def test_a_row_belongs_to_its_seed_and_to_no_other():
    networks = SeedNetwork([2, 5, 3], [torch.Generator().manual_seed(s) for s in (3, 4)])
    rows = torch.randn(8, 2)
    changed = rows.clone()
    changed[1::2] += 1  # the second seed's
    before, after = networks(rows), networks(changed)
    assert torch.equal(of_seed(before, 0, 2), of_seed(after, 0, 2))
    assert not torch.equal(of_seed(before, 1, 2), of_seed(after, 1, 2))


def test_a_layer_is_a_linear_map_of_its_own_seed_and_a_maxout_unit_the_largest_piece():
    network = SeedNetwork(
        [2, 3, 1], [torch.Generator().manual_seed(s) for s in (0, 1)], maxout=True
    )
    rows = torch.randn(6, 2)
    first, last = network.hidden[0], network.last
    for seed in (0, 1):
        pieces = (rows[seed::2] @ first.weight[seed] + first.bias[seed]).unflatten(1, (5, 3))
        expected = pieces.amax(1) @ last.weight[seed] + last.bias[seed]
        torch.testing.assert_close(network(rows)[seed::2], expected)


def test_packing_joins_samples_of_one_seed():
    rows = torch.tensor([[0.0], [10.0], [1.0], [11.0], [2.0], [12.0], [3.0], [13.0]])
    expected = torch.tensor([[0.0, 1.0], [10.0, 11.0], [2.0, 3.0], [12.0, 13.0]])
    assert torch.equal(packed(rows, num_seeds=2, count=2), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("arm", ARMS)
def test_seeds_trained_together_are_seeds_trained_alone(arm, loss):
    def weights(seeds: list[int]) -> list[torch.Tensor]:
        networks, settings = prepare("grid", arm, loss, seeds, **SMALL, precision=torch.float64)
        trainer = Trainer(networks.double(), settings, len(seeds))
        batches = Batches(POINTS.double(), settings, seeds)
        for _ in range(3):  # of about .01 each
            x, z = batches.next()
            trainer.step(x, z.double())
        return [parameter.detach() for parameter in networks.parameters()]

    together, alone = weights([5, 1, 7]), weights([1])
    for of_three, of_one in zip(together, alone, strict=True):
        torch.testing.assert_close(of_three[1:2], of_one, rtol=0, atol=1e-8)


def test_all_arms_of_a_seed_begin_with_the_same_generator():
    generators = [
        prepare("grid", arm, "bce", [3], **SMALL)[0].generator.state_dict()
        for arm in ("gan", "aegan")
    ]
    for name, weight in generators[0].items():
        assert torch.equal(weight, generators[1][name])


def test_training_that_pauses_goes_on_where_it_was():
    def samples_at(*stops: int) -> list[torch.Tensor]:
        networks, settings = prepare("grid", "aegan", "bce", [0, 1], **SMALL)
        return [
            torch.cat(samples_from_prior(networks, 5))
            for _ in train(networks, POINTS, settings, seeds=[0, 1], stops=stops)
        ]

    after_two, after_four = samples_at(2, 4)
    assert not torch.equal(after_two, after_four)
    assert torch.equal(after_four, samples_at(4)[0])


def test_the_compute_of_a_step_is_counted_by_hand():
    networks, settings = prepare("grid", "gan", "bce", [0], **SMALL)
    generator = 2 * 8 + 3 * 8 * 8 + 8 * 2
    discriminator = 2 * 30 + 2 * 6 * 30 + 6
    batch_size = 100
    products = {  # forward, gradients of weights and of inputs; the last not where data come in
        "G": batch_size * (3 * generator - 2 * 8),
        "D on x and x_hat": 2 * batch_size * (3 * discriminator - 2 * 30),
        "D for G": batch_size * 2 * discriminator,
    }
    assert flops_of_step(networks, POINTS, settings) == 2 * sum(products.values())


def test_the_fitted_density_has_as_many_components_as_held_out_codes_ask_for():
    codes = torch.randn(5_000, 2, generator=torch.Generator().manual_seed(0)).double()
    assert fit(codes.numpy()).n_components == 1
    codes[::2] += 9
    assert fit(codes.numpy()).n_components == 2


def test_an_encoder_that_is_trained_afterwards_learns_and_leaves_the_generator_as_it_is():
    networks, settings = prepare("grid", "aegan", "bce", [0, 1], **SMALL)
    before = {name: weight.clone() for name, weight in networks.state_dict().items()}

    def error() -> float:
        with torch.no_grad():
            x = POINTS.repeat_interleave(2, 0)
            return float((networks.generator(networks.encoder(x)) - x).abs().mean())

    at_first = error()
    train_encoder(networks, POINTS, settings, seeds=[0, 1], steps=30)
    assert error() < at_first
    for name, weight in networks.state_dict().items():
        assert torch.equal(weight, before[name]) != name.startswith("encoder"), name


def test_codes_far_from_the_prior_are_told_from_it_always():
    networks, _ = prepare("grid", "aegan", "bce", [0, 1], **SMALL)
    networks.encoder.last.bias.data += 100
    assert {row["hole"] for row in scored(networks, grid(), POINTS.repeat(4, 1), [0, 1])} == {1.0}
    apart = codes_of(networks, POINTS)
    assert [codes.shape for codes in apart] == [(500, 2), (500, 2)]
    assert torch.equal(apart[1], of_seed(networks.encoder(POINTS.repeat_interleave(2, 0)), 1, 2))


def test_results_go_on_in_their_file_and_refuse_another_experiment(tmp_path):
    file = tmp_path / "results.json"
    Results(file, {"steps": 3}).add({"arm": "gan", "modes": [1.0]})
    assert Results(file, {"steps": 3}).find(arm="gan") == [{"arm": "gan", "modes": [1.0]}]
    with pytest.raises(UserError, match="other settings; name another file"):
        Results(file, {"steps": 4})


def test_results_hold_means_and_errors_of_each_line_of_the_table(tmp_path):
    file = tmp_path / "results.json"
    rows = [
        {"arm": "gan", "seed": 0, "modes": 1.0, "weights": "ema"},
        {"arm": "gan", "seed": 1, "modes": 3.0, "weights": "ema"},
        {"arm": "perfect", "modes": 8.0, "floor": 0.5},
    ]
    Results(file, {}, keys=("arm", "loss")).add(*rows)
    assert json.loads(file.read_text())["summary"] == [
        {
            "arm": "gan",
            "loss": None,
            "seeds": 2,
            "modes": {"mean": 2.0, "standard_error": pytest.approx(1.0)},
        },
        {
            "arm": "perfect",
            "loss": None,
            "seeds": 1,
            "modes": {"mean": 8.0, "standard_error": None},
            "floor": {"mean": 0.5, "standard_error": None},
        },
    ]
    assert as_table(rows, ("arm", "loss"), {"modes": 1, "floor": 2}).splitlines()[2:] == [
        "| gan |  | 2.0 ± 1.0 |  |",
        "| perfect |  | 8.0 | 0.50 |",
    ]


def test_mean_and_standard_error_by_hand():
    assert mean_and_error([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_error([4.0], 2) == "4.00"


def test_a_rendered_line_is_found_again_at_its_angle():
    angles = lines.evenly_spaced(lines.NUM_RENDERED)[::999]
    distance, found = lines.nearest(lines.render(angles))
    assert distance.abs().max() < 1e-5
    torch.testing.assert_close(found, angles, rtol=0, atol=2e-3)  # next-door lines look alike


def test_a_line_points_where_its_angle_says():
    right, up = lines.render(torch.tensor([0.0, math.pi / 2]))[:, 0] > 0
    assert right[15:17, 16:31].all()
    assert right.sum() == 2 * 15
    assert up[1:16, 15:17].all()
    assert up.sum() == 2 * 15


def test_both_numbers_of_the_lines_count():
    scores = lines.references()
    assert scores["true path"]["distance"] < 1e-5
    assert scores["true path"]["smoothness"] < 0.02
    assert scores["abrupt switch"]["distance"] < 1e-5
    assert scores["abrupt switch"]["smoothness"] == pytest.approx(1 - 1 / 15, abs=1e-4)
    assert scores["pixel blend"]["distance"] > 5e-3


def test_the_mode_of_a_stack_is_the_number_its_digits_make():
    class Brightness(torch.nn.Module):
        """Takes the value of the first pixel for the digit."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x[:, 0, 0, 0].long(), 10)

    images = torch.zeros(2, 3, 28, 28)
    images[0, :, 0, 0] = torch.tensor([4.0, 0.0, 7.0])
    images[1, :, 0, 0] = torch.tensor([0.0, 0.0, 9.0])
    assert stacked_mnist.mode_of(images, Brightness()).tolist() == [407, 9]


def test_modes_and_divergence_of_stacks_by_hand():
    score = stacked_mnist.score(torch.tensor([407, 407, 407, 9]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert score == {"modes": 2, "kl": pytest.approx(math.log(1000) - entropy)}


def test_a_folder_without_mnist_is_named_with_the_cure(tmp_path):
    with pytest.raises(UserError, match=r"holds no train-images.*; name the folder"):
        stacked_mnist.read_mnist(tmp_path, "train")


@pytest.mark.parametrize("arm", stacked_mnist.ARMS)
def test_convolutional_networks_of_an_arm_train_on_stacks(arm):
    stacks = torch.randint(256, (12, 3, 28, 28), dtype=torch.uint8)
    networks = stacked_mnist.Convolutional(arm, 2, 2)
    before = networks.generator[0].weight.clone()
    settings = stacked_mnist.settings_of(arm, "bce", learning_rate=1e-3)
    for _ in train(networks, stacks, settings, seeds=[0], stops=[1]):
        assert not torch.equal(networks.generator[0].weight, before)
    assert networks.generator(torch.zeros(1, stacked_mnist.LATENT_DIM)).shape == (1, 3, 28, 28)


def test_a_gan_of_stacks_goes_on_until_it_has_had_as_much_compute_as_aegan(monkeypatch):
    monkeypatch.setattr(stacked_mnist, "NUM_SAMPLES", 20)
    stacks = torch.randint(256, (12, 3, 28, 28), dtype=torch.uint8)
    options = Namespace(filters=2, discriminator_filters=2, loss="bce", learning_rate=1e-3, steps=2)

    def rows(arm: str) -> list[dict[str, float]]:
        classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10))
        return stacked_mnist.trained_rows(arm, stacks, classifier, 3, options)

    equal_steps, equal_compute = rows("gan")
    assert (equal_steps["steps"], equal_steps["seed"]) == (2, 3)
    assert equal_compute["steps"] > 2
    assert [row["steps"] for row in rows("aegan")] == [2]


def test_faces_of_both_arms_are_compared_seed_by_seed():
    scores = {"recall": 0.0, "coverage": 0.0, "ms_ssim": 0.4}
    rows = [
        {"set": "designed", "loss": "ours", "step": 9, "arm": arm, "seed": seed, **scores}
        | {"frechet_distance": distance}
        for arm, distances in (("gan", [60.0, 70.0, 80.0]), ("aegan", [40.0, 51.0, 59.0]))
        for seed, distance in reversed([*enumerate(distances)])
    ]
    [line] = faces.paired(rows).splitlines()[2:]
    assert line.startswith("| designed | ours | 9 | -20.0000 (p 0.001) |")
    assert faces.paired(rows[:4]) == faces.paired([])  # no arm alone, no single seed


def test_the_command_writes_every_row_once_and_prints_them_beside_the_controls(
    tmp_path, monkeypatch, capsys
):
    file = tmp_path / "grid.json"
    sizes = "--seeds 2 --steps 2 --generator-width 8 --discriminator-width 6"
    command = f"collapse grid {sizes} --loss bce --arm gan aegan --json {file}"
    monkeypatch.setattr("sys.argv", command.split())
    for _ in range(2):
        main()
    report = json.loads(file.read_text())
    lines_of = ["perfect sampler", "one Gaussian", "components, fitted"]
    lines_of += ["gan", "gan, encoder after", "gan", "aegan", "aegan"]
    assert [row["arm"] for row in report["summary"]] == lines_of
    assert [row["arm"] for row in report["rows"]] == [arm for arm in lines_of for _ in range(2)]
    assert {row["seed"] for row in report["rows"]} == {0, 1}
    steps, _, more_steps, *of_aegan = (row["steps"] for row in report["summary"][3:])
    assert [steps, *of_aegan] == [2, 2, 2]
    assert more_steps > 2
    as_much, aegan = (report["summary"][at]["teraflop"]["mean"] for at in (5, 6))
    assert as_much == pytest.approx(aegan, rel=0.2)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * (2 + len(lines_of))
    assert printed[: len(printed) // 2] == printed[len(printed) // 2 :]


def test_the_series_is_drawn_and_listed_by_width(tmp_path, monkeypatch, capsys):
    file, picture = tmp_path / "weak.json", tmp_path / "weak.png"
    sizes = "--seeds 2 --steps 1 --generator-width 8 --widths 6 3"
    command = f"collapse weak-discriminator {sizes} --json {file} --picture {picture}"
    monkeypatch.setattr("sys.argv", command.split())
    main()
    widths = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert widths == ["", "", ""] + ["3"] * 5 + ["6"] * 5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("join", lines.PATHS.values(), ids=lines.PATHS)
def test_a_path_of_lines_begins_and_ends_with_the_reconstructions_of_its_ends(join):
    options = Namespace(base_channels=1, learning_rate=1e-3, steps=1, lambdas=(30.0, 0.1))
    data = lines.render(lines.evenly_spaced(40))
    model = lines.train_model("aegan", data, 0, options)
    paths = lines.paths_of(model, join)
    assert paths.shape == (256, 16, 1, 32, 32)
    for frame, angles in zip((0, -1), lines.held_out_angles(), strict=True):
        with torch.no_grad():
            expected = model.generator(model.encoder(lines.render(angles)))
        torch.testing.assert_close(paths[:, frame], expected, rtol=0, atol=1e-4)


def test_a_path_that_leads_nowhere_has_the_smoothness_of_a_switch():
    still = lines.render(torch.tensor([1.0]))[None].repeat(2, 16, 1, 1, 1)
    assert lines.score(still)["smoothness"] == pytest.approx(1 - 1 / 15)
