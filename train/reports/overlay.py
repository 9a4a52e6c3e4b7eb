"""Attention maps over images, as PNG and SVG (Xu 2015, figure 3)."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from train.reports.style import STYLE, save

_COLUMNS, _WIDTH, _TITLE = 4, 2.2, 0.25  # panels side by side, and inches


def attention_over_image(
    image: ArrayLike,
    weights: ArrayLike,
    target_tokens: Sequence[str],
    path_stem: str | os.PathLike[str],
    *,
    title: str = "",
) -> tuple[Path, Path]:
    """Draws the image, and once more for each target token with its attention weights as a red overlay.

    The opacity of the overlay is proportional to the weight; the largest weight of each token has the same opacity.

    Args:
        image: gray `[height, width]`, from 0 for black to 255, or color `[height, width, 3]` as for matplotlib.
        weights: attention weights `[T, rows, columns]` on a grid that covers the image.
        target_tokens: the T target tokens as strings.
        path_stem: the path of the picture without a suffix.
        title: the title of the picture.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ValueError: the weights are empty or do not have T maps.
    """
    pixels, places = np.asarray(image), np.asarray(weights, np.float64)
    if places.ndim != 3 or len(places) != len(target_tokens) or not places.size:
        raise ValueError(f"weights {places.shape} must be [T, rows, columns] with T = {len(target_tokens)}, none 0")
    height, width = pixels.shape[:2]
    rows = math.ceil((len(places) + 1) / _COLUMNS)
    panel = _WIDTH * height / width + _TITLE
    with matplotlib.rc_context(STYLE | {"text.parse_math": False}):
        figure = Figure(figsize=(_COLUMNS * _WIDTH, rows * panel + 2 * _TITLE), layout="constrained")
        axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
        for ax in axes:
            ax.set_axis_off()
        extent = (0, width, height, 0)
        for ax in axes[: len(places) + 1]:
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent)
        for ax, token, map_ in zip(axes[1:], target_tokens, places, strict=False):
            veil = np.zeros((*map_.shape, 4))
            veil[..., 0], veil[..., 3] = 1, 0.7 * map_ / max(float(map_.max()), 1e-12)
            ax.imshow(veil, extent=extent, interpolation="nearest")
            ax.set_title(token, pad=2)
        figure.suptitle(title)
        return save(figure, path_stem)
