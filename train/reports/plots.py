"""Plots of a run, each as PNG and SVG: learning curves, comparisons and attention maps."""

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from train.reports.style import BLUE, COLORS, FONT, GREY, ORANGE, STYLE, entitle, save

Rows = Sequence[Mapping[str, Any]]
Numbers = NDArray[np.float64]

_CELL, _LABEL = 0.22, 0.12  # inches per token, and minimum inches per label
_LONGEST_LABEL = 14  # letters


def learning_curves(metrics: Iterable[Mapping[str, Any]], path_stem: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws losses, scores and learning rate over the steps, each in its own panel if there are values for it.

    Args:
        metrics: rows as in metrics.jsonl. Rows of kind "train" have `loss` in nats per token and `learning_rate`. Rows
            of kind "validation" have `loss` and scores, such as `exact_match` from 0 to 1 and `bleu` from 0 to 100.
        path_stem: the path of the picture without a suffix.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ValueError: no row has a value to draw.
    """
    rows = list(metrics)
    wanted = [(_draw_losses, 3.0, ("loss",)), (_draw_scores, 2.0, _SCORES), (_draw_rate, 1.2, ("learning_rate",))]
    panels = [(draw, height) for draw, height, names in wanted if any(name in row for row in rows for name in names)]
    if not panels:
        raise ValueError(f"{path_stem}: none of {len(rows)} rows of metrics holds a loss, a score or a learning rate")
    heights = [height for _, height in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, sum(heights) + 0.6), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for (draw, _), ax in zip(panels, axes, strict=True):
            draw(ax, rows)
            ax.grid(True)
        axes[-1].set_xlabel("step")
        return save(figure, path_stem)


def compared_curves(
    runs: Mapping[str, Iterable[Mapping[str, Any]]], path_stem: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Draws several runs in one picture, one color each: training and validation losses, and scores.

    Args:
        runs: rows of metrics as for `learning_curves`, by the name of the run; 1 to 8 runs.
        path_stem: the path of the picture without a suffix.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ValueError: there are no runs or too many, or a run has no loss.
    """
    if not 1 <= len(runs) <= len(COLORS):
        raise ValueError(f"a picture compares 1 to {len(COLORS)} runs, got {len(runs)}")
    found = {name: list(rows) for name, rows in runs.items()}
    empty = [name for name, rows in found.items() if not any("loss" in row for row in rows)]
    if empty:
        raise ValueError(f"{empty[0]} holds no loss to draw")
    validated = {name for rows in found.values() for row in rows if row.get("kind") == "validation" for name in row}
    panels = [("train", "loss", "training loss (nats)", 1.0)]
    panels += [("validation", "loss", "validation loss (nats)", 1.0)] if "loss" in validated else []
    panels += [("validation", name, label, scale) for name, (label, scale, _) in _SCORES.items() if name in validated]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 2.4 * len(panels) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for ax, (kind, name, height, scale) in zip(axes, panels, strict=True):
            for (label, rows), color in zip(found.items(), COLORS, strict=False):
                steps, values = _series(rows, kind, name)
                shown = _smooth(values) if kind == "train" else values
                ax.plot(steps, scale * shown, "-" if kind == "train" else "o-", color=color, markersize=3, label=label)
            ax.set_ylabel(height)
            ax.grid(True)
        axes[0].legend()
        axes[-1].set_xlabel("step")
        return save(figure, path_stem)


def line_chart(
    lines: Mapping[str, Mapping[int, float]],
    path_stem: str | os.PathLike[str],
    *,
    x: str,
    y: str,
    limits: tuple[float, float] | None = None,
) -> tuple[Path, Path]:
    """Draws a line chart.

    Args:
        lines: y values by x value for each line, by the name of the line; 1 to 8 lines.
        path_stem: the path of the picture without a suffix.
        x: the label of the x axis.
        y: the label of the y axis.
        limits: the lower and upper limit of the y axis; by default from the data.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ValueError: there are no lines or too many.
    """
    if not 1 <= len(lines) <= len(COLORS):
        raise ValueError(f"a chart takes 1 to {len(COLORS)} lines, got {len(lines)}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        ax = figure.subplots()
        for (name, heights), color in zip(lines.items(), COLORS, strict=False):
            ax.plot(list(heights), list(heights.values()), "o-", color=color, markersize=3, label=name)
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.set_ylim(limits)
        ax.grid(True)
        ax.legend()
        return save(figure, path_stem)


def attention_map(
    weights: ArrayLike,
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    path_stem: str | os.PathLike[str],
    *,
    title: str = "",
) -> tuple[Path, Path]:
    """Draws attention weights as a heat map: source tokens from left to right, target tokens from top to bottom.

    Labels that would overlap are left out. A character that no installed font has is shown as its code point, such as
    U+65E5.

    Args:
        weights: attention weights `[T, S]`, or `[N, T, S]` for a grid of N heads with a common color scale.
        source_tokens: the S source tokens as strings.
        target_tokens: the T target tokens as strings.
        path_stem: the path of the picture without a suffix.
        title: the title of the picture, wrapped if it is long.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ValueError: the weights are empty, or their shape does not match the tokens.
    """
    heads = np.asarray(weights, np.float64)
    shape = (len(target_tokens), len(source_tokens))
    if heads.ndim not in (2, 3) or heads.shape[-2:] != shape or not heads.size:
        raise ValueError(f"weights {heads.shape} must be [T, S] or [N, T, S] with T, S = {shape}, and none of them 0")
    families, missing = _fonts("".join([title, *source_tokens, *target_tokens]))
    with matplotlib.rc_context(STYLE | {"font.family": families, "text.parse_math": False}):
        source, target = ([_label(token, missing) for token in tokens] for tokens in (source_tokens, target_tokens))
        figure = _draw_heads(heads.reshape(-1, *shape), source, target)
        entitle(figure, _drawable(title, missing))
        return save(figure, path_stem)


def _draw_losses(ax: Axes, rows: Rows) -> None:
    (steps, training), (checks, validation) = (_series(rows, kind, "loss") for kind in ("train", "validation"))
    if len(steps):
        ax.plot(steps, training, color=BLUE, alpha=0.25, linewidth=0.8)
        ax.plot(steps, _smooth(training), color=BLUE, label="training, running mean")
    if len(checks):
        ax.plot(checks, validation, "o-", color=ORANGE, markersize=3, label="validation")
    losses = np.concatenate([training, validation])
    if np.any(losses > 0) and not np.any(losses <= 0):
        ax.set_yscale("log")
    ax.set_ylabel("loss (nats per token)")
    ax.legend()


_SCORES = {
    "exact_match": ("exact match (%)", 100, BLUE),
    "accuracy": ("accuracy (%)", 100, BLUE),
    "bleu": ("BLEU", 1, ORANGE),
    "rouge_l": ("ROUGE-L", 1, ORANGE),
}


def _draw_scores(ax: Axes, rows: Rows) -> None:
    for name, (label, scale, color) in _SCORES.items():
        steps, score = _series(rows, "validation", name)
        if len(steps):
            ax.plot(steps, scale * score, "o-", color=color, markersize=3, label=label)
    ax.set_ylim(0, 102)
    ax.set_ylabel("validation score")
    ax.legend(loc="best")


def _draw_rate(ax: Axes, rows: Rows) -> None:
    ax.plot(*_series(rows, "train", "learning_rate"), color=GREY)
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.set_ylabel("learning rate")


def _series(rows: Rows, kind: str, name: str) -> tuple[Numbers, Numbers]:
    pairs = [(row["step"], row[name]) for row in rows if row.get("kind") == kind and row.get(name) is not None]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(values: Numbers) -> Numbers:
    """The centered moving average of the finite values, over a window of a fiftieth of the run."""
    window = np.ones(2 * (len(values) // 100) + 1)
    finite = np.isfinite(values)
    counts = np.convolve(finite, window, "same")
    sums = np.convolve(np.where(finite, values, 0), window, "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _draw_heads(heads: Numbers, source: list[str], target: list[str]) -> Figure:
    columns = math.ceil(math.sqrt(len(heads)))
    rows = math.ceil(len(heads) / columns)
    width, height = (float(np.clip(_CELL * len(tokens), 1.5, 10 / columns)) for tokens in (source, target))
    beside, above = (0.08 * max(map(len, labels)) for labels in (target, source))
    figure = Figure(figsize=(columns * width + beside + 1.3, rows * (height + 0.2) + above + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for number, ax in enumerate(axes.flat):
        if number >= len(heads):
            ax.set_axis_off()
            continue
        image = ax.imshow(heads[number], cmap="Blues", vmin=0, vmax=heads.max(), aspect="auto")
        ax.set_title(f"head {number}" if len(heads) > 1 else "")
        ax.spines[:].set_visible(True)
        ax.xaxis.tick_top()
        ax.xaxis.set_label_position("top")
        _name_ticks(ax.xaxis, "source", source if number < columns else [], width)
        _name_ticks(ax.yaxis, "target", target if number % columns == 0 else [], height)
    figure.colorbar(image, ax=axes, label="attention weight", aspect=30, pad=0.02)
    return figure


def _name_ticks(axis: Axis, name: str, labels: list[str], inches: float) -> None:
    axis.set_label_text(name if labels else "")
    stride = max(1, math.ceil(len(labels) * _LABEL / inches))
    axis.set_ticks(range(0, len(labels), stride), labels[::stride], size=8)
    for text in axis.get_ticklabels():
        if isinstance(axis, XAxis) and len(text.get_text()) > 1:
            text.set_rotation(90)


def _label(token: str, missing: frozenset[str]) -> str:
    text = _drawable(token.replace(" ", "␣"), missing)
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"


def _drawable(text: str, missing: frozenset[str]) -> str:
    # Line breaks are escaped as in the labels, which come from the tokenizer.
    return "".join(f"U+{ord(letter):04X}" if letter in missing else letter for letter in text.replace("\n", "\\n"))


def _fonts(text: str) -> tuple[list[str], frozenset[str]]:
    """The installed font families that a text needs, matplotlib's own first, and the characters that they all lack."""
    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    families, missing = [FONT], {letter for letter in text if ord(letter) not in _charmap(installed[FONT])}
    for family in sorted(installed):
        found = {letter for letter in missing if ord(letter) in _charmap(installed[family])} if missing else set()
        if found:
            families.append(family)
            missing -= found
    return families, frozenset(missing)


@functools.cache
def _charmap(path: str) -> frozenset[int]:
    """The code points in a font file; none for the Last Resort font, which draws placeholder boxes."""
    font = font_manager.get_font(path)
    return frozenset() if "Last Resort" in font.family_name else frozenset(font.get_charmap())
