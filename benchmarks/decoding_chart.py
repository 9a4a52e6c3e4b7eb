"""The picture of the decoding benchmark: tokens a second by batch, a panel for each size of the beam."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import chart
from benchmarks.decoding_row import DecodingRow


def rates(rows: Sequence[DecodingRow], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws bars of tokens a second on a logarithmic scale, a panel for each beam size, a group for each batch.

    Args:
        rows: those with times are drawn.
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
    batches, beams = (sorted({getattr(row.case, name) for row in drawn}) for name in ("batch", "beam_size"))
    with matplotlib.rc_context(chart.STYLE):
        figure = Figure(figsize=(0.8 + max(2.6, 1.4 * len(batches)) * len(beams), 3.4), layout="constrained")
        axes = figure.subplots(1, len(beams), sharey=True, squeeze=False)[0]
        for ax, beam_size in zip(axes, beams, strict=True):
            _draw(ax, [row for row in drawn if row.case.beam_size == beam_size], names, batches)
            ax.set_title(f"beam {beam_size}" if beam_size > 1 else "greedy")
        axes[0].set_ylabel("tokens / s")
        return chart.finish(figure, names, path)


def _draw(ax: Axes, rows: Sequence[DecodingRow], names: list[str], batches: list[int]) -> None:
    step = 1 / (len(names) + 1)
    for number, name in enumerate(names):
        mine = [row for row in rows if row.implementation == name]
        places = [batches.index(row.case.batch) + (number - (len(names) - 1) / 2) * step for row in mine]
        heights = [row.rate or 0 for row in mine]
        bars = ax.bar(places, heights, step, **chart.fill(number))
        ax.bar_label(bars, [f"{height:,.0f}" for height in heights], padding=2, size=6, rotation=90)
    ax.set_yscale("log")
    ax.margins(y=0.25)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(batches)), [f"{batch} source{'s' * (batch > 1)}" for batch in batches])
    ax.grid(True, axis="y")
