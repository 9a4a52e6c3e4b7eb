"""A function of the user's is traced at each call: what it reads may have changed, and what is compiled is shared."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.kernels.chunked import kernel
from seqattn.mask import Mask, MaskMod
from seqattn.masks import Causal, Prefix
from seqattn.score_mod import ScoreFunction
from tests.contract import close, every_implementation

B, T, N, H = 2, 70, 2, 3
"""More pairs than `chunked` leaves to other kernels, where nobody names one."""


@functools.cache
def _query():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, N, H)), jnp.float32)


class _Array:
    """A score function that reads an array of JAX's, which is another one later."""

    def __init__(self):
        self.slopes = jnp.array([0.1, 0.2])

    def options(self):
        return {"score_mod": self.modify}

    def modify(self, score, query, key, head):
        return score - jnp.asarray(self.slopes)[head] * (query.position - key.position).astype(score.dtype)

    def change(self):
        self.slopes = self.slopes * 5


class _Overwritten(_Array):
    """One that reads a NumPy array, which is written over."""

    def __init__(self):
        self.slopes = np.array([0.1, 0.2], np.float32)

    def change(self):
        self.slopes *= 5


class _Parameter(nnx.Module):
    """A bound method that reads a parameter, which is updated in place."""

    def __init__(self):
        self.slopes = nnx.Param(jnp.array([0.1, 0.2]))

    def options(self):
        return {"score_mod": self.modify}

    def modify(self, score, query, key, head):
        return score - self.slopes[head] * (query.position - key.position).astype(score.dtype)

    def change(self):
        self.slopes[...] = self.slopes[...] * 5


class _Number:
    """A mask that reads a number of Python's."""

    def __init__(self):
        self.window = 3

    def options(self):
        return {"mask": MaskMod(self.allows)}

    def allows(self, query, key):
        return query.position - key.position < self.window

    def change(self):
        self.window = 17


class _Scalar(_Number):
    """A mask that reads a scalar array."""

    def __init__(self):
        self.window = jnp.int32(3)

    def change(self):
        self.window = jnp.int32(17)


CHANGING = [_Array, _Overwritten, _Parameter, _Number, _Scalar]


def _call(implementation, changing, query):
    options = {"mask": Causal()} | changing.options()
    return attend(query, query, query, **options, implementation=implementation)


def _gradient(implementation, changing, query):
    return jax.grad(lambda query: jnp.sum(_call(implementation, changing, query) ** 2))(query)


def _jitted(implementation, changing, query):
    return jax.jit(lambda query: _call(implementation, changing, query))(query)


@functools.partial(every_implementation, slow=["ring", "tpu", "hopper"])
@pytest.mark.parametrize("call", [_call, _gradient, _jitted])
@pytest.mark.parametrize("kind", CHANGING)
def test_the_same_function_is_asked_again_after_what_it_reads_has_changed(implementation, kind, call):
    changing = kind()
    before = np.asarray(call(implementation, changing, _query()))
    changing.change()
    after, expected = (np.asarray(call(name, changing, _query())) for name in (implementation, "reference"))
    close(after, expected)
    assert np.abs(after - before).max() > 1e-2


def test_no_implementation_is_named_in_the_report_of_users():
    """The kernel that `None` takes for calls of real sizes, and small ones, which others serve."""
    for length in (5, T):
        changing, query = _Array(), _query()[:, :length]
        before = _call(None, changing, query)
        changing.change()
        close(_call(None, changing, query), _call("reference", changing, query))
        assert np.abs(_call(None, changing, query) - before).max() > 1e-2


OPERATIONS = [
    lambda score, array, i: score + array[i],
    lambda score, array, i: score * jnp.tanh(array[i]),
    lambda score, array, i: jnp.where(array[i] > 0, score, score - 1.0),
    lambda score, array, i: jnp.logaddexp(score, array[i]),
    lambda score, array, i: jax.jit(lambda x, y: jax.nn.silu(x) + y)(score, array.sum()),
    lambda score, array, i: jax.lax.cond(array[i] > 0, lambda x: 2.0 * x, lambda x: x - 3.0, score),
    lambda score, array, i: jax.lax.fori_loop(0, 2, lambda n, x: x + array[i], score),
]


class _Random:
    """A random function, whose arrays and numbers are drawn anew between calls: its form stays."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.chosen = self.random.integers(len(OPERATIONS), size=2)
        self.change()

    def change(self):
        self.arrays = [jnp.asarray(self.random.normal(size=5), jnp.float32), self.random.normal(size=5).astype("f4")]
        self.number, self.size = float(self.random.uniform(0.2, 0.8)), jnp.int32(self.random.integers(1, 9))

    def modify(self, score, query, key, head):
        for operation, array in zip(self.chosen, self.arrays, strict=True):
            score = OPERATIONS[operation](score, jnp.asarray(array), (query.position + head) % 5)
        return score * self.number

    def allows(self, query, key):
        return (query.position - key.position) % (self.size + 1) != 0


@functools.partial(every_implementation, slow=["ring", "tpu", "hopper"])
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2))])
def test_random_functions_whose_captured_values_change(implementation, seed):
    """Eager and jitted, values and gradients by the query and by a captured array."""
    drawn, query = _Random(seed), _query()[:, :11]
    at = {"q_at": Coordinates.range(11), "kv_at": Coordinates.range(11)}

    def loss(name, query, extra):
        mod = ScoreFunction(lambda *pair: drawn.modify(*pair) + extra[pair[-1]])
        output = attend(query, query, query, mask=MaskMod(drawn.allows), score_mod=mod, **at, implementation=name)
        return jnp.sum(output**2)

    for jitted in (False, True, False):
        drawn.change()
        found, expected = [], []
        for name, results in ((implementation, found), ("reference", expected)):
            fn = jax.value_and_grad(functools.partial(loss, name), (0, 1))
            results.append((jax.jit(fn) if jitted else fn)(query, jnp.linspace(0, 1, 5)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@functools.partial(every_implementation, slow=["ring"])
@pytest.mark.parametrize("inner", ["jit", "piecewise"])
def test_a_table_that_is_written_over_is_read_anew_inside_an_inner_jit(implementation, inner):
    table = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)

    def modify(score, query, key, head):
        if inner == "jit":
            return score * jax.jit(lambda head: jnp.asarray(table)[head])(head)
        branches = [lambda x: x * jnp.asarray(table)[0], lambda x: x * jnp.asarray(table)[3]]
        return jnp.piecewise(score, [score < 0, score >= 0], branches)

    for _ in range(2):
        found, expected = (
            attend(_query(), _query(), _query(), mask=Causal(), score_mod=modify, implementation=name)
            for name in (implementation, "reference")
        )
        close(found, expected)
        table *= 5


def test_a_loop_with_changing_arrays_compiles_once():
    """Eager calls share a program as long as only the values of arrays change; a jitted loop has one anyway."""
    kernel._results.clear_cache()
    factor = np.ones(N, np.float32)

    def modify(score, query, key, head):
        return score * jnp.asarray(factor)[head] + scalar

    for i in range(4):
        factor, scalar = factor + 1, jnp.float32(i)
        attend(_query(), _query(), _query(), score_mod=modify, implementation="chunked")
    assert kernel._results._cache_size() == 1
    traced = itertools.count()

    @jax.jit
    def step(query, factors):
        next(traced)
        mod = ScoreFunction(lambda score, query, key, head: score * factors[head])
        return attend(query, query, query, score_mod=mod, implementation="chunked")

    for i in range(4):
        step(_query(), jnp.full(N, float(i)))
    assert next(traced) == 1


def test_a_function_with_a_derivative_rule_of_its_own_compiles_once():
    """Whether two rules are alike nobody can say, but where nothing is differentiated they do not matter."""
    kernel._results.clear_cache()
    for _ in range(3):
        attend(_query(), _query(), _query(), score_mod=lambda score, *_: jax.nn.relu(score), implementation="chunked")
    assert kernel._results._cache_size() == 1
    mod = {"score_mod": lambda score, *_: jax.nn.relu(score)}
    found, expected = (
        jax.grad(lambda x, name=name: jnp.sum(attend(x, x, x, **mod, implementation=name) ** 2))(_query())
        for name in ("chunked", "reference")
    )
    close(found, expected)


@pytest.mark.parametrize("length", [3, np.int64(3), jnp.int32(3), np.array([3, 50]), jnp.array([3, 50])], ids=repr)
def test_a_mask_whose_values_are_checked_where_they_are_known_is_traced_from_values_that_are_not(length):
    mask = Causal() | Prefix(length)
    expected = attend(_query(), _query(), _query(), mask=mask, implementation="reference")
    close(attend(_query(), _query(), _query(), mask=mask), expected)
    close(jax.jit(lambda x: attend(x, x, x, mask=mask, implementation="chunked"))(_query()), expected)


def test_a_mask_that_jax_does_not_know_as_a_pytree():
    class Window(Mask):
        size = 3

        def __call__(self, query, key):
            return query.position - key.position < self.size

    mask = Window()
    before = attend(_query(), _query(), _query(), mask=mask, implementation="chunked")
    mask.size = 9
    after = attend(_query(), _query(), _query(), mask=mask, implementation="chunked")
    close(after, attend(_query(), _query(), _query(), mask=mask, implementation="reference"))
    assert np.abs(after - before).max() > 1e-2
