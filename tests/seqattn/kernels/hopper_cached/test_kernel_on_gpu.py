"""The kernel over a cache as a GPU runs it: results of small calls against the oracle, in the dtypes of a GPU.

`pytest -m gpu` runs them on an NVIDIA GPU of compute capability 9.0. Without a GPU, SEQATTN_INTERPRET=1 runs the kernel
in Pallas's interpreter, in seconds for a call.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.kernels import hopper_cached
from seqattn.kernels.call import Call, Columns
from seqattn.kernels.hopper_cached import kernel
from seqattn.kernels.hopper_cached import plan as plans
from seqattn.kernels.hopper_cached.plan import Tiling
from tests import oracle
from tests.contract import close

pytestmark = pytest.mark.gpu

ON_GPU = jax.default_backend() == "gpu"
INTERPRETED = not ON_GPU and os.environ.get("SEQATTN_INTERPRET") == "1"
B, K, SLOTS = (5, 2, 576) if ON_GPU else (2, 1, 48)
"""Nine tiles, or three in the interpreter: each place of the ring is used again."""

MASKS = {
    # Rows of different lengths; the second one is empty.
    "lengths": lambda length, heads: (
        np.arange(SLOTS)
        < (np.array([SLOTS - 9, 0, 1, 70, SLOTS])[:B, None, None, None] - np.arange(length)[::-1, None])
    ),
    # Each query is a hypothesis with pages of its own.
    "pages": lambda length, heads: np.random.default_rng(1).random((B, 1, length, SLOTS)) < 0.2,
    "heads": lambda length, heads: np.random.default_rng(2).random((B, heads, length, SLOTS)) < 0.7,
    "none": lambda length, heads: None,
}

CASES = [
    *(("lengths", 1, 1, dim, dtype) for dim in (64, 128, 256) for dtype in ("bfloat16", "float16")),
    *(("lengths", 3, 4, dim, "bfloat16") for dim in (64, 128, 256)),
    *(("pages", 8, 8, dim, "bfloat16") for dim in (64, 128, 256)),
    *(("heads", 5, 3, dim, "float16") for dim in (64, 128)),
    *(("none", 1, 2, dim, "bfloat16") for dim in (64, 128)),
]


@pytest.fixture
def options(monkeypatch):
    """The GPU, or the interpreter with small tiles, which multiplies any."""
    if ON_GPU:
        return {}
    if not INTERPRETED:
        pytest.skip("there is no GPU; SEQATTN_INTERPRET=1 interprets the kernel")
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    for where in (plans, kernel):
        monkeypatch.setattr(where, "TILINGS", {dim: Tiling(64, 16, 2) for dim in plans.TILINGS})
    return {"interpret": InterpretGPUParams()}


@pytest.mark.parametrize("parts", [1, 4], ids=["one_part", "four_parts"])
@pytest.mark.parametrize(("mask", "length", "group", "dim", "dtype"), CASES)
def test_results_over_a_cache_on_a_gpu(options, monkeypatch, mask, length, group, dim, dtype, parts):
    monkeypatch.setattr(plans, "_BLOCKS", parts * B * K)
    random = np.random.default_rng(0)
    shapes = (B, length, K * group, dim), (B, K, dim, SLOTS), (B, K, SLOTS, dim)
    query, key, value = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    visible, lost = MASKS[mask](length, K * group), np.zeros((B, SLOTS), bool)
    if visible is not None:
        # Seen by some rows of the first batch row, or by none. The cache holds 0 there.
        lost[0, -10] = True
        key, value = (jnp.where(x, 0, y) for x, y in ((lost[:, None, None], key), (lost[:, None, :, None], value)))
    call = Call.of_columns(
        query,
        Columns(key, value, jnp.asarray(~lost)),
        mask=None if visible is None else jnp.asarray(visible),
        **dict.fromkeys(("score_mod", "q_at", "kv_at", "dropout")),
    )
    output, lse = jax.device_get(jax.jit(functools.partial(hopper_cached.attend, **options))(call))
    rows = np.where(lost[..., None, None], np.nan, np.asarray(key.transpose(0, 3, 1, 2), np.float64))
    arrays = np.asarray(query, np.float64), rows, np.asarray(value.swapaxes(1, 2), np.float64)
    wanted = oracle.attention(*arrays, visible=True if visible is None else visible)
    close(output, wanted.output, dtype)
    empty = np.isneginf(wanted.lse)
    assert (lse[empty] == np.finfo(np.float32).min).all()
    assert empty.any() == (mask == "lengths")
    # The GPU approximates exponentials.
    np.testing.assert_allclose(lse[~empty], wanted.lse[~empty], atol=1e-3)
