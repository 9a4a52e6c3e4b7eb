"""Pictures of every mask, every score modification and every schedule, drawn from the functions themselves.

`make docs` draws them anew, so a picture cannot differ from the code. Each is written as PNG and as SVG.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import seqattn
from seqattn import Coordinates
from train.reports.style import BLUE, COLORS, GREY, ORANGE, STYLE, save
from train.update import schedules

LENGTH = 16
TEXT = Coordinates.range(LENGTH)
PACKED = Coordinates.from_segments(jnp.array([1] * 5 + [2] * 4 + [3] * 5 + [0] * 2))
PADDED = Coordinates.from_lengths(jnp.array(11), LENGTH)
IMAGE = Coordinates.grid(4, 4)
TILE = 2

MASKS: dict[str, tuple[str, seqattn.Mask, Coordinates]] = {
    "causal": ("Causal()", seqattn.Causal(), TEXT),
    "sliding-window": ("SlidingWindow(4, ahead=2)", seqattn.SlidingWindow(4, ahead=2), TEXT),
    "same-segment": ("SameSegment(): three packed texts and padding", seqattn.SameSegment(), PACKED),
    "not-padding": ("NotPadding(): 11 tokens, padded to 16", seqattn.NotPadding(), PADDED),
    "prefix": ("Prefix(5)", seqattn.Prefix(5), TEXT),
    "dilated": ("Dilated(3)", seqattn.Dilated(3), TEXT),
    "same-block": ("SameBlock(4)", seqattn.SameBlock(4), TEXT),
    "neighborhood": ("Neighborhood(1): a grid of 4 x 4 patches", seqattn.Neighborhood(1), IMAGE),
    "mask-mod": (
        "MaskMod(lambda q, k: (q.position + k.position) % 3 == 0)",
        seqattn.MaskMod(lambda query, key: (query.position + key.position) % 3 == 0),
        TEXT,
    ),
    "causal-and-window": ("Causal() & SlidingWindow(4)", seqattn.Causal() & seqattn.SlidingWindow(4), TEXT),
    "prefix-or-causal": ("Causal() | Prefix(5)", seqattn.Causal() | seqattn.Prefix(5), TEXT),
    "packed-causal": ("Causal() & SameSegment()", seqattn.Causal() & seqattn.SameSegment(), PACKED),
    "not-causal": ("~Causal()", ~seqattn.Causal(), TEXT),
}
"""By name of the picture: title, mask, and the coordinates of queries and keys."""

SCORE_MODS: dict[str, tuple[str, seqattn.ScoreMod]] = {
    "alibi": ("Alibi()", seqattn.Alibi(seqattn.Alibi.geometric(8))),
    "relative-buckets": (
        "RelativeBuckets(table): 16 buckets up to a distance of 12",
        seqattn.RelativeBuckets(jnp.tile(jnp.arange(16.0)[:, None], (1, 8)), max_distance=12),
    ),
    "relative-positions": (
        "RelativePositions(table): distances are clipped at 4",
        seqattn.RelativePositions(jnp.arange(-4.0, 5.0)[:, None] / 4),
    ),
}

SCHEDULES: dict[str, tuple[str, schedules.Checked]] = {
    "constant": ("Constant(rate=1e-3, warmup_steps=200)", schedules.Constant(1e-3, 200)),
    "noam": ("Noam(model_dim=512, warmup_steps=500)", schedules.Noam(512, 500)),
    "inverse-square-root": ("InverseSquareRoot(peak=1e-3, warmup_steps=500)", schedules.InverseSquareRoot(1e-3, 500)),
    "cosine": ("Cosine(peak=1e-3, warmup_steps=200, final=0.1)", schedules.Cosine(1e-3, 200, 0.1)),
    "inverse-time": ("InverseTime(rate=1e-3, every=400)", schedules.InverseTime(1e-3, 400)),
}
STEPS = 3_000


def draw_all(folder: Path) -> None:
    """Writes every picture into a folder, which is made if needed."""
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, (title, mask, at) in MASKS.items():
            _picture(folder / f"mask-{name}", (3.2, 3.3), lambda ax, t=title, m=mask, a=at: _mask(ax, t, m, a))
        _picture(folder / "mask-tiles", (3.2, 3.6), _tiles)
        for name, (title, mod) in SCORE_MODS.items():
            _picture(folder / f"score-{name}", (3.9, 3.3), lambda ax, t=title, m=mod: _score_mod(ax, t, m))
        _picture(folder / "score-soft-cap", (3.9, 2.8), _soft_cap)
        for name, (title, schedule) in SCHEDULES.items():
            _picture(folder / f"schedule-{name}", (3.9, 2.4), lambda ax, t=title, s=schedule: _schedule(ax, t, s))


def _picture(stem: Path, inches: tuple[float, float], draw: Callable[[Axes], None]) -> None:
    figure = Figure(inches, layout="constrained")
    draw(figure.subplots())
    save(figure, stem)


def _pairs(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=8)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_xticks(range(0, LENGTH, 5))
    ax.set_yticks(range(0, LENGTH, 5))
    # White lines between the pairs, so that they can be counted.
    ax.set_xticks(np.arange(-0.5, LENGTH), minor=True)
    ax.set_yticks(np.arange(-0.5, LENGTH), minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6, alpha=1.0)
    ax.tick_params(which="minor", length=0)
    ax.set_axisbelow(False)
    ax.spines[:].set_visible(False)


def _mask(ax: Axes, title: str, mask: seqattn.Mask, at: Coordinates) -> None:
    ax.imshow(mask.dense(at, at), cmap=ListedColormap(["#e8e8e8", BLUE]), vmin=0, vmax=1)
    _pairs(ax, title)


def _tiles(ax: Axes) -> None:
    x = jax.ShapeDtypeStruct((LENGTH, 1, 1), jnp.float32)
    mask = seqattn.Causal() & seqattn.SameSegment()
    kinds = seqattn.block_mask(mask, x, x, x, q_at=PACKED, kv_at=PACKED).kinds(TILE, TILE)[0]
    visible = np.asarray(mask.dense(PACKED, PACKED))
    # The pairs that the mask shows, in front of the tiles that a kernel computes for them.
    tiles = np.repeat(np.repeat(kinds, TILE, axis=0), TILE, axis=1)
    ax.imshow(np.where(visible, 3, tiles), cmap=ListedColormap(["#e8e8e8", ORANGE, GREY, BLUE]), vmin=0, vmax=3)
    _pairs(ax, f"{np.mean(kinds != 0):.0%} of the tiles of {TILE} x {TILE} are visited")
    for edge in range(TILE, LENGTH, TILE):
        ax.axvline(edge - 0.5, color="black", linewidth=0.6, zorder=5)
        ax.axhline(edge - 0.5, color="black", linewidth=0.6, zorder=5)
    labels = {BLUE: "visible", ORANGE: "masked in a visited tile", "#e8e8e8": "skipped"}
    handles = [Patch(color=color, label=label) for color, label in labels.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize=6, frameon=False)


def _score_mod(ax: Axes, title: str, mod: seqattn.ScoreMod) -> None:
    rows = mod.rows(jnp.ones((1, LENGTH, 1, 1)), 1.0)

    def change(query: Coordinates, key: Coordinates, row: jax.Array | None) -> jax.Array:
        return mod(jnp.float32(0), query, key, 0, row)

    rows = None if rows is None else rows[0, :, 0]
    change = jax.vmap(jax.vmap(change, (None, 0, None)), (0, None, None if rows is None else 0))
    image = ax.imshow(change(TEXT, TEXT, rows), cmap="cividis")
    _pairs(ax, title)
    ax.figure.colorbar(image, ax=ax, label="added to the score", shrink=0.75)


def _soft_cap(ax: Axes) -> None:
    score, first = jnp.linspace(-60, 60, 241), jax.tree.map(lambda x: jnp.asarray(x[0]), TEXT)
    ax.plot(score, score, color=GREY, linestyle=":", label="score")
    ax.plot(score, seqattn.SoftCap(20.0)(score, first, first, 0), color=ORANGE, label="SoftCap(20.0)")
    ax.set_xlabel("score before")
    ax.set_ylabel("score after")
    ax.grid(True)
    ax.legend()


def _schedule(ax: Axes, title: str, schedule: schedules.Checked) -> None:
    rate = schedule.schedule(STEPS)
    ax.plot(range(STEPS), [float(r) for r in jax.vmap(rate)(jnp.arange(STEPS))], color=COLORS[1])
    ax.set_title(title, fontsize=8)
    ax.set_xlabel("update")
    ax.set_ylabel("learning rate")
    ax.set_ylim(bottom=0)
    ax.grid(True)
