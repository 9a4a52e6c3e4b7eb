"""The picture of the training benchmark: tokens a second by model, a bar for each implementation."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks import chart
from benchmarks.training_row import TrainingRow


def rates(rows: Sequence[TrainingRow], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws bars of tokens a second without padding, a panel for each model, whose figures differ too much for one.

    Args:
        rows: those with times are drawn; lines show the range of the rounds.
        path: that of the picture; its suffix does not matter.

    Returns:
        The paths of the PNG and of the SVG beside it.

    Raises:
        ValueError: no row has times.
    """
    drawn = [row for row in rows if row.rate]
    if not drawn:
        raise ValueError(f"{path}: none of {len(rows)} rows has times")
    names = list(dict.fromkeys(row.implementation for row in drawn))
    models = list(dict.fromkeys(row.case.name for row in drawn))
    with matplotlib.rc_context(chart.STYLE):
        figure = Figure(figsize=(0.8 + 2.6 * len(models), 3.4), layout="constrained")
        for ax, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            _draw(ax, [row for row in drawn if row.case.name == model], names)
            ax.set_title(model)
        figure.axes[0].set_ylabel("tokens / s, without padding")
        return chart.finish(figure, names, path)


def _draw(ax: Axes, rows: Sequence[TrainingRow], names: list[str]) -> None:
    for row in rows:
        place, rate, seconds = names.index(row.implementation), row.rate or 0, row.times.seconds if row.times else ()
        slowest, fastest = (row.work.tokens / pick(seconds) for pick in (max, min))
        spread = [[rate - slowest], [fastest - rate]]
        bars = ax.bar(place, rate, 0.7, yerr=spread, error_kw={"linewidth": 0.8, "capsize": 2}, **chart.fill(place))
        ax.bar_label(bars, [f"{rate:,.0f}"], padding=2, size=7)  # above the range
    ax.margins(y=0.15)
    ax.set_xticks([])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.grid(True, axis="y")
