"""Chart of training: tokens per second by model, one bar per implementation."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.bench.chart import distinct, fill, finish, with_value
from benchmarks.bench.record import Line
from train.reports.style import STYLE


def rates(lines: Sequence[Line], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws tokens per second without padding as bars, one panel per model, since the models differ too much for one.

    Args:
        lines: records; the ones with a rate are drawn, with whiskers for the range over the rounds.
        path: where to write the chart; the suffix is ignored.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        ValueError: no line has a rate.
    """
    drawn = with_value(lines, "tokens_per_second", path)
    names, models = distinct(drawn, "implementation"), distinct(drawn, "model")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + 2.6 * len(models), 3.4), layout="constrained")
        for ax, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            _draw(ax, [line for line in drawn if line["model"] == model], names)
            ax.set_title(model)
        figure.axes[0].set_ylabel("tokens / s, without padding")
        return finish(figure, names, "{device}, {cores} cores, {dtype}".format_map(drawn[0]), path)


def _draw(ax: Axes, lines: Sequence[Line], names: list[str]) -> None:
    for line in lines:
        number, rate = names.index(line["implementation"]), line["tokens_per_second"]
        slowest, fastest = (line["tokens"] / line[f"{end}_seconds"] for end in ("max", "min"))
        spread = [[rate - slowest], [fastest - rate]]
        bars = ax.bar(number, rate, 0.7, yerr=spread, error_kw={"linewidth": 0.8, "capsize": 2}, **fill(number))
        ax.bar_label(bars, [f"{rate:,.0f}"], padding=2, size=7)  # above the range
    ax.margins(y=0.15)
    ax.set_xticks([])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.grid(True, axis="y")
