"""The contract as a GPU keeps it: results and gradients of small calls against the oracle, in the dtypes of a GPU.

`pytest -m gpu` runs them on an NVIDIA GPU; the kernel for Hopper needs compute capability 9.0. Without a GPU,
SEQATTN_INTERPRET=1 runs that kernel in Pallas's interpreter, in seconds to a minute for a call.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.kernels import hopper
from seqattn.kernels.call import Call
from seqattn.kernels.dispatch import IMPLEMENTATIONS, Implementation
from seqattn.kernels.hopper import plan as plans
from seqattn.kernels.hopper.plan import Tiling
from seqattn.masks import Causal, Prefix, SameSegment, SlidingWindow
from seqattn.score_mod import ScoreFunction
from seqattn.score_mods import Alibi
from tests import oracle
from tests.contract import TOLERANCE, Shape, arrays, close, cotangents

pytestmark = pytest.mark.gpu

ON_GPU = jax.default_backend() == "gpu"
INTERPRETED = not ON_GPU and os.environ.get("SEQATTN_INTERPRET") == "1"
LENGTH, HEADS, WINDOW, CAP = (307, (4, 2), 101, 2.0) if ON_GPU else (13, (2, 1), 7, 2.0)
"""Odd lengths: two whole tiles of keys and a part, and three blocks of queries; in the interpreter fewer."""


@dataclass(frozen=True)
class Case:
    """A call of attention, and what it amounts to.

    Attributes:
        options: further arguments of `attend`, from arrays that the compiled program receives.
        sees: the pairs that may attend, `[B, 1, T, S]` or fewer dims.
        given: those arrays. Gradients of floating ones are compared, too.
        distances: multiples of the slopes that are added to scores, `[T, S]`.
    """

    options: Callable[..., dict[str, Any]]
    sees: Any
    given: dict[str, np.ndarray] = field(default_factory=dict)
    distances: Any = 0.0


def back() -> np.ndarray:
    return np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))


def documents() -> np.ndarray:
    """Two texts and padding in the first row, three texts in the second; the borders are inside of tiles."""
    first = np.repeat([1, 2, 0], [LENGTH // 2 + 2, LENGTH // 3, LENGTH - LENGTH // 2 - 2 - LENGTH // 3])
    second = np.repeat([1, 2, 3], [5, LENGTH // 3, LENGTH - 5 - LENGTH // 3])
    return np.stack([first, second]).astype(np.int32)


def in_documents(segment: Any) -> dict[str, Any]:
    at = Coordinates.from_segments(segment)
    return {"mask": Causal() & SameSegment(), "q_at": at, "kv_at": at}


def capped(cap: Any) -> dict[str, Any]:
    mod = ScoreFunction(lambda score, query, key, head, cap: cap * jnp.tanh(score / cap), cap)
    return {"mask": Causal(), "score_mod": mod}


def case_of(name: str) -> Case:
    causal, segment = back() >= 0, documents()
    lengths = np.array([LENGTH // 2, 3], np.int32)
    same = (segment[:, :, None] == segment[:, None]) & (segment[:, :, None] != 0)
    prefix = causal | (np.arange(LENGTH) < lengths[:, None, None])
    slopes = np.array([0.5, 0.25, 0.125, 0.03], np.float32)[: HEADS[0]]
    return {
        "full": lambda: Case(lambda: {}, True),
        "causal": lambda: Case(lambda: {"mask": Causal()}, causal),
        "window": lambda: Case(lambda: {"mask": Causal() & SlidingWindow(WINDOW)}, causal & (back() < WINDOW)),
        "documents": lambda: Case(in_documents, (causal & same)[:, None], {"segment": segment}),
        "prefix": lambda: Case(
            lambda lengths: {"mask": Causal() | Prefix(lengths)}, prefix[:, None], {"lengths": lengths}
        ),
        "alibi": lambda: Case(
            lambda slopes: {"mask": Causal(), "score_mod": Alibi(slopes)}, causal, {"slopes": slopes}, -back()
        ),
        "cap": lambda: Case(capped, causal, {"cap": np.float32(CAP)}),
    }[name]()


@pytest.fixture
def device(monkeypatch):
    """The GPU, or the interpreter with small tiles, which multiplies any: each slot of shared memory is used again."""
    if not ON_GPU:
        monkeypatch.setattr(plans, "TILINGS", {dim: Tiling(8, 8, 2) for dim in plans.TILINGS})
        monkeypatch.setitem(IMPLEMENTATIONS, "hopper", Implementation(interpreted))


def interpreted(call: Call) -> Any:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return hopper.attend(call, interpret=InterpretGPUParams())


@functools.partial(jax.jit, static_argnames=("implementation", "name"))
def with_gradients(inputs: dict, given: dict, directions: tuple, implementation: str, name: str) -> Any:
    learned = {name: x for name, x in given.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def call(inputs, learned):
        options = case_of(name).options(**(given | learned))
        return attend(**inputs, **options, implementation=implementation, return_lse=True)

    results, pull = jax.vjp(call, inputs, learned)
    of_inputs, of_learned = pull(directions)
    return results, of_inputs | of_learned


def expected(case: Case, inputs: dict, directions: tuple) -> tuple[Any, dict[str, np.ndarray]]:
    """Output, log-sum-exp and gradients by the oracle, in float64."""
    slopes = case.given.get("slopes", np.zeros(HEADS[0])).astype(np.float64)
    added = slopes[:, None, None] * case.distances + np.zeros((2, HEADS[0], LENGTH, LENGTH))
    options = {"visible": case.sees, "bias": added, "cap": float(case.given.get("cap", np.inf))}
    results = oracle.attention(**inputs, **options)
    gradients = oracle.attention_gradients(**inputs, **options, d_output=directions[0], d_lse=directions[1])
    gradients["slopes"] = (gradients["bias"] * case.distances).sum(axis=(0, 2, 3))
    return results, gradients


HOPPER = [
    *((name, dim, "bfloat16") for dim in (64, 128, 256) for name in "causal window documents alibi cap prefix".split()),
    *((name, 128, "float16") for name in "full causal window documents alibi cap prefix".split()),
    *(("documents", dim, "float16") for dim in (64, 256)),
]
OTHERS = [
    *(("chunked", name, 64, "bfloat16") for name in "causal window documents alibi cap prefix".split()),
    *(("cudnn", name, dim, "bfloat16") for name in ("full", "causal", "window") for dim in (64, 128)),
    ("cudnn", "causal", 128, "float16"),
]
CASES = [("hopper", *case) for case in HOPPER] + OTHERS


@pytest.mark.parametrize(
    ("implementation", "name", "dim", "dtype"), CASES, ids=[f"{a}-{b}-h{c}-{d}" for a, b, c, d in CASES]
)
def test_results_and_gradients_on_a_gpu(device, implementation, name, dim, dtype):
    if not ON_GPU and (not INTERPRETED or implementation == "cudnn"):
        pytest.skip("there is no GPU; SEQATTN_INTERPRET=1 interprets the kernel for Hopper")
    shape, case = Shape(T=LENGTH, S=LENGTH, N=HEADS[0], K=HEADS[1], H=dim, V=dim), case_of(name)
    inputs, directions = arrays(shape, dtype), cotangents(shape, dtype)
    if name == "documents":
        # The last tokens of the first row are padding. Nothing of them may reach a result.
        for spoilt in ("key", "value"):
            inputs[spoilt][0, -1] = np.nan
    results, gradients = jax.device_get(with_gradients(inputs, case.given, directions, implementation, name))
    wanted, wanted_gradients = expected(case, inputs, directions)
    close(results[0], wanted.output, dtype, "output")
    # The GPU approximates exponentials, and a tanh to 2**-11.
    finite = np.isfinite(wanted.lse)
    np.testing.assert_array_equal(np.isneginf(results[1]), ~finite)
    np.testing.assert_allclose(results[1][finite], wanted.lse[finite], atol=5e-3 if name == "cap" else 1e-3)
    for which in ("query", "key", "value"):
        assert gradients[which].dtype == inputs[which].dtype
        close(gradients[which], wanted_gradients[which], dtype, f"gradient of {which}")
    for which in gradients.keys() - inputs.keys():
        # A sum over all pairs, of terms with both signs.
        error = np.abs(gradients[which] - wanted_gradients[which]).max()
        assert error <= 4 * TOLERANCE[dtype] * np.abs(wanted_gradients[which]).max(), f"gradient of {which}"
