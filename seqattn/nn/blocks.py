"""Encoder and decoder blocks of the Transformer, with the layer norm before or after each sublayer."""

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
from seqattn.kernels.block_mask import BlockMask
from seqattn.mask import Mask
from seqattn.nn.cache import Cache
from seqattn.nn.compressed import MemoryCompressedAttention
from seqattn.nn.feed_forward import Activation, FeedForward
from seqattn.nn.key_value import KeyColumns, KeyValue
from seqattn.nn.mixture import MixtureOfExperts
from seqattn.nn.multi_head_attention import MultiHeadAttention
from seqattn.nn.rotary import Rotary
from seqattn.nn.routing import MixtureConfig
from seqattn.score_mod import ScoreMod


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes and choices that all blocks of a model share. The defaults are the base model of Vaswani 2017.

    Raises:
        ValueError: `norm_epsilon` is negative or not finite, `rms_norm` is combined with `norm_bias`, `norm_outputs`
            with `use_norm=False`, or `mixture` with `remat` or `scan_layers`.
    """

    model_dim: int = 512
    """D, the size of each token's vector between blocks."""
    hidden_dim: int = 2048
    """F, the size of the hidden layer of the feed-forward network."""
    num_heads: int = 8
    """N, the number of query heads. Must divide `model_dim`."""
    num_kv_heads: int | None = None
    """K, the number of key heads, shared by groups of query heads (Ainslie 2023). If None, as many as query heads."""
    attention_head_dim: int | None = None
    """H, the size of each head. If None, `model_dim / num_heads`."""
    attention_scale: float | None = None
    """Factor of attention scores. If None, `head_dim ** -0.5` (Vaswani 2017); T5 has 1."""
    attention_soft_cap: float | None = None
    """Limits scores of self-attention to `cap * tanh(score / cap)` (Gemma 2: Gemma Team 2024). If None, no limit."""
    activation: Activation = Activation.RELU
    """Nonlinearity of the feed-forward network."""
    gated: bool = False
    """If True, multiplies the hidden layer by an activated gate (GEGLU or SwiGLU, Shazeer 2020)."""
    norm_first: bool = False
    """If True, `x + f(norm(x))` (pre-norm, Xiong 2020); if False, `norm(x + f(x))` (post-norm, Vaswani 2017)."""
    qk_norm: bool = False
    """If True, applies an RMS norm to each query and key head (Dehghani 2023)."""
    attention_bias: bool = False
    """If True, the four projections of each attention have biases."""
    key_bias: bool | None = None
    """Whether the key projections have biases (not in Whisper: Radford 2022). If None, as `attention_bias` says."""
    output_bias: bool | None = None
    """Whether the output projections have biases (not in Qwen 2: Yang 2024). If None, as `attention_bias` says."""
    feed_forward_bias: bool = True
    """If True, the layers of the feed-forward network have biases."""
    norm_outputs: bool = False
    """If True, a second norm for each sublayer, on its output before the sum (sandwich norm, Ding 2021; Gemma 2)."""
    norm_epsilon: float = 1e-6
    """Added to the variance in each layer norm, and to the mean square in each RMS norm."""
    rms_norm: bool = False
    """If True, RMS norms (Zhang 2019) in place of layer norms. They have no offset: `norm_bias` must be False."""
    use_norm: bool = True
    """If False, blocks have no layer norms. Only for experiments on their effect."""
    norm_gain: bool = True
    """If True, each layer norm has a trained factor for each feature."""
    norm_bias: bool = True
    """If True, each layer norm has a trained offset for each feature."""
    use_residual: bool = True
    """If False, blocks have no residual connections. Only for experiments on their effect."""
    dropout_rate: float = 0.1
    """Dropout rate of each sublayer's output, in [0, 1)."""
    attention_dropout_rate: float = 0.0
    """Dropout rate of the attention weights, in [0, 1)."""
    hidden_dropout_rate: float = 0.0
    """Dropout rate of the feed-forward network's hidden layer, in [0, 1)."""
    mixture: MixtureConfig | None = None
    """Replaces each feed-forward network by a mixture of experts. If None, all tokens share one network."""
    remat: bool = False
    """If True, recomputes each block in the backward pass: less memory for a third more time (Chen 2016)."""
    scan_layers: bool = False
    """If True, trains a stack of equal blocks as one loop, so that XLA compiles a block once."""

    def __post_init__(self) -> None:
        if self.mixture is not None and (self.remat or self.scan_layers):
            raise ValueError(
                f"remat ({self.remat}) and scan_layers ({self.scan_layers}) must be False where blocks have experts: "
                "a block that is recomputed or scanned cannot return the routing of its experts"
            )
        if self.norm_outputs and not self.use_norm:
            raise ValueError("use_norm must be True with norm_outputs: the blocks have no norms")
        if self.rms_norm and self.norm_bias:
            raise ValueError("norm_bias must be False with rms_norm: an RMS norm has no offset")
        check_number("norm_epsilon", self.norm_epsilon, minimum=0)

    @property
    def head_dim(self) -> int:
        """H, the size of each head.

        Raises:
            ValueError: a size is below 1, or `model_dim` is not a multiple of `num_heads` and `attention_head_dim` is
                None.
        """
        if self.attention_head_dim is not None:
            check_sizes(attention_head_dim=self.attention_head_dim)
            return self.attention_head_dim
        check_sizes(model_dim=self.model_dim, num_heads=self.num_heads)
        check_multiple("model_dim", self.model_dim, self.num_heads, "num_heads")
        return self.model_dim // self.num_heads

    def attention(
        self,
        mask: Mask | None,
        rotary: Rotary | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
        stride: int | None = None,
    ) -> MultiHeadAttention:
        """Builds the attention of a block with this mask; memory-compressed if `stride` is given."""
        options: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.attention_head_dim,
            "mask": mask,
            "scale": self.attention_scale,
            "rotary": rotary,
            "qk_norm": self.qk_norm,
            "norm_epsilon": self.norm_epsilon,
            "use_bias": self.attention_bias,
            "key_bias": self.key_bias,
            "output_bias": self.output_bias,
            "dropout_rate": self.attention_dropout_rate,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        if stride is not None:
            return MemoryCompressedAttention(self.model_dim, self.num_heads, stride=stride, **options)
        return MultiHeadAttention(self.model_dim, self.num_heads, **options)

    def norm(self, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm | None:
        """Builds a layer norm (Ba 2016) or an RMS norm (Zhang 2019), or None if the model has none."""
        if not self.use_norm:
            return None
        options: dict[str, Any] = {"epsilon": self.norm_epsilon, "use_scale": self.norm_gain}
        options |= {"param_dtype": param_dtype, "rngs": rngs}
        if self.rms_norm:
            return nnx.RMSNorm(self.model_dim, **options)
        return nnx.LayerNorm(self.model_dim, use_bias=self.norm_bias, **options)

    def embedding_norm(self, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
        """Builds the norm of `norm_embedding`, after token and position vectors are added.

        Raises:
            ValueError: the model has no norms.
        """
        norm = self.norm(param_dtype, rngs)
        if norm is None:
            raise ValueError("use_norm must be True with norm_embedding: the blocks have no norms")
        return norm

    def feed_forward(self, param_dtype: DTypeLike, rngs: nnx.Rngs) -> FeedForward | MixtureOfExperts:
        """Builds the feed-forward network of a block, or its mixture of experts."""
        options: dict[str, Any] = {
            "activation": self.activation,
            "gated": self.gated,
            "use_bias": self.feed_forward_bias,
            "dropout_rate": self.hidden_dropout_rate,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        if self.mixture is not None:
            return MixtureOfExperts(self.model_dim, self.hidden_dim, config=self.mixture, **options)
        return FeedForward(self.model_dim, self.hidden_dim, **options)


class Residual(nnx.Module):
    """Residual connection and layer norm around a sublayer.

    Computes `x + f(norm(x))` if `norm_first` (Xiong 2020), and `norm(x + f(x))` if not (Vaswani 2017). With
    `norm_outputs`, another norm is applied to the output of f (Ding 2021). `use_residual` and `use_norm` remove the sum
    and the norms, to show their effect.

    Args:
        config: sizes and choices of the block.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: `dropout_rate` is not in [0, 1).
    """

    def __init__(self, config: BlockConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        check_rate(config.dropout_rate)
        self.norm_first, self.use_residual = config.norm_first, config.use_residual
        self.dropout_rate = config.dropout_rate
        self.norm = config.norm(param_dtype, rngs)
        self.output_norm = config.norm(param_dtype, rngs) if config.norm_outputs else None

    def inner(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Returns the input of the sublayer: `norm(x)` with the norm first, `x` if not."""
        return self.norm(x) if self.norm_first and self.norm is not None else x

    def __call__(
        self,
        x: Float[Array, "*batch D"],
        sublayer: Callable[[Array], Array],
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch D"]:
        """Applies the sublayer, dropout, the residual sum and the norms.

        Args:
            x: vectors `[*batch, D]`.
            sublayer: a function from `[*batch, D]` to `[*batch, D]`.
            dropout_key: if None, nothing is dropped.

        Returns:
            `[*batch, D]`.
        """
        made = sublayer(self.inner(x))
        made = made if self.output_norm is None else self.output_norm(made)
        # Dropout before the sum, so that the residual path itself is never dropped (Vaswani 2017, section 5.4).
        made = drop(made, self.dropout_rate, dropout_key)
        total = x + made if self.use_residual else made
        return total if self.norm_first or self.norm is None else self.norm(total)


def _feed(
    network: FeedForward | MixtureOfExperts, x: Array, at: Coordinates, dropout_key: PRNGKeyArray | None
) -> Array:
    """Applies the feed-forward network to each token. Padding takes no capacity of an expert."""
    if isinstance(network, FeedForward):
        return network(x, dropout_key=dropout_key)
    return network(x, real=jnp.broadcast_to(at.segment, x.shape[:-1]) != 0, dropout_key=dropout_key)


class EncoderBlock(nnx.Module):
    """Self-attention and a feed-forward network (Vaswani 2017, figure 1, left).

    With a causal mask it is the block of a decoder-only language model. The same call serves training and cached steps.
    Only the source of keys and values differs:

    - training: `block(x, at)`
    - a step: `cache, kv = block.extend(cache, x, at); block(x, at, kv)`

    Args:
        config: sizes and choices.
        mask: which keys each token may attend to. If None, all of them, including padding.
        rotary: rotates queries and keys of the self-attention (RoPE, Su 2021). If None, nothing is rotated.
        stride: stride of memory-compressed attention (Liu 2018). If None, tokens attend to every token.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: sizes or rates of `config` do not fit.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        mask: Mask | None,
        rotary: Rotary | None = None,
        stride: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention = config.attention(mask, rotary, param_dtype, rngs, stride)
        self.attention_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)
        self.feed_forward = config.feed_forward(param_dtype, rngs)
        self.feed_forward_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)

    def extend(self, cache: Cache, x: Float[Array, "B T D"], at: Coordinates) -> tuple[Cache, KeyColumns]:
        """Appends the tokens `x` `[B, T, D]` to the cache. Returns the cache and what they attend to."""
        return self.attention.extend(cache, self.attention_residual.inner(x), at)

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns | None = None,
        *,
        score_mod: ScoreMod | None = None,
        block_mask: BlockMask | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch T D"]:
        """Applies the block.

        Args:
            x: tokens `[*batch, T, D]`.
            at: their coordinates.
            kv: keys and values to attend to. Defaults to those of `x` itself.
            score_mod: modifies the scores of the self-attention, as in `seqattn.attend`.
            block_mask: that of the self-attention, to share it between layers. See `MultiHeadAttention.block_mask`.
            dropout_key: if None, nothing is dropped.

        Returns:
            `[*batch, T, D]`.
        """
        keys = split(dropout_key, 4)

        def attend(inner: Array) -> Array:
            seen = self.attention.project(inner, at) if kv is None else kv
            return self.attention(inner, at, seen, score_mod=score_mod, block_mask=block_mask, dropout_key=keys[0])

        x = self.attention_residual(x, attend, keys[1])
        return self.feed_forward_residual(x, lambda inner: _feed(self.feed_forward, inner, at, keys[2]), keys[3])

    def weights(
        self, x: Float[Array, "*batch T D"], at: Coordinates, *, score_mod: ScoreMod | None = None
    ) -> Float[Array, "*batch N T S"]:
        """Returns the self-attention weights `[*batch, N, T, S]` of the same call."""
        inner = self.attention_residual.inner(x)
        return self.attention.weights(inner, at, self.attention.project(inner, at), score_mod=score_mod)


class DecoderBlock(nnx.Module):
    """Self-attention, cross-attention and a feed-forward network (Vaswani 2017, figure 1, right).

    The same call serves training and cached steps. Only the source of keys and values differs:

    - training: `block(x, at, block.project(x, at), memory)`
    - a step: `cache, kv = cache.append(block.project(x, at)); block(x, at, kv, memory)`

    Compute `memory = block.remember(encoded, source_at)` once per source.

    Args:
        config: sizes and choices.
        mask: which target tokens each target token may attend to.
        memory_mask: which source tokens each target token may attend to.
        rotary: rotates queries and keys of the self-attention (RoPE, Su 2021). If None, nothing is rotated.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: sizes or rates of `config` do not fit.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        mask: Mask | None,
        memory_mask: Mask | None,
        rotary: Rotary | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention = config.attention(mask, rotary, param_dtype, rngs)
        self.attention_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)
        self.memory_attention = config.attention(memory_mask, None, param_dtype, rngs)
        self.memory_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)
        self.feed_forward = config.feed_forward(param_dtype, rngs)
        self.feed_forward_residual = Residual(config, param_dtype=param_dtype, rngs=rngs)

    def project(self, x: Float[Array, "*batch T D"], at: Coordinates) -> KeyValue:
        """Computes the keys and values `[*batch, T, K, H]` of the target tokens for the self-attention."""
        return self.attention.project(self.attention_residual.inner(x), at)

    def remember(self, encoded: Float[Array, "*batch S D"], at: Coordinates) -> KeyValue:
        """Computes the keys and values `[*batch, S, K, H]` of the encoded source for the cross-attention."""
        return self.memory_attention.project(encoded, at)

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        at: Coordinates,
        kv: KeyValue | KeyColumns,
        memory: KeyValue | KeyColumns,
        *,
        score_mod: ScoreMod | None = None,
        block_mask: BlockMask | None = None,
        memory_block_mask: BlockMask | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch T D"]:
        """Applies the block.

        Args:
            x: target tokens `[*batch, T, D]`.
            at: their coordinates.
            kv: keys and values of the target, from `project` or a cache.
            memory: keys and values of the source, from `remember`.
            score_mod: modifies the scores of the self-attention, as in `seqattn.attend`.
            block_mask: that of the self-attention, to share it between layers. See `MultiHeadAttention.block_mask`.
            memory_block_mask: that of the cross-attention, likewise.
            dropout_key: if None, nothing is dropped.

        Returns:
            `[*batch, T, D]`.
        """
        keys = split(dropout_key, 6)
        own: dict[str, Any] = {"score_mod": score_mod, "block_mask": block_mask, "dropout_key": keys[0]}
        x = self.attention_residual(x, lambda inner: self.attention(inner, at, kv, **own), keys[1])
        cross: dict[str, Any] = {"block_mask": memory_block_mask, "dropout_key": keys[2]}
        x = self.memory_residual(x, lambda inner: self.memory_attention(inner, at, memory, **cross), keys[3])
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
        """Returns the cross-attention weights `[*batch, N, T, S]` of the same call."""
        x = self.attention_residual(x, lambda inner: self.attention(inner, at, kv, score_mod=score_mod))
        return self.memory_attention.weights(self.memory_residual.inner(x), at, memory)
