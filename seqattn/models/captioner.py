"""Image to text: an encoder of images before a decoder with attention (Xu 2015, "Show, attend and tell")."""

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
    """Convolutions of 3 x 3 pixels, each of which halves height and width (Xu 2015, section 3.1.1, trained here)."""

    channels: tuple[int, ...] = (32, 64, 128)
    """Of each convolution."""
    image_channels: int = 1
    """Of the images: 1 for grey, 3 for colour."""
    norm: OverImage | OverBatch = OverImage()
    """Of what each convolution gives."""


@dataclasses.dataclass(frozen=True)
class Patches:
    """Patches that do not overlap, each through one linear layer (Dosovitskiy 2020, section 3.1)."""

    patch: tuple[int, int] = (8, 8)
    """Height and width of a patch in pixels."""
    image_channels: int = 1
    """Of the images: 1 for grey, 3 for colour."""


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Sizes and choices of a model from images to text."""

    vocab_size: int
    """Tokens of the texts; that of the decoder's config is not read."""
    image: Convolutional | Patches = Convolutional()
    """How an image becomes vectors."""
    decoder: TransformerConfig | Seq2SeqConfig = TransformerConfig(0, num_encoder_layers=0)
    """What reads the vectors in place of source tokens, and writes.

    Without encoder layers a Transformer's decoder looks at the vectors themselves. So does a recurrent decoder with
    `AttentionEncoder(num_layers=0, positions=None)`, which starts from their mean (Xu 2015, section 3.1.2).
    """


class Captioner(nnx.Module):
    """Images to text, with the protocol of an `EncoderDecoder` but for its source: images in place of tokens.

    Places of the image, row by row, are what source tokens are elsewhere: coordinates and attention are of S = rows *
    columns of them, see `grid`. A row of the batch holds one image, or is padding.

    Args:
        config: sizes and choices.
        param_dtype: dtype of the parameters.
        rngs: initialises the parameters; not kept.

    Raises:
        ValueError: a table of source tokens (`share_embeddings=False`), or sizes that do not fit.

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
        """Rows and columns of the places that the model sees in an image of this size."""
        return self.image.grid(height, width)

    def encode(
        self,
        images: Float[Array, "B height width *channels"],
        source_at: Coordinates,
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> TransformerMemory | Seq2SeqMemory:
        """The memory of images, whose places have the coordinates `source_at` `[B, S]`.

        With a dropout key, that is in training, batch norm is by the statistics of these images, not by running ones.

        Raises:
            ValueError: S is not the number of the images' places, or more than the decoder's learned positions.
        """
        rows, columns = self.grid(*images.shape[1:3])
        if source_at.shape[-1] != rows * columns:
            raise ValueError(f"source_at {source_at.shape} must be of {rows} x {columns} = {rows * columns} places")
        if isinstance(self.decoder, Seq2Seq) and self.decoder.room(rows * columns) is not None:
            raise ValueError(f"the decoder has fewer learned positions than an image of {rows} x {columns} places")
        # Padding may hold anything, NaN too, which a convolution would carry into the gradient of its kernel.
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
        """Logits `[B, T, V]` of the token after each of `target` `[B, T]`."""
        return self.decoder.decode(target, target_at, memory, dropout_key=dropout_key)

    def room(self, source_length: int) -> int | None:
        """How many target tokens the decoder has places for, whatever the size of an image that it can encode."""
        del source_length
        return self.decoder.room(0)

    def start(self, memory: Any, max_length: int) -> State:
        """The state before the first step, with room for `max_length` steps."""
        return self.decoder.start(memory, max_length)

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: State
    ) -> tuple[Float[Array, "B T V"], State]:
        """Many target tokens at once, `lengths[i]` of row i: logits after each, and the state after the last."""
        return self.decoder.prefill(tokens, lengths, state)

    def step(self, tokens: Int[Array, "R"], state: State) -> tuple[Float[Array, "R V"], State]:
        """Logits `[R, V]` of the token after `tokens` `[R]`, and the next state."""
        return self.decoder.step(tokens, state)

    def alignment(self, target: Int[Array, "B T"], target_at: Coordinates, memory: Any) -> Float[Array, "B L T S"]:
        """Where each target token looks in the image: weights of L heads over the S places, `[B, L, T, S]`."""
        return self.decoder.alignment(target, target_at, memory)
