"""The public functions of attention: what they refuse, and what they accept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend, attention_weights
from seqattn.coordinates import Coordinates
from seqattn.drop_in import dot_product_attention
from seqattn.kernels.dispatch import IMPLEMENTATIONS
from seqattn.masks import Causal, Prefix, SlidingWindow
from tests import oracle
from tests.contract import SHAPES, Shape, arrays, close, random_pairs

SHAPE = SHAPES["grouped"]
B, T, S, N, K, H, V = *SHAPE.batch, SHAPE.T, SHAPE.S, SHAPE.N, SHAPE.K, SHAPE.H, SHAPE.V


def _ones(shape=SHAPE, dtype=jnp.float32):
    return {name: jnp.ones(x.shape, dtype) for name, x in arrays(shape).items()}


@pytest.mark.parametrize("function", [attend, dot_product_attention])
def test_a6_a_mask_of_numbers_to_add_is_refused(function):
    """Cast to boolean, -inf would become True."""
    numbers = jnp.where(jnp.tri(T, S) > 0, 0.0, -jnp.inf)
    with pytest.raises(TypeError, match=r"mask must be boolean, True where a query may attend, got float32; .* a bias"):
        function(**_ones(), mask=numbers)


@pytest.mark.parametrize("function", [attend, dot_product_attention])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_a7_a_mask_of_integers_is_refused_and_the_convention_stated(function, dtype):
    with pytest.raises(TypeError, match=r"mask must be boolean, True where a query may attend, got u?int"):
        function(**_ones(), mask=jnp.ones((T, S), dtype))


@pytest.mark.parametrize("function", [attend, dot_product_attention])
def test_a8_a_mask_of_three_dims_beside_a_batch_is_refused(function):
    """[B, T, S] would be read as [N, T, S] where B equals N."""
    inputs = _ones(Shape(batch=(3,), T=5, S=7, N=3, K=1))
    for name, x in (("mask", jnp.ones((3, 5, 7), bool)), ("bias", jnp.ones((3, 5, 7)))):
        with pytest.raises(ValueError, match=rf"{name} \(3, 5, 7\) must be \[T, S\] \(5, 7\) or \[\*batch, N, T, S\]"):
            function(**inputs, **{name: x})


@pytest.mark.parametrize("shape", [(T, S + 1), (B, N, S, T), (B, K, T, S), (S,), (1, B, N, T, S)], ids=str)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_a_mask_or_bias_that_does_not_fit_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"{name} .* must be \[T, S\]"):
        attend(**_ones(), **{name: jnp.ones(shape, bool if name == "mask" else jnp.float32)})


def test_a_boolean_bias_is_refused():
    with pytest.raises(TypeError, match=r"bias must be floating .* got bool"):
        attend(**_ones(), bias=jnp.ones((T, S), bool))


def test_a26_integer_inputs_are_refused():
    for function in (attend, dot_product_attention):
        with pytest.raises(TypeError, match="query must be floating, got int32"):
            function(**_ones(dtype=jnp.int32))
    with pytest.raises(TypeError, match="dtypes must agree, got query float32, key bfloat16, value float32"):
        attend(**_ones() | {"key": jnp.ones((B, S, K, H), jnp.bfloat16)})


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 4), (2, 3), (1, 2), (0, 1)])
def test_a28_heads_that_do_not_divide_are_refused(num_heads, num_kv_heads):
    inputs = _ones(Shape(N=num_heads, K=num_kv_heads))
    with pytest.raises(ValueError, match=rf"num_heads \({num_heads}\) must be a multiple of .* \({num_kv_heads}\)"):
        attend(**inputs)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": (T, H)}, r"query must be \[\*batch, length, heads, dim\], got \(7, 5\)"),
        ({"query": (3, T, N, H)}, r"batch dims must agree, got query \(3, 7, 6, 5\)"),
        ({"query": (1, T, N, H)}, "batch dims must agree"),
        ({"value": (B, S + 1, K, V)}, "must agree but for the last dim"),
        ({"value": (B, S, N, V)}, "must agree but for the last dim"),
        ({"key": (B, S, K, H + 1)}, r"head_dim of query \(5\) and key \(6\) must be equal"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(changed, message):
    inputs = _ones() | {name: jnp.ones(shape) for name, shape in changed.items()}
    with pytest.raises(ValueError, match=message):
        attend(**inputs)


def test_the_alignment_of_two_lengths_is_never_guessed():
    with pytest.raises(ValueError, match="7 queries and 11 keys: say how they align with q_at and kv_at"):
        attend(**_ones(), mask=Causal())


def test_coordinates_that_would_be_ignored_are_refused():
    for mask in (None, jnp.ones((T, S), bool)):
        with pytest.raises(ValueError, match="q_at and kv_at only matter to a Mask"):
            attend(**_ones(), mask=mask, q_at=Coordinates.range(T), kv_at=Coordinates.range(S))


@pytest.mark.parametrize(
    ("q_at", "error", "message"),
    [
        (Coordinates.range(T + 1), ValueError, r"q_at \(8,\) must be \(7,\) or \(2, 7\)"),
        (Coordinates.from_lengths([1, 2, 3], T), ValueError, r"q_at \(3, 7\) must be"),
        (Coordinates(jnp.ones(T), jnp.ones(T)), TypeError, r"q_at must hold signed integers .*, got float32"),
        (Coordinates(*jnp.ones((2, T), jnp.uint32)), TypeError, r"q_at must hold signed integers .*, got uint32"),
    ],
    ids=["length", "batch", "floating", "unsigned"],
)
def test_coordinates_that_do_not_fit_are_refused(q_at, error, message):
    with pytest.raises(error, match=message):
        attend(**_ones(), mask=Causal(), q_at=q_at, kv_at=Coordinates.range(S))


@pytest.mark.usefixtures("as_users_call_it")
def test_a_scale_for_each_key_is_refused():
    """It would broadcast in silence."""
    for function in (attend, attention_weights):
        inputs = [x for name, x in _ones().items() if name != "value" or function is attend]
        with pytest.raises(ValueError, match=r"scale must be a scalar, got shape \(11,\)"):
            function(*inputs, scale=jnp.ones(S))


def test_coordinates_of_few_bits_do_not_overflow():
    """In int8 a window of 300 keys would be one of 44."""
    inputs, at = arrays(Shape(batch=(), T=101, S=101, N=1, K=1)), Coordinates.range(101)
    short = jax.tree.map(lambda x: x.astype(jnp.int8), at)
    call = jax.jit(functools.partial(attend, mask=SlidingWindow(300)))
    np.testing.assert_array_equal(call(**inputs, q_at=short, kv_at=short), call(**inputs, q_at=at, kv_at=at))


@pytest.mark.parametrize("implementation", ["nothing", ["reference", "nothing"]])
def test_an_unknown_implementation_is_refused_with_the_known_ones(implementation):
    with pytest.raises(ValueError, match=r"'nothing' is not one of .*reference"):
        attend(**_ones(), implementation=implementation)


def test_a_list_of_implementations_is_taken_in_its_order():
    output = jax.jit(functools.partial(attend, implementation=list(IMPLEMENTATIONS)))(**arrays(SHAPE))
    np.testing.assert_array_equal(output, jax.jit(attend)(**arrays(SHAPE)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_window_size": -1}, r"local_window_size to the left \(-1\) must be an integer of at least 0"),
        ({"local_window_size": (2, -1)}, r"local_window_size to the right \(-1\) must be an integer of at least 0"),
        ({"local_window_size": (-3, 1)}, r"local_window_size to the left \(-3\) must be an integer of at least 0"),
        ({"key_value_seq_lengths": jnp.array([S + 1, 1])}, r"a length \(12\) exceeds max_length \(11\)"),
        ({"query_seq_lengths": jnp.array([T + 1, 1])}, r"a length \(8\) exceeds max_length \(7\)"),
        ({"query_seq_lengths": jnp.array([-1, 1])}, "lengths must not be negative, got -1"),
        ({"query_seq_lengths": jnp.array([1])}, r"query_seq_lengths \(1,\) must have one length for each row"),
    ],
    ids=str,
)
def test_a25_windows_and_lengths_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**_ones(), **options)
    for size in (0, -1):
        with pytest.raises(ValueError, match=rf"sliding window \({size}\) must be an integer of at least 1"):
            SlidingWindow(size)


def test_lengths_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match="key_value_seq_lengths must be integers, got float32"):
        dot_product_attention(**_ones(), key_value_seq_lengths=jnp.ones(B))


def test_a10_causal_is_aligned_by_coordinates_first_with_first_or_last_with_last():
    inputs = arrays(SHAPE)

    @jax.jit
    def call(inputs, start):
        return attend(**inputs, mask=Causal(), q_at=Coordinates.range(T, start=start), kv_at=Coordinates.range(S))

    for start in (0, S - T):
        expected = oracle.attention(**inputs, visible=np.tril(np.ones((T, S), bool), start))
        close(call(inputs, start), expected.output, what=f"start {start}")
    top_left = jax.jit(functools.partial(dot_product_attention, is_causal=True))(**inputs)
    close(top_left, call(inputs, 0))


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("function", [attend, dot_product_attention])
def test_numpy_arrays_and_lists_are_taken_as_by_jax(function):
    inputs = arrays(SHAPE)
    pairs, bias = random_pairs(SHAPE), np.ones((T, S))
    expected = oracle.attention(**inputs, visible=pairs, bias=bias).output
    close(function(**inputs, mask=pairs.tolist(), bias=bias.tolist()), expected)
    close(function(**inputs, mask=pairs, bias=bias), expected)


def test_a_prefix_of_each_row_is_a_vmap_over_the_mask():
    inputs, lengths = arrays(Shape(T=S)), np.array([2, 5])
    output = jax.jit(jax.vmap(lambda inputs, length: attend(**inputs, mask=Causal() | Prefix(length))))(inputs, lengths)
    index = np.arange(S)
    pairs = (index <= index[:, None]) | (index < lengths[:, None, None])
    close(output, oracle.attention(**inputs, visible=pairs[:, None]).output)


def test_an_empty_choice_of_implementations_is_refused():
    with pytest.raises(ValueError, match="implementation is empty"):
        attend(**_ones(), implementation=[])


def test_coordinates_of_one_side_alone_are_refused():
    inputs = _ones(Shape(T=7, S=7))
    for name in ("q_at", "kv_at"):
        with pytest.raises(ValueError, match="both or neither"):
            attend(**inputs, mask=Causal(), **{name: Coordinates.range(7, start=2)})
