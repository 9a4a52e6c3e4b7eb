"""Chart of attention: the speed of each implementation relative to the baseline."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.bench.chart import distinct, fill, finish, logarithmic, place, with_value
from benchmarks.bench.record import Line
from train.reports.style import STYLE

_ROOM = 1.6  # margin factor above a bar, for its label
_BAR = 0.2  # inches


def speeds(lines: Sequence[Line], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws speeds relative to the baseline as bars: one panel per shape and pass, one group of bars per mask.

    Args:
        lines: records; the ones with a speed are drawn on a logarithmic scale. The baseline is the line at 1.
        path: where to write the chart; the suffix is ignored.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        ValueError: no line except the baseline's has a speed.
    """
    drawn = with_value(lines, "speed", path)
    names, masks = distinct(drawn, "implementation"), distinct(drawn, "mask")
    shapes, directions = distinct(drawn, "shape"), distinct(drawn, "pass")
    width = max(3.5, len(masks) * (len(names) + 1) * _BAR) * len(directions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width + 0.8, 2.3 * len(shapes) + 1.2), layout="constrained")
        axes = figure.subplots(len(shapes), len(directions), sharex=True, sharey="row", squeeze=False)
        for across, shape in zip(axes, shapes, strict=True):
            row = [line for line in drawn if line["shape"] == shape]
            for ax, direction in zip(across, directions, strict=True):
                _draw(ax, [line for line in row if line["pass"] == direction], names, masks)
                ax.set_title(f"{shape}, {direction}")
            # The panels of a shape share an axis, so the limits must fit all of its lines.
            found = [line["speed"] for line in row]
            across[0].set_ylim(min(0.5, min(found) / _ROOM), max(2, max(found) * _ROOM))
            across[0].set_ylabel(f"speed ({drawn[0]['baseline']} = 1)")
        return finish(figure, names, f"{drawn[0]['device']}, {drawn[0]['dtype']}", path)


def _draw(ax: Axes, lines: Sequence[Line], names: list[str], masks: list[str]) -> None:
    for number, name in enumerate(names):
        mine = [line for line in lines if line["implementation"] == name]
        places = [place(number, len(names), masks.index(line["mask"])) for line in mine]
        # Bars start at 1: up for faster, down for slower.
        ax.bar(places, [line["speed"] - 1 for line in mine], 1 / (len(names) + 1), bottom=1, **fill(number))
        for at, line in zip(places, mine, strict=True):
            _name_bar(ax, at, line["speed"])
    ax.axhline(1, color="black", linewidth=0.8)
    logarithmic(ax, masks, lambda value: f"{value:g}")


def _name_bar(ax: Axes, at: float, speed: float) -> None:
    above = speed >= 1
    text = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
    offset, align = ((0, 2), "bottom") if above else ((0, -2), "top")
    ax.annotate(text, (at, speed), offset, textcoords="offset points", ha="center", va=align, size=6, rotation=90)
