"""What the tests of every implementation of `attend` share: named shapes, compiled calls with gradients, tolerances.

The relations themselves are tests/seqattn/kernels/test_contract.py and test_contract_faults.py, run for each name in
`IMPLEMENTATIONS`: a new implementation is held to all of them by being listed there.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from seqattn.attention import attend
from seqattn.dropout import Dropout
from seqattn.kernels import cached, ring, tokamax, tpu, tpu_cached
from seqattn.kernels.call import Call, Columns
from seqattn.kernels.chunked import schedule
from seqattn.kernels.dispatch import IMPLEMENTATIONS, Implementation
from seqattn.kernels.hopper.plan import Tiling
from seqattn.kernels.tpu import tiles
from seqattn.kernels.tpu_cached import plan
from seqattn.mask import Mask, MaskMod
from tests import hopper_cached_plain, hopper_plain, oracle

PLATFORM = {"cudnn": "gpu", "splash": "tpu"}
"""Where an implementation runs at all, if not everywhere."""

REFUSED = {
    "xla": "no score modification|no dropout|softmax of float64",
    "hopper": "from which pairs choose|with a gradient is|not float64|that differ by pair",
    "ring": "no dropout",
    "tokamax": "no bias|no score modification|no dropout|boolean array|no causal mask|not known at trace time|one text",
    "cached": "has no dropout",
    "tpu_cached": (
        "has no dropout|takes up to 64 queries|no bias over|no score modification over|jax_enable_x64"
        "|float32 and bfloat16, not"
    ),
    "hopper_cached": (
        "has no dropout|takes up to 64 queries|no bias over|no score modification over|jax_enable_x64"
        "|bfloat16 and float16, not|are 70 rows of a key head"
    ),
    "tpu": (
        "takes no bias|from which pairs choose|jax_enable_x64|float32 and bfloat16, not|with a gradient is"
        "|that differ by pair"
    ),
}
"""What an implementation may refuse, by its reasons; any other refusal fails the test."""


def _of_equal_dims(kernel: Implementation) -> Implementation:
    """A kernel that refuses V != H, which all shapes here have, held to all relations: zeros fill what is smaller."""

    def attend(call):
        value_dim, wide = call.value.shape[-1], max(call.query.shape[-1], call.value.shape[-1])
        arrays = {name: getattr(call, name) for name in ("query", "key", "value")}
        padded = {name: jnp.pad(x, [(0, 0)] * 3 + [(0, wide - x.shape[-1])]) for name, x in arrays.items()}
        output, lse = kernel.attend(dataclasses.replace(call, **padded))
        return output[..., :value_dim], lse

    return Implementation(attend, kernel.note)


RING = 2
"""How many devices a sequence is split over."""


def _ring(call):
    """What `ring_attend` runs, over devices that hold a part of the sequence each; hidden tokens fill the last."""
    query, key, value, rows, mask, bias = call.query, call.key, call.value, call.rows, call.mask, call.bias
    length, size = query.shape[1], key.shape[1]
    more, more_keys = -length % RING, -size % RING
    query, key, value, rows = (
        None if x is None else jnp.pad(x, ((0, 0), (0, n), (0, 0), (0, 0)))
        for x, n in ((query, more), (key, more_keys), (value, more_keys), (rows, more))
    )
    q_at, kv_at = (
        jax.tree.map(lambda x, n=n: jnp.pad(x, ((0, 0), (0, n)), constant_values=_HIDDEN), at)
        for at, n in ((call.q_at, more), (call.kv_at, more_keys))
    )
    if mask is not None and not isinstance(mask, Mask):
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, size))
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more), (0, more_keys)))
    elif more or more_keys:
        real = MaskMod(_is_real)
        mask = real if mask is None else mask & real
    if bias is not None:
        behind = ((0, n if m > 1 else 0) for n, m in zip((more, more_keys), bias.shape[2:], strict=True))
        bias = jnp.pad(bias, ((0, 0), (0, 0), *behind))

    def by_query(x):
        return P(None, None, "ring") if isinstance(x, jax.Array) and x.shape[2] > 1 else P()

    given = {"query": query, "key": key, "value": value, "rows": rows, "q_at": q_at, "kv_at": kv_at}
    specs = dict.fromkeys(given, P(None, "ring")) | {"mask": by_query(mask), "bias": by_query(bias)}
    given |= {"mask": mask, "bias": bias, "score_mod": call.score_mod, "scale": jnp.asarray(call.scale)}
    specs |= {"score_mod": P(), "scale": P()}
    mesh = jax.make_mesh((RING,), ("ring",), axis_types=(AxisType.Auto,), devices=jax.devices()[:RING])
    # A plain function that closes over arrays closes here over those outside of the split.
    split = {"mesh": mesh, "in_specs": (specs,), "out_specs": P(None, "ring"), "check_vma": False}
    local = lambda given: ring.attend(Call(**given, dropout=call.dropout), "ring")  # noqa: E731
    results = jax.shard_map(local, **split)(given)
    return tuple(x[:, :length] for x in results)


_HIDDEN = -(2**30)


def _is_real(query, key):
    return (query.position != _HIDDEN) & (key.position != _HIDDEN)


def _hopper(call):
    """The kernel for Hopper in plain JAX, with small tiles, and with all dtypes and dims."""
    return hopper_plain.attend(call, Tiling(2, 4, 2))


def in_columns(call):
    """A call whose keys and values lie as a cache keeps them."""
    finite = jnp.isfinite(call.key).all(axis=-1) & jnp.isfinite(call.value).all(axis=-1)
    key, value = (jnp.where(finite[..., None], x, jnp.zeros_like(x)) for x in (call.key, call.value))
    columns = Columns(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), finite.swapaxes(1, 2))
    return dataclasses.replace(call, key=None, value=None, columns=columns)


OVER_A_CACHE = {
    "cached": cached.attend,
    "tpu_cached": functools.partial(tpu_cached.attend, interpret=True),
    # In plain JAX, with tiles of one slot, and with all dtypes and dims.
    "hopper_cached": functools.partial(hopper_cached_plain.attend, tiling=hopper_cached_plain.Tiling(64, 1, 2)),
}
"""Kernels that read a cache, as any machine runs them."""


def small_tiles(monkeypatch):
    """Tiles of `chunked` so small that the few tokens of a test fill several, with an odd rest.

    Four queries (of one head in a group) and four keys in blocks of two, one lane, several steps.
    """
    for name, value in {"_VECTOR": 2, "_BLOCK": 2, "_QUERIES": (4, 8), "_KEYS": 4, "_LANES": 1, "_AT_ONCE": 0}.items():
        monkeypatch.setattr(schedule, name, value)


@contextlib.contextmanager
def small_tpu_tiles():
    """Tiles of the kernels for TPUs so small that the few tokens of a test fill several, as its interpreter allows."""
    small = dict.fromkeys(tiles._TILES, ((4, 4), (4, 4)))
    patches = (tiles, "_LANES", 2), (tiles, "_TILES", small), (plan, "_TILES", (4,))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


def _tpu(call):
    """The kernel for TPUs, as Pallas's interpreter runs it."""
    with small_tpu_tiles():
        return tpu.attend(call, interpret=True)


def _over_a_cache(name):
    def attend(call):
        with small_tpu_tiles():
            return OVER_A_CACHE[name](in_columns(call))

    return Implementation(attend)


def _tokamax(call):
    """What is around tokamax's kernels, with its XLA in their place."""
    return tokamax.attend(call, on="xla")


HELD = {
    "tpu": Implementation(_tpu),
    "xla": _of_equal_dims(IMPLEMENTATIONS["xla"]),
    **{name: _over_a_cache(name) for name in OVER_A_CACHE},
    "hopper": Implementation(_hopper),
    "ring": Implementation(_ring),
    "tokamax": Implementation(_tokamax),
}
"""Implementations in a form that takes all calls here: in the place of the library's own, or beside them."""


def every_implementation(test: Callable[..., None], slow: Collection[str] = ()) -> Callable[..., None]:
    """Runs a test for each implementation, `slow` ones in `make test-all` alone; a listed refusal ends it."""

    @functools.wraps(test)
    def run(implementation: str, **others) -> None:
        here = jax.default_backend()
        if PLATFORM.get(implementation, here) != here:
            pytest.skip(f"{implementation} runs on a {PLATFORM[implementation]}, and this is a {here}")
        if implementation == "ring" and jax.device_count() < RING:
            pytest.skip(f"a ring needs {RING} devices, and here are {jax.device_count()}")
        if implementation == "tokamax" and (reason := tokamax.why_missing()):
            pytest.skip(reason)
        try:
            with mock.patch.dict(IMPLEMENTATIONS, HELD):
                test(implementation=implementation, **others)
        except NotImplementedError as reason:
            if implementation not in REFUSED or not re.search(REFUSED[implementation], str(reason)):
                raise
            pytest.xfail(str(reason))

    cases = [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in IMPLEMENTATIONS | HELD]
    return pytest.mark.parametrize("implementation", cases)(run)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Dims are different primes, but for the heads N, a multiple of K."""

    batch: tuple[int, ...] = (2,)
    T: int = 7
    S: int = 11
    N: int = 6
    K: int = 3
    H: int = 5
    V: int = 13

    @property
    def pairs(self) -> tuple[int, ...]:
        return (*self.batch, self.N, self.T, self.S)


SQUARE = Shape(T=7, S=7, N=4, K=2, H=3, V=5)
GROUPED = Shape()

SHAPES = {
    "grouped": GROUPED,
    "one_kv_head_and_two_batch_dims": Shape(batch=(3, 2), T=5, S=7, N=2, K=1, H=11),
    "as_many_kv_heads_and_no_batch": Shape(batch=(), T=11, S=7, N=3, K=3),
    "one_query": Shape(T=1, N=3, K=1),
    "one_token": Shape(T=1, S=1, N=2, K=2, H=1, V=3),
}

NUMPY_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# An error relative to the largest element: some roundings of the output, as all sums are float32 at least.
TOLERANCE = {"float64": 1e-12, "float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def arrays(shape: Shape, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random query, key and value, as NumPy arrays of the dtype."""
    random, length = np.random.default_rng(seed), {"query": shape.T, "key": shape.S, "value": shape.S}
    heads = {"query": (shape.N, shape.H), "key": (shape.K, shape.H), "value": (shape.K, shape.V)}
    return {
        name: random.normal(size=(*shape.batch, length[name], *heads[name])).astype(NUMPY_DTYPES[dtype])
        for name in heads
    }


def cotangents(shape: Shape, dtype: str = "float32", seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random directions of the output and of the log-sum-exp (float32 at least)."""
    random, high = np.random.default_rng(seed), "float64" if dtype == "float64" else "float32"
    d_output = random.normal(size=(*shape.batch, shape.T, shape.N, shape.V)).astype(NUMPY_DTYPES[dtype])
    return d_output, random.normal(size=(*shape.batch, shape.T, shape.N)).astype(NUMPY_DTYPES[high])


def random_pairs(shape: Shape, seed: int = 2) -> np.ndarray:
    """Which pairs may attend, `[*batch, N, T, S]`; the second query of every row sees nothing, in no head."""
    chosen = np.random.default_rng(seed).random(shape.pairs) < 0.6
    chosen[..., 1:2, :] = False
    return chosen


def kept(dropout: Dropout, shape: Shape) -> np.ndarray:
    """What dropout multiplies the weights `[*batch, N, T, S]` by, from their indices alone."""
    row = jnp.arange(math.prod(shape.pairs[:-1])).reshape(-1, 1)
    keep = np.asarray(dropout.keep(row, jnp.arange(shape.S).reshape(1, -1)))
    return np.where(keep, 1 / (1 - dropout.rate), 0).reshape(shape.pairs)


@functools.partial(jax.jit, static_argnames="implementation")
def _forward(inputs, options, implementation):
    return attend(**inputs, **options, implementation=implementation, return_lse=True)


@functools.partial(jax.jit, static_argnames="implementation")
def _with_gradients(inputs, options, directions, implementation):
    def call(inputs):
        return attend(**inputs, **options, implementation=implementation, return_lse=True)

    results, pull_back = jax.vjp(call, inputs)
    return results, pull_back(directions)[0]


def forward(implementation: str, inputs: dict, **options) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp of the jitted call. `inputs` and `options` are arguments of `attend`."""
    output, lse = _forward(inputs, options, implementation)
    return np.asarray(output), np.asarray(lse)


def with_gradients(implementation: str, inputs: dict, directions: tuple, **options) -> tuple[tuple, dict]:
    """As `forward`, and the gradients of `sum(directions * results)` by each of `inputs`; a ScoreMod may be one."""
    results, gradients = _with_gradients(inputs, options, directions, implementation)
    return tuple(np.asarray(x) for x in results), jax.tree.map(np.asarray, gradients)


def close(actual, expected, dtype: str = "float32", what: str = "") -> None:
    """Equal shape, and equal within the tolerance of the dtype relative to the largest element; NaN only where NaN."""
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * largest, err_msg=what)


def agrees_with_oracle(
    implementation: str, shape: Shape, dtype: str = "float32", *, pairs=True, kept=1.0, bias=None, scale=None, **options
) -> None:
    """Output, log-sum-exp and all gradients are those of the oracle, in the dtypes that are promised.

    `pairs` and `kept` tell the oracle what the mask and the dropout in `options` amount to.
    """
    inputs, directions = arrays(shape, dtype), cotangents(shape, dtype)
    given = {name: x for name, x in (("bias", bias), ("scale", scale)) if x is not None}
    (output, lse), gradients = with_gradients(implementation, inputs | given, directions, **options)
    expected = oracle.attention(**inputs, **given, visible=pairs, kept=kept)
    expected_gradients = oracle.attention_gradients(
        **inputs, **given, d_output=directions[0], d_lse=directions[1], visible=pairs, kept=kept
    )
    assert output.dtype == NUMPY_DTYPES[dtype]
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    close(output, expected.output, dtype, "output")
    close(lse, expected.lse, "float64" if dtype == "float64" else "float32", "lse")
    for name, gradient in gradients.items():
        close(gradient, expected_gradients[name], dtype, f"gradient of {name}")


def equal(actual, expected) -> None:
    """Two trees are bitwise equal, but for the sign of zeros."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def spoil(inputs: dict, index: tuple, garbage: float, *names: str) -> dict:
    """Copies of the inputs with `garbage` at an index `[batch, token, head]` of the named ones."""
    spoilt = {name: inputs[name].copy() for name in names}
    for x in spoilt.values():
        x[index] = garbage
    return inputs | spoilt
