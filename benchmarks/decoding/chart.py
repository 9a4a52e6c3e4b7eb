"""Chart of decoding: tokens per second by batch size, one panel per beam size."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bench.chart import distinct, fill, finish, logarithmic, place, with_value
from benchmarks.bench.record import Line
from train.reports.style import STYLE


def rates(lines: Sequence[Line], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws tokens per second as bars on a logarithmic scale: one panel per beam size, one group per batch size.

    Args:
        lines: records; the ones with a rate are drawn.
        path: where to write the chart; the suffix is ignored.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        ValueError: no line has a rate.
    """
    drawn = with_value(lines, "tokens_per_second", path)
    names = distinct(drawn, "implementation")
    batches, beams = (sorted(distinct(drawn, field)) for field in ("batch", "beam_size"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + max(2.6, 1.4 * len(batches)) * len(beams), 3.4), layout="constrained")
        axes = figure.subplots(1, len(beams), sharey=True, squeeze=False)[0]
        for ax, beam_size in zip(axes, beams, strict=True):
            _draw(ax, [line for line in drawn if line["beam_size"] == beam_size], names, batches)
            ax.set_title(f"beam {beam_size}" if beam_size > 1 else "greedy")
        axes[0].set_ylabel("tokens / s")
        return finish(figure, names, "{device}, {cores} cores, {dtype}".format_map(drawn[0]), path)


def _draw(ax: Axes, lines: Sequence[Line], names: list[str], batches: list[int]) -> None:
    for number, name in enumerate(names):
        mine = [line for line in lines if line["implementation"] == name]
        places = [place(number, len(names), batches.index(line["batch"])) for line in mine]
        heights = [line["tokens_per_second"] for line in mine]
        bars = ax.bar(places, heights, 1 / (len(names) + 1), **fill(number))
        ax.bar_label(bars, [f"{height:,.0f}" for height in heights], padding=2, size=6, rotation=90)
    groups = [f"{batch} source{'s' * (batch > 1)}" for batch in batches]
    logarithmic(ax, groups, lambda value: f"{value:,g}")
    ax.margins(y=0.25)
