"""Multi-head attention: projections around `attend`. Project keys and values once, attend as often as needed."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seqattn.attention import attend, attend_columns, attention_weights
from seqattn.block_mask import block_mask as make_block_mask
from seqattn.checks import check_multiple, check_number, check_rate, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels.block_mask import BlockMask
from seqattn.kernels.call import Call, Columns, check_heads
from seqattn.kernels.dispatch import Explanation, call_of, explain_call
from seqattn.kernels.split import Split, repeats_keys
from seqattn.mask import Mask
from seqattn.nn.cache import Cache
from seqattn.nn.key_value import KeyColumns, KeyValue, Written
from seqattn.nn.linear import Linear
from seqattn.nn.parameter_rule import INTO, OUT_OF, Kind, ParameterRule
from seqattn.nn.rotary import Rotary
from seqattn.precision import accumulator
from seqattn.score_mod import ScoreMod

RULES = (
    # `tensor` splits the heads of `[D, N * H]`; the output projection sums over them.
    ParameterRule("*attention/output/kernel", Kind.MATRIX, OUT_OF),
    ParameterRule("*attention/*/kernel", Kind.MATRIX, INTO),
)

Model = TypeVar("Model", bound=nnx.Module)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention over given keys and values (Vaswani 2017, section 3.2.2).

    `project` computes the keys and values, and the caller decides where to keep them:

    - self-attention: `attention(x, at, attention.project(x, at))`
    - a cached step: `cache, kv = cache.append(attention.project(x, at)); attention(x, at, kv)` (see `Cache`)
    - cross-attention: `memory = attention.project(encoded, source_at)` once, then `attention(x, at, memory)`

    Args:
        model_dim: D, the size of input and output.
        num_heads: N, the number of query heads.
        num_kv_heads: K, the number of key heads. Groups of N / K query heads share one (grouped-query attention,
            Ainslie 2023; multi-query attention for K = 1, Shazeer 2019). Defaults to N.
        head_dim: H, the size of a head. Defaults to `model_dim / num_heads`.
        mask: which keys each query may attend to. If None, every query sees every key, including padding.
        scale: factor of the scores. Defaults to `head_dim ** -0.5`.
        rotary: rotates queries and keys by their positions (RoPE, Su 2021). If None, they are not rotated.
        qk_norm: if True, applies an RMS norm to each query and key head (Dehghani 2023).
        norm_epsilon: added to the mean square in these norms.
        use_bias: if True, the four projections have biases.
        key_bias: whether the key projection has a bias. Defaults to `use_bias`. Without rotations it has no effect on
            the weights: it adds the same to all scores of a query.
        output_bias: whether the output projection has a bias. Defaults to `use_bias`.
        dropout_rate: dropout rate of the attention weights, in [0, 1). Applies only in calls with a dropout key.
        implementation: the kernel, as in `seqattn.attend`. If None, the library chooses one.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters (Xavier uniform) and is not kept.

    Raises:
        ValueError: a size is below 1, the numbers of heads do not divide, `head_dim` is odd with rotations, the scale
            is not finite, or the dropout rate is not in [0, 1).

    >>> from seqattn.masks import Causal, SameSegment
    >>> attention = MultiHeadAttention(8, num_heads=2, mask=Causal() & SameSegment(), rngs=nnx.Rngs(0))
    >>> x, at = jnp.ones((3, 5, 8)), Coordinates.from_lengths([5, 2, 0], 5)
    >>> attention(x, at, attention.project(x, at)).shape
    (3, 5, 8)
    """

    keys_are_tokens = True
    """Whether each token has a key. If not, each call finds out where its keys are."""

    def __init__(
        self,
        model_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask | None = None,
        scale: float | None = None,
        rotary: Rotary | None = None,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        use_bias: bool = False,
        key_bias: bool | None = None,
        output_bias: bool | None = None,
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
        if rotary is not None:
            rotary.frequencies(self.head_dim)  # raises if the head cannot be rotated
        if scale is not None:
            check_number("scale", scale)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        # A mask that captures arrays is data for NNX. A mask of static sizes must not become a leaf of the module.
        self.mask = nnx.data(mask) if jax.tree.leaves(mask) else mask
        self.scale, self.rotary = scale, rotary
        self.dropout_rate, self.implementation = dropout_rate, implementation
        self.split: Split | None = None  # see `with_split`

        def linear(inputs: int, outputs: int, bias: bool | None = None) -> Linear:
            options: dict[str, Any] = {"use_bias": use_bias if bias is None else bias, "param_dtype": param_dtype}
            return Linear(inputs, outputs, kernel_init=nnx.initializers.xavier_uniform(), **options, rngs=rngs)

        self.query = linear(model_dim, num_heads * self.head_dim)
        self.key = linear(model_dim, num_kv_heads * self.head_dim, key_bias)
        self.value = linear(model_dim, num_kv_heads * self.head_dim)
        self.output = linear(num_heads * self.head_dim, model_dim, output_bias)
        norm: dict[str, Any] = {"epsilon": norm_epsilon, "param_dtype": param_dtype, "rngs": rngs}
        self.query_norm = nnx.RMSNorm(self.head_dim, **norm) if qk_norm else None
        self.key_norm = nnx.RMSNorm(self.head_dim, **norm) if qk_norm else None

    def project(self, x: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """Computes keys and values, with keys normalised and rotated as configured.

        Args:
            x: tokens `[*batch, S, D]`.
            at: their coordinates, `[*batch, S]`; `[S]` serves all batch rows.

        Returns:
            Keys and values `[*batch, S, K, H]`.
        """
        kv = self._unrotated(x, at)
        return KeyValue(self._rotated(kv.key, kv.at), kv.value, kv.at)

    def extend(self, cache: Cache, x: Float[Array, "B T D"], at: Coordinates) -> tuple[Cache, KeyColumns]:
        """Appends the tokens `x` `[B, T, D]` to the cache.

        Returns:
            The next cache, and the keys and values that the tokens attend to.

        Raises:
            ValueError: the tokens do not fit into the cache.
        """
        return cache.append(self.project(x, at))

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns,
        *,
        score_mod: ScoreMod | None = None,
        block_mask: BlockMask | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch T D"]:
        """Attends from tokens to keys and values.

        Args:
            x: tokens `[*batch, T, D]`, from which the queries are computed.
            at: their coordinates, `[*batch, T]`; `[T]` serves all batch rows.
            kv: the keys and values of `project`, or the columns of a cache, which decoding steps read without copying.
            score_mod: modifies the scores, as in `seqattn.attend`.
            block_mask: takes the place of the module's mask, and of the coordinates that masks and score modifications
                read. Made by `block_mask`, to share the tiles that the mask reaches between layers.
            dropout_key: if None, nothing is dropped.

        Returns:
            The attention output after the output projection, `[*batch, T, D]`.

        Raises:
            ValueError: shapes do not fit, `implementation` is unknown, or a block mask is given for the columns of a
                cache.
            NotImplementedError: the named implementation cannot serve this call.
        """
        query = self._rotated(self._heads(self.query(x), self.query_norm), at)
        dropout = None if dropout_key is None else Dropout(self.dropout_rate, dropout_key)
        options: dict[str, Any] = {"dropout": dropout, "implementation": self.implementation, "split": self.split}
        options |= {"scale": self.scale}
        if block_mask is not None:
            if isinstance(kv, KeyColumns) or kv.of_cache:
                raise ValueError("a block_mask is for the keys of `project`, not for the slots of a cache")
            output = attend(query, kv.key, kv.value, mask=block_mask, score_mod=score_mod, **options)
        elif isinstance(kv, KeyColumns):
            # The columns go to the kernel as they are: a step must not copy the whole cache.
            options |= _located(_of_slots(self.mask, at, kv, self.num_heads), at, kv.at, score_mod)
            output = attend_columns(query, Columns(kv.key, kv.value, kv.finite), **options)
        else:
            output = attend(query, kv.key, kv.value, **options, **_located(self._mask_over(kv), at, kv.at, score_mod))
        return self.output(output.reshape(*x.shape[:-1], self.num_heads * self.head_dim))

    def block_mask(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv_at: Coordinates | None = None,
        *,
        score_mod: ScoreMod | None = None,
    ) -> BlockMask | None:
        """Finds the tiles that the mask reaches, for all layers with such an attention to share.

        Args:
            x: tokens `[*batch, T, D]`, of which only shape and dtype are read.
            at: their coordinates, `[*batch, T]` or `[T]`.
            kv_at: the coordinates of the keys, `[*batch, S]` or `[S]`. Defaults to `at`. A batch dimension of 1 is that
                of keys which all rows read.
            score_mod: the score modification of the calls, if the choice of an implementation depends on it.

        Returns:
            The argument `block_mask` of a call, or None if there is no mask, or the keys are no tokens.
        """
        if self.mask is None or not self.keys_are_tokens:
            return None
        kv_at = at if kv_at is None else kv_at
        dtype = jax.eval_shape(self.query, x).dtype
        query = jax.ShapeDtypeStruct((*x.shape[:-1], self.num_heads, self.head_dim), dtype)
        batch = kv_at.shape[:-1] or x.shape[:-2]
        key = jax.ShapeDtypeStruct((*batch, kv_at.shape[-1], self.num_kv_heads, self.head_dim), dtype)
        options: dict[str, Any] = {"implementation": self.implementation, "split": self.split, "score_mod": score_mod}
        return make_block_mask(self.mask, query, key, key, q_at=at, kv_at=kv_at, **options)

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
        """Explains which kernel the same call runs, and why not another. For `platform` see `seqattn.explain`."""
        dropout = None if dropout_key is None else Dropout(self.dropout_rate, dropout_key)

        def call(x: Array) -> Call:
            query = self._rotated(self._heads(self.query(x), self.query_norm), at)
            if isinstance(kv, KeyColumns):
                located = _located(_of_slots(self.mask, at, kv, self.num_heads), at, kv.at, score_mod)
                columns = Columns(kv.key, kv.value, kv.finite)
                located = {"q_at": None, "kv_at": None, "scale": self.scale} | located
                return Call.of_columns(query, columns, **located, dropout=dropout)
            located = _located(self._mask_over(kv), at, kv.at, score_mod) | {"scale": self.scale}
            return call_of(query, kv.key, kv.value, **located, dropout=dropout, repeat=repeats_keys(self.split))

        return explain_call(self.implementation, call, (x,), platform=platform, split=self.split)

    def weights(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns,
        *,
        score_mod: ScoreMod | None = None,
    ) -> Float[Array, "*batch N T S"]:
        """Returns the attention weights `[*batch, N, T, S]` of the same call, for inspection.

        Materialises all weights, unlike a call.
        """
        query = self._rotated(self._heads(self.query(x), self.query_norm), at)
        if isinstance(kv, KeyColumns):
            mask: Mask | Array | None = _of_slots(self.mask, at, kv, self.num_heads)
            key = kv.rows().key
            if key.dtype != query.dtype:  # a cache may store another dtype than the model computes in
                wider = np.promote_types(accumulator(query.dtype), accumulator(key.dtype))
                query, key = query.astype(wider), key.astype(wider)
            return attention_weights(query, key, scale=self.scale, **_located(mask, at, kv.at, score_mod))
        located = _located(self._mask_over(kv), at, kv.at, score_mod)
        return attention_weights(query, kv.key, scale=self.scale, **located)

    def _mask_over(self, kv: KeyValue) -> Mask | None:
        return _among_written(self.mask) if kv.of_cache else self.mask

    def _unrotated(self, x: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        key, value = self._heads(self.key(x), self.key_norm), self._heads(self.value(x), None)
        return KeyValue(key, value, jax.tree.map(lambda field: jnp.broadcast_to(field, x.shape[:-1]), at))

    def _heads(self, x: Array, norm: nnx.RMSNorm | None) -> Array:
        heads = x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)
        return heads if norm is None else norm(heads)

    def _rotated(self, heads: Array, at: Coordinates) -> Array:
        return heads if self.rotary is None else self.rotary(heads, jnp.asarray(at.position))


def with_implementation(
    model: Model, implementation: str | None, of: type[MultiHeadAttention] = MultiHeadAttention
) -> Model:
    """Returns a model like `model` whose attention modules run the given implementation. `model` does not change.

    Args:
        model: any module. The copy shares its parameters.
        implementation: as in `seqattn.attend`.
        of: the class of attention modules to change.

    >>> attention = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> with_implementation(attention, "reference").implementation, attention.implementation
    ('reference', None)
    """
    changed = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(changed):
        if isinstance(module, of):
            module.implementation = implementation
    return changed


def with_split(model: Model, split: Split | None) -> Model:
    """Returns a model like `model` whose `MultiHeadAttention` modules are split over a mesh. `model` does not change.

    Args:
        model: any module. The copy shares its parameters.
        split: as in `seqattn.attend`.

    Raises:
        TypeError: `split` is no `Split`.

    >>> attention = MultiHeadAttention(8, num_heads=2, rngs=nnx.Rngs(0))
    >>> with_split(attention, Split(batch="data")).split.batch
    'data'
    """
    if not isinstance(split, Split | None):
        raise TypeError(f"split must be a Split or None, got {split!r}")
    changed = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(changed):
        if isinstance(module, MultiHeadAttention):
            module.split = split
    return changed


def _of_slots(mask: Mask | None, at: Coordinates, kv: KeyColumns, num_heads: int) -> Mask | Array:
    """Returns the mask over cache slots; an array if queries are hypotheses, which see only their own slots."""
    written = _among_written(mask)
    if kv.visible is None:
        return written
    q_at, kv_at = (jax.tree.map(jnp.atleast_2d, each) for each in (at, kv.at))
    # Which hypothesis owns which slot is not a function of coordinates, so the mask must become dense here.
    return written.over(q_at, kv_at, batch=kv.visible.shape[0], num_heads=num_heads) & kv.visible[:, None]


def _among_written(mask: Mask | None) -> Mask:
    """Restricts the mask to written slots: an unwritten slot is no key, whatever the mask says about padding."""
    return Written() if mask is None else mask & Written()


def _located(
    mask: Mask | Array | None, q_at: Coordinates, kv_at: Coordinates, score_mod: ScoreMod | None
) -> dict[str, Any]:
    """Collects the arguments of `attend`: mask, score modification, and coordinates if one of these reads them."""
    read = isinstance(mask, Mask) or (score_mod is not None and ScoreMod.of(score_mod).uses_coordinates)
    return {"mask": mask, "score_mod": score_mod} | ({"q_at": q_at, "kv_at": kv_at} if read else {})
