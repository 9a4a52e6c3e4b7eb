"""The kernel with its copies and barriers, as Pallas's interpreter runs it.

The interpreter knows no copy that is still on its way in the thread that started it. So the order of copies, waits and
products is also checked by itself: the program of a block runs in plain Python.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.kernels.call import Call, Columns
from seqattn.kernels.hopper.tile import Sums
from seqattn.kernels.hopper_cached import kernel
from seqattn.kernels.hopper_cached import plan as plans
from seqattn.kernels.hopper_cached.plan import Plan, Tiling
from tests import hopper_cached_plain, hopper_plain
from tests.contract import close

pytest.importorskip("absl", reason="Pallas Mosaic GPU needs absl-py")
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from seqattn.kernels.hopper_cached import forward

S, H, T = 80, 64, 3


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch):
    """Tiles so small that each place of the ring is used several times. The interpreter multiplies any."""
    for where in (plans, kernel):
        monkeypatch.setattr(where, "TILINGS", {H: Tiling(8, 16, 2)})


def _run(lengths, heads, parts):
    """Results of the interpreted kernel and of plain JAX for two rows, and whether the interpreter found a race."""
    random, rows = np.random.default_rng(0), len(lengths)
    shapes = (rows, T, 2 * heads, H), (rows, heads, H, S), (rows, heads, S, H)
    query, key, value = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes)
    # New tokens see what is filled; the first ones less of it.
    visible = np.arange(S) < np.maximum(np.array(lengths)[:, None, None, None] - np.arange(T)[::-1, None], 0)
    columns = Columns(key, value, jnp.ones((rows, heads, S), bool).at[0, 0, 1].set(False))
    call = Call.of_columns(query, columns, mask=jnp.asarray(visible), **dict.fromkeys(UNUSED))
    plan = dataclasses.replace(Plan.of(call, interpret=InterpretGPUParams(detect_races=True)), parts=parts)
    given = forward.operands(plan, query, columns, call.mask, jnp.float32(0.1))
    results, races = hopper_plain.interpreted(lambda: forward.compute(plan, given))
    return results, hopper_cached_plain.compute(plan, given), races


UNUSED = ("score_mod", "q_at", "kv_at", "dropout")


@pytest.mark.parametrize(
    ("lengths", "heads", "parts"), [([75, 0], 2, 1), ([75, 17], 1, 2)], ids=["two heads", "two parts"]
)
def test_the_interpreted_kernel_computes_what_its_arithmetic_does(lengths, heads, parts):
    results, plain, races = _run(lengths, heads, parts)
    assert not races
    for actual, expected in zip(results, plain, strict=True):
        close(actual, expected, "bfloat16")
    assert np.isnan(results[0][0, 0]).any(), "the second slot of the first row and head is not finite"
    assert not np.isnan(results[0][:, 1:]).any()
    assert (results[2] == 0).any(), "a row that sees nothing"


class _Recorded(dict[tuple[str, int], str]):
    """What each buffer holds: a tile that is on its way, one that has arrived, or one that has been read."""

    def load(self, source, buffer, barrier):
        assert barrier == buffer
        assert self.get(buffer, "read") == "read", f"{buffer} is overwritten before it is read"
        self[buffer] = f"on its way: {source}"

    def wait(self, barrier):
        assert self[barrier].startswith("on its way")
        self[barrier] = self[barrier].removeprefix("on its way: ")

    def read(self, buffer):
        assert not self[buffer].startswith("on its way"), f"{buffer} is read before it has arrived"
        self[buffer], tile = "read", self[buffer]
        return tile


class _Named:
    """An array or the buffers of a name: `at[...]` tells which part is meant."""

    def __init__(self, name):
        self.name, self.at = name, self

    def __getitem__(self, index):
        return self.name, index

    __setitem__ = __call__ = lambda self, *anything: None


def _order(monkeypatch, found, parts, part):
    """The tiles of keys and values that a block multiplies, if its program runs in plain Python."""
    plan = Plan((1, 1, 1, 1, 16 * max(found, 1), H), np.dtype(jnp.bfloat16), plans.TILINGS[H], parts, None)
    seen, tiles = _Recorded(), {}

    def product(query, key, meanwhile):
        tiles["key"] = [*tiles.get("key", []), seen.read(key)]
        return None, meanwhile()

    def output(total, weights, value, meanwhile):
        tiles["value"] = [*tiles.get("value", []), seen.read(value)]
        return total

    def loop(begin, end, step, state):
        return functools.reduce(lambda state, i: step(i, state), range(begin, end), state)

    nothing = Sums(*[jnp.zeros(1)] * 3)
    arithmetic = SimpleNamespace(
        bits=lambda first, slots: [], weights=lambda products, bits, sums: (jnp.zeros(1), sums)
    )
    named = {name: _Named(name) for name in ("query", "key", "value", "output")}
    index = {"batch": 0, "heads": 0, "parts": part}
    fakes = {
        "plgpu": SimpleNamespace(
            copy_gmem_to_smem=lambda source, buffer, ready: seen.load(source[1][-1], _place(buffer), _place(ready)),
            barrier_wait=lambda ready: seen.wait(_place(ready)),
            **dict.fromkeys(("commit_smem", "copy_smem_to_gmem", "wait_smem_to_gmem"), lambda *_: None),
        ),
        "pl": SimpleNamespace(ds=lambda first, size: first, when=lambda yes: lambda fn: fn() if yes else None),
        "lax": SimpleNamespace(
            axis_index=index.get, rem=lambda a, b: int(a) % int(b), div=lambda a, b: int(a) // int(b), fori_loop=loop
        ),
        "units": lambda interpret: SimpleNamespace(product=product, output=output),
        "Arithmetic": lambda *_: arithmetic,
        "start": lambda *_: nothing,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(forward, name, fake)
    counts, visited = np.array([[[0, found]]]), np.arange(found)[None, None] * 3 + 1
    given = named["query"], named["key"], named["value"], [0.1], counts, visited
    forward._Block(plan, *given, *[_Named("result")] * 3, named, named).run()
    assert set(seen.values()) <= {"read", "0"}, "what is loaded is read"
    return tiles


def _place(part):
    """The buffer that a reference means; there is one for the queries."""
    name, index = part
    return name, 0 if name == "query" else int(index)


@pytest.mark.parametrize(("found", "parts"), [(0, 1), (1, 2), (2, 1), (5, 1), (7, 3)])
def test_every_tile_is_read_once_and_only_when_it_has_arrived(monkeypatch, found, parts):
    orders = [_order(monkeypatch, found, parts, part) for part in range(parts)]
    for name in ("key", "value"):
        read = [tile for each in orders for tile in each.get(name, [])]
        assert read == [str((3 * i + 1) * 16) for i in range(found)]


def test_a_missing_wait_is_found(monkeypatch):
    wait = forward._Block._wait
    for missing in ("key", "value"):
        monkeypatch.setattr(
            forward._Block, "_wait", lambda self, name, slot, gone=missing: name == gone or wait(self, name, slot)
        )
        with pytest.raises(AssertionError, match="before it has arrived"):
            _order(monkeypatch, 2, 1, 0)


def test_a_copy_to_a_place_that_is_still_read_is_found(monkeypatch):
    monkeypatch.setattr(forward._Block, "_slot", lambda self, step: 0)
    with pytest.raises(AssertionError, match="overwritten before it is read"):
        _order(monkeypatch, 2, 1, 0)
