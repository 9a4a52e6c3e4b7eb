"""Multi-head attention as parameters around `attend`: project once, attend as often as needed."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seqattn.attention import attend, attend_columns, attention_weights
from seqattn.checks import check_even, check_multiple, check_rate, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.call import Call, Columns, check_heads
from seqattn.kernels.dispatch import Explanation, call_of, explain_call
from seqattn.mask import Mask
from seqattn.nn.cache import Cache
from seqattn.nn.key_value import KeyColumns, KeyValue, Written
from seqattn.nn.linear import Linear
from seqattn.nn.parameter_rule import INTO, OUT_OF, Kind, ParameterRule
from seqattn.positions import angular_frequencies, rotate
from seqattn.precision import accumulator
from seqattn.score_mod import ScoreMod

RULES = (
    # Heads `[D, N * H]` are split, and come together again.
    ParameterRule("*attention/output/kernel", Kind.MATRIX, OUT_OF),
    ParameterRule("*attention/*/kernel", Kind.MATRIX, INTO),
)

Model = TypeVar("Model", bound=nnx.Module)


class MultiHeadAttention(nnx.Module):
    """Queries of `x` attend to keys and values, in `num_heads` subspaces (Vaswani 2017, section 3.2.2).

    The keys and values come from `project`, and it is the caller who says where they live:

    - self attention: `attention(x, at, attention.project(x, at))`
    - a cached step: `cache, kv = cache.append(attention.project(x, at)); attention(x, at, kv)` (nn/cache.py)
    - cross attention: `memory = attention.project(encoded, source_at)` once, then `attention(x, at, memory)`

    Args:
        model_dim: D, the size of input and output.
        num_heads: N, query heads.
        num_kv_heads: K, key heads shared by groups of query heads (Ainslie 2023); N where not given.
        head_dim: H; `model_dim / num_heads` where not given.
        mask: who may look at whom; None lets every query see every key, padding included.
        rotary_base: RoPE on queries and keys (Su 2021) with this base; None for no rotation.
        qk_norm: RMS norm of each query and key head (Dehghani 2023).
        use_bias: biases of the four projections.
        dropout_rate: of the attention weights, where a call has a dropout key.
        implementation: as in `seqattn.attend`.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters (Xavier uniform); not kept.

    Raises:
        ValueError: heads do not divide, an odd head_dim is to be rotated, or a rate is not a probability.

    >>> from seqattn.masks import Causal, SameSegment
    >>> attention = MultiHeadAttention(8, num_heads=2, mask=Causal() & SameSegment(), rngs=nnx.Rngs(0))
    >>> x, at = jnp.ones((3, 5, 8)), Coordinates.from_lengths([5, 2, 0], 5)
    >>> attention(x, at, attention.project(x, at)).shape
    (3, 5, 8)
    """

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask | None = None,
        rotary_base: float | None = None,
        qk_norm: bool = False,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        implementation: str | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(model_dim=model_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        check_heads(num_heads, num_kv_heads)
        check_rate(dropout_rate)
        if head_dim is None:
            check_multiple("model_dim", model_dim, num_heads, "num_heads", ", or give head_dim")
        self.head_dim = model_dim // num_heads if head_dim is None else head_dim
        check_sizes(head_dim=self.head_dim)
        if rotary_base is not None:
            check_even("head_dim", self.head_dim, " to be rotated, a pair of features at a time")
            angular_frequencies(self.head_dim, base=rotary_base)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        # A mask that captures arrays is data for NNX; one of static sizes must not become a leaf of the module.
        self.mask = nnx.data(mask) if jax.tree.leaves(mask) else mask
        self.rotary_base, self.dropout_rate, self.implementation = rotary_base, dropout_rate, implementation

        def linear(inputs: int, outputs: int) -> Linear:
            init = nnx.initializers.xavier_uniform()
            return Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, param_dtype=param_dtype, rngs=rngs)

        self.query = linear(model_dim, num_heads * self.head_dim)
        self.key = linear(model_dim, num_kv_heads * self.head_dim)
        self.value = linear(model_dim, num_kv_heads * self.head_dim)
        self.output = linear(num_heads * self.head_dim, model_dim)
        self.query_norm = nnx.RMSNorm(self.head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else None
        self.key_norm = nnx.RMSNorm(self.head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else None

    def project(self, x: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """Keys and values `[*batch, S, K, H]` of the tokens `x` `[*batch, S, D]` at their coordinates."""
        kv = self._unrotated(x, at)
        return KeyValue(self._rotated(kv.key, kv.at), kv.value, kv.at)

    def extend(self, cache: Cache, x: Float[Array, "B T D"], at: Coordinates) -> tuple[Cache, KeyColumns]:
        """The cache with the tokens `x` `[B, T, D]`, and what they attend to."""
        return cache.append(self.project(x, at))

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns,
        *,
        score_mod: ScoreMod | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch T D"]:
        """What the tokens `x` `[*batch, T, D]` find in `kv`; `[*batch, T, D]`. Without a dropout key nothing drops.

        Few tokens read the columns of a cache as they lie. A `score_mod` modifies the scores, as in `seqattn.attend`.
        """
        query = self._rotated(self._heads(self.query(x), self.query_norm), at)
        dropout = None if dropout_key is None else Dropout(self.dropout_rate, dropout_key)
        options: dict[str, Any] = {"dropout": dropout, "implementation": self.implementation}
        if isinstance(kv, KeyColumns):
            options |= _located(_of_slots(self.mask, at, kv, self.num_heads), at, kv.at, score_mod)
            output = attend_columns(query, Columns(kv.key, kv.value, kv.finite), **options)
        else:
            output = attend(query, kv.key, kv.value, **options, **_located(self._mask_over(kv), at, kv.at, score_mod))
        return self.output(output.reshape(*x.shape[:-1], self.num_heads * self.head_dim))

    def explain(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns,
        *,
        score_mod: ScoreMod | None = None,
        dropout_key: PRNGKeyArray | None = None,
        platform: str | None = None,
    ) -> Explanation:
        """Which kernel the same call takes, and why not another; `platform` is as in `seqattn.explain`."""
        dropout = None if dropout_key is None else Dropout(self.dropout_rate, dropout_key)

        def call(x: Array) -> Call:
            query = self._rotated(self._heads(self.query(x), self.query_norm), at)
            if isinstance(kv, KeyColumns):
                located = _located(_of_slots(self.mask, at, kv, self.num_heads), at, kv.at, score_mod)
                columns = Columns(kv.key, kv.value, kv.finite)
                return Call.of_columns(query, columns, **{"q_at": None, "kv_at": None} | located, dropout=dropout)
            located = _located(self._mask_over(kv), at, kv.at, score_mod)
            return call_of(query, kv.key, kv.value, **located, dropout=dropout)

        return explain_call(self.implementation, call, (x,), platform=platform)

    def weights(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns,
        *,
        score_mod: ScoreMod | None = None,
    ) -> Float[Array, "*batch N T S"]:
        """The attention weights of the same call, for looking at; `[*batch, N, T, S]`."""
        query = self._rotated(self._heads(self.query(x), self.query_norm), at)
        if isinstance(kv, KeyColumns):
            mask: Mask | Array | None = _of_slots(self.mask, at, kv, self.num_heads)
            key = kv.rows().key
            if key.dtype != query.dtype:  # a cache may have a dtype of its own
                wider = np.promote_types(accumulator(query.dtype), accumulator(key.dtype))
                query, key = query.astype(wider), key.astype(wider)
            return attention_weights(query, key, **_located(mask, at, kv.at, score_mod))
        return attention_weights(query, kv.key, **_located(self._mask_over(kv), at, kv.at, score_mod))

    def _mask_over(self, kv: KeyValue) -> Mask | None:
        return _among_written(self.mask) if kv.of_cache else self.mask

    def _unrotated(self, x: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        key, value = self._heads(self.key(x), self.key_norm), self._heads(self.value(x), None)
        return KeyValue(key, value, jax.tree.map(lambda field: jnp.broadcast_to(field, x.shape[:-1]), at))

    def _heads(self, x: Array, norm: nnx.RMSNorm | None) -> Array:
        heads = x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)
        return heads if norm is None else norm(heads)

    def _rotated(self, heads: Array, at: Coordinates) -> Array:
        return heads if self.rotary_base is None else rotate(heads, jnp.asarray(at.position), base=self.rotary_base)


def with_implementation(
    model: Model, implementation: str | None, of: type[MultiHeadAttention] = MultiHeadAttention
) -> Model:
    """A model like `model` whose attention modules run an implementation of `seqattn.attend`; `model` stays as it is.

    Args:
        model: any module; its parameters are shared, not copied.
        implementation: as in `seqattn.attend`.
        of: the kind of attention that changes.

    >>> attention = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> with_implementation(attention, "reference").implementation, attention.implementation
    ('reference', None)
    """
    changed = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(changed):
        if isinstance(module, of):
            module.implementation = implementation
    return changed


def _of_slots(mask: Mask | None, at: Coordinates, kv: KeyColumns, num_heads: int) -> Mask | Array:
    """The mask over the slots of a cache; an array where queries stand for hypotheses, which see their own slots."""
    written = _among_written(mask)
    if kv.visible is None:
        return written
    q_at, kv_at = (jax.tree.map(jnp.atleast_2d, each) for each in (at, kv.at))
    return written.over(q_at, kv_at, batch=kv.visible.shape[0], num_heads=num_heads) & kv.visible[:, None]


def _among_written(mask: Mask | None) -> Mask:
    """The mask, but a slot that was never written is no key, whatever the mask says of padding."""
    return Written() if mask is None else mask & Written()


def _located(
    mask: Mask | Array | None, q_at: Coordinates, kv_at: Coordinates, score_mod: ScoreMod | None
) -> dict[str, Any]:
    """Mask, score modification and, where these read them, coordinates: the arguments of `attend`."""
    read = isinstance(mask, Mask) or (score_mod is not None and ScoreMod.of(score_mod).uses_coordinates)
    return {"mask": mask, "score_mod": score_mod} | ({"q_at": q_at, "kv_at": kv_at} if read else {})
