"""Encoder and decoder blocks of the Transformer, with the norm first or last."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from seqattn.checks import check_multiple, check_number, check_rate, check_sizes
from seqattn.coordinates import Coordinates
from seqattn.dropout import drop, split
from seqattn.mask import Mask
from seqattn.nn.cache import Cache
from seqattn.nn.compressed import MemoryCompressedAttention
from seqattn.nn.feed_forward import Activation, FeedForward
from seqattn.nn.key_value import KeyColumns, KeyValue
from seqattn.nn.mixture import MixtureOfExperts
from seqattn.nn.multi_head_attention import MultiHeadAttention
from seqattn.nn.routing import MixtureConfig
from seqattn.score_mod import ScoreMod


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes and choices that all blocks of a model share; the defaults are the base model of Vaswani 2017."""

    model_dim: int = 512
    """Size of each token's vector between blocks."""
    hidden_dim: int = 2048
    """Size of the hidden layer of the feed-forward network."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int | None = None
    """Key heads shared by groups of query heads; None for as many as query heads."""
    activation: Activation = Activation.RELU
    """Nonlinearity of the feed-forward network."""
    gated: bool = False
    """Multiply the hidden layer by an activated gate (GEGLU, SwiGLU)."""
    norm_first: bool = False
    """`x + f(norm(x))` instead of `norm(x + f(x))`."""
    qk_norm: bool = False
    """RMS norm of each query and key head."""
    attention_bias: bool = False
    """Biases of the four projections of each attention."""
    norm_epsilon: float = 1e-6
    """Added to the variance that layer norms divide by."""
    use_norm: bool = True
    """Layer norms; without them only to show what they are for."""
    norm_gain: bool = True
    """A trained factor for each dim of a layer norm."""
    norm_bias: bool = True
    """A trained summand for each dim of a layer norm."""
    use_residual: bool = True
    """The sum around each sublayer; without it only to show what it is for."""
    dropout_rate: float = 0.1
    """Of each sublayer's output."""
    attention_dropout_rate: float = 0.0
    """Of the attention weights."""
    hidden_dropout_rate: float = 0.0
    """Of the hidden layer of the feed-forward network."""
    mixture: MixtureConfig | None = None
    """Experts in place of each feed-forward network; None for one network that all tokens share."""
    remat: bool = False
    """Compute each block again in the backward pass of training: less memory, a third more time."""
    scan_layers: bool = False
    """Train a stack of like blocks as one loop: a block is compiled once."""

    def __post_init__(self) -> None:
        if self.mixture is not None and (self.remat or self.scan_layers):
            raise ValueError(
                f"remat ({self.remat}) and scan_layers ({self.scan_layers}) must be False where blocks have experts: "
                "what experts tell of their routing cannot leave a block that is computed again or in a loop"
            )
        check_number("norm_epsilon", self.norm_epsilon, minimum=0)

    @property
    def head_dim(self) -> int:
        """Size of each head.

        Raises:
            ValueError: the heads do not share model_dim.
        """
        check_sizes(model_dim=self.model_dim, num_heads=self.num_heads)
        check_multiple("model_dim", self.model_dim, self.num_heads, "num_heads")
        return self.model_dim // self.num_heads

    def attention(
        self,
        mask: Mask | None,
        rotary_base: float | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
        stride: int | None = None,
    ) -> MultiHeadAttention:
        """The attention of a block with this mask, memory-compressed by `stride` where one is given."""
        options: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "mask": mask,
            "rotary_base": rotary_base,
            "qk_norm": self.qk_norm,
            "use_bias": self.attention_bias,
            "dropout_rate": self.attention_dropout_rate,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        if stride is not None:
            return MemoryCompressedAttention(self.model_dim, self.num_heads, stride=stride, **options)
        return MultiHeadAttention(self.model_dim, self.num_heads, **options)

    def norm(self, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm | None:
        """A layer norm (Ba 2016); None in a model without."""
        if not self.use_norm:
            return None
        return nnx.LayerNorm(
            self.model_dim,
            epsilon=self.norm_epsilon,
            use_scale=self.norm_gain,
            use_bias=self.norm_bias,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def feed_forward(self, param_dtype: DTypeLike, rngs: nnx.Rngs) -> FeedForward | MixtureOfExperts:
        """The feed-forward network of a block, or its experts."""
        options: dict[str, Any] = {
            "activation": self.activation,
            "gated": self.gated,
            "dropout_rate": self.hidden_dropout_rate,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        if self.mixture is not None:
            return MixtureOfExperts(self.model_dim, self.hidden_dim, config=self.mixture, **options)
        return FeedForward(self.model_dim, self.hidden_dim, **options)


class Residual(nnx.Module):
    """The sum around a sublayer: `x + f(norm(x))` with the norm first (Xiong 2020), else `norm(x + f(x))`.

    Sum and norm can each be left out (`use_residual`, `use_norm`), to see what a model is without them.
    """

    def __init__(self, config: BlockConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        check_rate(config.dropout_rate)
        self.norm_first, self.use_residual = config.norm_first, config.use_residual
        self.dropout_rate = config.dropout_rate
        self.norm = config.norm(param_dtype, rngs)

    def inner(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """What the sublayer sees."""
        return self.norm(x) if self.norm_first and self.norm is not None else x

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        sublayer: Callable[[Array], Array],
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch D"]:
        """`x` with what the sublayer makes of it, after dropout."""
        made = drop(sublayer(self.inner(x)), self.dropout_rate, dropout_key)
        total = x + made if self.use_residual else made
        return total if self.norm_first or self.norm is None else self.norm(total)


def _feed(
    network: FeedForward | MixtureOfExperts, x: Array, at: Coordinates, dropout_key: PRNGKeyArray | None
) -> Array:
    """The network of each token; padding takes no room in an expert."""
    if isinstance(network, FeedForward):
        return network(x, dropout_key=dropout_key)
    return network(x, real=jnp.broadcast_to(at.segment, x.shape[:-1]) != 0, dropout_key=dropout_key)


class EncoderBlock(nnx.Module):
    """Self attention and a feed-forward network (Vaswani 2017, figure 1, left); with a causal mask, a language model's.

    The same call serves training and a cached step; they differ in where the keys and values live:

    - training: `block(x, at)`
    - a step: `cache, kv = block.extend(cache, x, at); block(x, at, kv)`

    Args:
        config: sizes and choices.
        mask: who may look at whom.
        rotary_base: of RoPE in the self attention; None for no rotation.
        stride: of memory-compressed attention; None for attention to every token.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        mask: Mask | None,
        rotary_base: float | None = None,
        stride: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention = config.attention(mask, rotary_base, param_dtype, rngs, stride)
        self.attention_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)
        self.feed_forward = config.feed_forward(param_dtype, rngs)
        self.feed_forward_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)

    def extend(self, cache: Cache, x: Float[Array, "B T D"], at: Coordinates) -> tuple[Cache, KeyColumns]:
        """The cache with the tokens `x` `[B, T, D]`, and what they attend to."""
        return self.attention.extend(cache, self.attention_residual.inner(x), at)

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns | None = None,
        *,
        score_mod: ScoreMod | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch T D"]:
        """`[*batch, T, D]` to `[*batch, T, D]`: the tokens attend to `kv`, by default to each other.

        Without a dropout key nothing drops. A `score_mod` modifies the scores of the self attention.
        """
        keys = split(dropout_key, 4)

        def attend(inner: Array) -> Array:
            seen = self.attention.project(inner, at) if kv is None else kv
            return self.attention(inner, at, seen, score_mod=score_mod, dropout_key=keys[0])

        x = self.attention_residual(x, attend, keys[1])
        return self.feed_forward_residual(x, lambda inner: _feed(self.feed_forward, inner, at, keys[2]), keys[3])

    def weights(
        self, x: Float[Array, "*batch T D"], at: Coordinates, *, score_mod: ScoreMod | None = None
    ) -> Float[Array, "*batch N T S"]:
        """Where each token looks among the others; `[*batch, N, T, S]`."""
        inner = self.attention_residual.inner(x)
        return self.attention.weights(inner, at, self.attention.project(inner, at), score_mod=score_mod)


class DecoderBlock(nnx.Module):
    """Self attention, attention to a memory, and a feed-forward network (Vaswani 2017, figure 1, right).

    The same call serves training and a cached step; they differ in where the keys and values live:

    - training: `block(x, at, block.project(x, at), memory)`
    - a step: `cache, kv = cache.append(block.project(x, at)); block(x, at, kv, memory)`

    with `memory = block.remember(encoded, source_at)`, once for a source.

    Args:
        config: sizes and choices.
        mask: who may look at whom inside the target.
        memory_mask: which source tokens a target token may look at.
        rotary_base: of RoPE in the self attention; None for no rotation.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        mask: Mask | None,
        memory_mask: Mask | None,
        rotary_base: float | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention = config.attention(mask, rotary_base, param_dtype, rngs)
        self.attention_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)
        self.memory_attention = config.attention(memory_mask, None, param_dtype, rngs)
        self.memory_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)
        self.feed_forward = config.feed_forward(param_dtype, rngs)
        self.feed_forward_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)

    def project(self, x: Float[Array, "*batch T D"], at: Coordinates) -> KeyValue:
        """Keys and values of the target tokens `x` for the self attention."""
        return self.attention.project(self.attention_residual.inner(x), at)

    def remember(self, encoded: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """Keys and values of the encoded source for the attention to it."""
        return self.memory_attention.project(encoded, at)

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns,
        memory: KeyValue | KeyColumns,
        *,
        score_mod: ScoreMod | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch T D"]:
        """`[*batch, T, D]` to `[*batch, T, D]`. Without a dropout key nothing drops.

        A `score_mod` modifies the scores of the self attention.
        """
        keys = split(dropout_key, 6)
        x = self.attention_residual(
            x, lambda inner: self.attention(inner, at, kv, score_mod=score_mod, dropout_key=keys[0]), keys[1]
        )
        x = self.memory_residual(
            x, lambda inner: self.memory_attention(inner, at, memory, dropout_key=keys[2]), keys[3]
        )
        return self.feed_forward_residual(x, lambda inner: _feed(self.feed_forward, inner, at, keys[4]), keys[5])

    def weights(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue,
        memory: KeyValue,
        *,
        score_mod: ScoreMod | None = None,
    ) -> Float[Array, "*batch N T S"]:
        """Where each target token looks in the source, in the same call; `[*batch, N, T, S]`."""
        x = self.attention_residual(x, lambda inner: self.attention(inner, at, kv, score_mod=score_mod))
        return self.memory_attention.weights(self.memory_residual.inner(x), at, memory)
