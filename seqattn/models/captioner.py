"""Image to text: an image encoder and a decoder with attention (Xu 2015, "Show, attend and tell")."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.coordinates import Coordinates
from seqattn.models.encoder_decoder import State
from seqattn.models.seq2seq import Seq2Seq, Seq2SeqConfig, Seq2SeqMemory
from seqattn.models.transformer import Transformer, TransformerConfig, TransformerMemory
from seqattn.nn.convolution import ConvolutionalEncoder, OverBatch, OverImage, PatchEncoder


@dataclasses.dataclass(frozen=True)
class Convolutional:
    """3 x 3 convolutions, each of which halves height and width (Xu 2015, section 3.1.1, trained from scratch)."""

    channels: tuple[int, ...] = (32, 64, 128)
    """Output channels of each convolution."""
    image_channels: int = 1
    """Channels of the images (1 for gray, 3 for color)."""
    norm: OverImage | OverBatch = OverImage()
    """The norm after each convolution."""


@dataclasses.dataclass(frozen=True)
class Patches:
    """Non-overlapping patches, each encoded by one linear layer (Dosovitskiy 2020, section 3.1)."""

    patch: tuple[int, int] = (8, 8)
    """Height and width of a patch in pixels."""
    image_channels: int = 1
    """Channels of the images (1 for gray, 3 for color)."""


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Sizes and choices of an image-to-text model."""

    vocab_size: int
    """V, the number of tokens of the texts. Replaces the `vocab_size` of `decoder`."""
    image: Convolutional | Patches = Convolutional()
    """The image encoder."""
    decoder: TransformerConfig | Seq2SeqConfig = TransformerConfig(0, num_encoder_layers=0)
    """The decoder, which reads image vectors in place of source tokens.

    With `num_encoder_layers=0` a Transformer decoder attends to the image vectors directly. So does a recurrent decoder
    with `AttentionEncoder(num_layers=0, positions=None)`, which starts from their mean (Xu 2015, section 3.1.2).
    """


class Captioner(nnx.Module):
    """Image-to-text model. It follows the protocol `EncoderDecoder`, with images in place of source tokens.

    The places of an image, row by row, take the role of source tokens: coordinates and attention refer to S = rows *
    columns places, see `grid`. Each row of the batch holds one image or is padding.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters and is not kept.

    Raises:
        ValueError: the decoder has `share_embeddings=False`, or sizes do not fit.

    >>> decoder = Seq2SeqConfig(0, embedding_dim=4, hidden_dim=6)
    >>> config = CaptionerConfig(vocab_size=11, image=Patches((4, 5)), decoder=decoder)
    >>> model = Captioner(config, rngs=nnx.Rngs(0))
    >>> rows, columns = model.grid(8, 15)
    >>> memory = model.encode(jnp.ones((1, 8, 15)), Coordinates.from_lengths([rows * columns], rows * columns))
    >>> target, target_at = jnp.array([[1, 6, 3]]), Coordinates.from_lengths([3], 3)
    >>> model.decode(target, target_at, memory).shape, model.alignment(target, target_at, memory).shape
    ((1, 3, 11), (1, 1, 3, 6))
    """

    def __init__(self, config: CaptionerConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        sizes: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        decoder = dataclasses.replace(config.decoder, vocab_size=config.vocab_size)
        if isinstance(decoder, TransformerConfig):
            if not decoder.share_embeddings:
                raise ValueError("share_embeddings must be True: an image has no source tokens that need a table")
            dim = decoder.block.model_dim
            self.decoder: Transformer | Seq2Seq = Transformer(decoder, **sizes)
        else:
            dim = decoder.embedding_dim
            self.decoder = Seq2Seq(decoder, **sizes)
        sizes |= {"image_channels": config.image.image_channels}
        if isinstance(config.image, Patches):
            self.image: PatchEncoder | ConvolutionalEncoder = PatchEncoder(dim, patch=config.image.patch, **sizes)
        else:
            self.image = ConvolutionalEncoder(dim, channels=config.image.channels, norm=config.image.norm, **sizes)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of places for an image of this size in pixels."""
        return self.image.grid(height, width)

    def encode(
        self,
        images: Float[Array, "B height width *channels"],
        source_at: Coordinates,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> TransformerMemory | Seq2SeqMemory:
        """Encodes images.

        Args:
            images: `[B, height, width, channels]`, or `[B, height, width]` for grey images.
            source_at: coordinates `[B, S]` of the places.
            dropout_key: marks a training call. Batch norm then uses the statistics of these images. If None, it uses
                running statistics and nothing is dropped.

        Returns:
            The memory for `decode`, `start` and `alignment`.

        Raises:
            ValueError: S is not the number of places, or exceeds the decoder's learned positions.
        """
        rows, columns = self.grid(*images.shape[1:3])
        if source_at.shape[-1] != rows * columns:
            raise ValueError(f"source_at {source_at.shape} must have {rows} x {columns} = {rows * columns} places")
        if isinstance(self.decoder, Seq2Seq) and self.decoder.room(rows * columns) is not None:
            raise ValueError(f"the decoder has fewer learned positions than an image of {rows} x {columns} places")
        # Padding may hold NaN, which a convolution would carry into the gradient of its kernel.
        real = jnp.broadcast_to((source_at.segment != 0).any(axis=-1), images.shape[:1])
        present = real.reshape(-1, *[1] * (images.ndim - 1))
        images = jnp.where(present, images, jnp.zeros_like(images))
        if isinstance(self.image, PatchEncoder):
            vectors = self.image(images)
        else:
            vectors = self.image(images, real=real, by_batch=dropout_key is not None)
        return self.decoder.encode_vectors(vectors, source_at, dropout_key=dropout_key)

    def decode(
        self,
        target: Int[Array, "B T"],
        target_at: Coordinates,
        memory: Any,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns logits `[B, T, V]` of the token after each target token `[B, T]` (teacher forcing)."""
        return self.decoder.decode(target, target_at, memory, dropout_key=dropout_key)

    def room(self, source_length: int) -> int | None:
        """Returns how many target tokens the decoder has positions for, or None if their number is unlimited.

        It does not depend on `source_length`, since `encode` rejects an image that is too large.
        """
        del source_length
        return self.decoder.room(0)

    def start(self, memory: Any, max_length: int) -> State:
        """Returns the state before the first step, with room for `max_length` steps."""
        return self.decoder.start(memory, max_length)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: State
    ) -> tuple[Float[Array, "B T V"], State]:
        """Reads many target tokens at once. See `EncoderDecoder.prefill`."""
        return self.decoder.prefill(tokens, lengths, state)

    def step(self, tokens: Int[Array, "R"], state: State) -> tuple[Float[Array, "R V"], State]:
        """Returns logits `[R, V]` of the token after `tokens` `[R]`, and the next state."""
        return self.decoder.step(tokens, state)

    def alignment(self, target: Int[Array, "B T"], target_at: Coordinates, memory: Any) -> Float[Array, "B L T S"]:
        """Returns the attention weights `[B, L, T, S]` of L heads from target tokens to the S places of the image."""
        return self.decoder.alignment(target, target_at, memory)
