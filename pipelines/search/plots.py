"""Pictures of a finished search: slices, parallel coordinates, importance (docs/tuning.md).

Not those of `optuna.visualization.matplotlib` 5.0: with several objectives its importances stand at
the names of other settings, in the other two names and ticks cover each other, and none marks
params.yaml and the trials that were stopped early.
"""

import logging
import math
from pathlib import Path

import numpy as np
import optuna
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from aegan.config import SearchRange
from pipelines.search.trial import Trial

COLOURS = colormaps["viridis"]  # dark is good
MIN_TRIALS_FOR_IMPORTANCE = 4

log = logging.getLogger(__name__)


def draw(
    trials: list[Trial],
    search: dict[str, SearchRange],
    objectives: tuple[str, ...],
    folder: Path,
) -> None:
    """Write the three pictures as PNG; trials that diverged before any score are left out."""
    scored = [
        trial
        for trial in trials
        if all(math.isfinite(trial.scores.get(name, math.inf)) for name in objectives)
    ]
    figures = {
        "slices": _slices(scored, search, objectives),
        "parallel_coordinates": _parallel_coordinates(scored, search, objectives),
        "importance": _importance(scored, search, objectives),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)


def _slices(
    trials: list[Trial], search: dict[str, SearchRange], objectives: tuple[str, ...]
) -> Figure:
    """Each objective against each setting."""
    figure = Figure(figsize=(2.4 * len(search), 2.6 * len(objectives) + 0.5), layout="constrained")
    axes = figure.subplots(len(objectives), len(search), sharey="row", sharex="col", squeeze=False)
    for row, objective in zip(axes, objectives, strict=True):
        scale = "log" if all(trial.scores[objective] > 0 for trial in trials) else "linear"
        for ax, (name, between) in zip(row, search.items(), strict=True):
            for trial in trials:
                ended = trial.ended == "finished"
                ax.plot(
                    trial.settings[name],
                    trial.scores[objective],
                    marker="*" if trial.number == 0 else "o",
                    markersize=13 if trial.number == 0 else 6,
                    color="C1" if trial.number == 0 else "C0",
                    fillstyle="full" if ended else "none",
                    clip_on=False,
                )
            ax.set(xscale=between.scale, yscale=scale, xlim=(between.low, between.high))
            ax.grid(alpha=0.3)
        row[0].set_ylabel(f"{objective} (lower is better)", fontsize=8)
    for ax, name in zip(axes[-1], search, strict=True):
        ax.set_xlabel(_short(name), fontsize=8)
    for ax in axes.flat:
        ax.tick_params(labelsize=7, which="both")
        ax.xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(
        "full: trained to the end, hollow: stopped early, star: params.yaml", fontsize=9
    )
    return figure


def _parallel_coordinates(
    trials: list[Trial], search: dict[str, SearchRange], objectives: tuple[str, ...]
) -> Figure:
    """A line for each trial through its settings to its scores."""
    columns = [*search, *objectives]
    scores = {name: np.array([trial.scores[name] for trial in trials]) for name in objectives}
    ranges = dict(search)
    for name, values in scores.items():
        low, high = float(values.min()) * 0.97, float(values.max()) * 1.03 + 1e-6
        ranges[name] = SearchRange(low=low, high=high, scale="log" if low > 0 else "linear")
    figure = Figure(figsize=(1.75 * len(columns) + 1, 4.2), layout="constrained")
    ax = figure.add_subplot()
    norm = LogNorm(ranges[objectives[0]].low, ranges[objectives[0]].high)
    for trial in sorted(trials, key=lambda trial: -trial.scores[objectives[0]]):
        point = {**trial.settings, **trial.scores}
        ax.plot(
            range(len(columns)),
            [_position(point[name], ranges[name]) for name in columns],
            color=COLOURS(norm(trial.scores[objectives[0]])),
            linewidth=2.2 if trial.ended == "finished" else 1,
            linestyle=(0, (4, 2)) if trial.number == 0 else "-",
            alpha=1 if trial.ended == "finished" or trial.number == 0 else 0.6,
        )
    for column, name in enumerate(columns):
        ax.axvline(column, color="black", linewidth=0.8)
        for position in (0, 0.5, 1):
            value = _value(position, ranges[name])
            ax.text(column + 0.03, position, f"{value:.2g}", fontsize=7, va="center")
    ax.set(ylim=(-0.04, 1.04), xlim=(-0.1, len(columns) - 0.6), yticks=[])
    ax.set_xticks(range(len(columns)), [_short(name) for name in columns], fontsize=8)
    ax.spines[:].set_visible(False)
    ax.set_title(
        "a line is a trial, dark is good; thick: trained to the end, dashed: params.yaml",
        fontsize=9,
    )
    return figure


def _importance(
    trials: list[Trial], search: dict[str, SearchRange], objectives: tuple[str, ...]
) -> Figure:
    """Share of each score's variance that each setting explains alone or with others (fANOVA).

    Of the scores at the last step that all trials reached: later ones say more of who was stopped.
    """
    figure = Figure(figsize=(6.5, 0.32 * len(search) * len(objectives) + 1.4), layout="constrained")
    ax = figure.add_subplot()
    spaces: dict[str, BaseDistribution] = {
        name: FloatDistribution(between.low, between.high, log=between.scale == "log")
        for name, between in search.items()
    }
    inside = [
        trial
        for trial in trials
        if all(spaces[name]._contains(value) for name, value in trial.settings.items())
    ]
    common = set.intersection(*(set(trial.history) for trial in inside)) if inside else set()
    if len(inside) < MIN_TRIALS_FOR_IMPORTANCE or not common:
        ax.set_axis_off()
        ax.text(0.5, 0.5, f"{len(inside)} trials are too few to weigh settings", ha="center")
        return figure
    step = max(common)
    height = 0.8 / len(objectives)
    for i, objective in enumerate(objectives):
        study = optuna.create_study()
        for trial in inside:
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.settings,
                    distributions=spaces,
                    value=trial.history[step][objective],
                )
            )
        weights = dict.fromkeys(search, 0.0)
        if len({trial.history[step][objective] for trial in inside}) > 1:
            weights = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        positions = np.arange(len(search)) + i * height
        ax.barh(positions, [weights[name] for name in search], height=height, label=objective)
    ax.set_yticks(np.arange(len(search)) + 0.4 - height / 2, list(search), fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("importance (shares of the variance, fANOVA)", fontsize=8)
    ax.set_title(f"{len(inside)} trials at step {step}, the last that all reached", fontsize=9)
    if len(objectives) > 1:
        ax.legend(fontsize=8)
    return figure


def _position(value: float, between: SearchRange) -> float:
    """Where a value lies in its range, 0 to 1."""
    if between.scale == "log":
        return math.log(value / between.low) / math.log(between.high / between.low)
    return (value - between.low) / (between.high - between.low)


def _value(position: float, between: SearchRange) -> float:
    if between.scale == "log":
        return float(between.low * (between.high / between.low) ** position)
    return between.low + position * (between.high - between.low)


def _short(name: str) -> str:
    """loss.lambda_image_reconstruction => lambda image\nreconstruction"""
    words = name.partition(".")[2] or name
    head, _, tail = words.replace("_", " ").rpartition(" ")
    return f"{head}\n{tail}" if head else tail
