"""Texts to vectors by an encoder, in batches of few shapes."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from seqattn import Coordinates
from seqattn.checks import check_sizes
from seqattn.models import Encoder, Pooling
from seqattn.models.pooling import first_token, mean_over_tokens
from seqattn.models.position_encodings import limit
from train.data.batches import Example, once
from train.data.tokenizer import Tokenizer
from train.devices.layout import Layout, fetch

log = logging.getLogger(__name__)

_SMALLEST = 1e-12
"""A norm below this counts as this, so that the vector of a text without tokens is zero and not NaN."""


class Embedder:
    """Gives a vector for each text: the mean of the encoder's vectors, or that of the first token.

    Args:
        model: an encoder with any head, which is not asked.
        tokenizer: its tokenizer.
        pooling: which vector stands for a text.
        normalize: if True, vectors have length 1, so that their products are cosines.
        max_length: maximum number of tokens of a text, special tokens included; longer texts are cut, which a warning
            tells. By default all that the learned positions of the model allow.
        batch_size: maximum number of texts in a batch.

    Raises:
        ValueError: a size is below 1, or `max_length` is above the learned positions of the model.
    """

    def __init__(
        self,
        model: Encoder,
        tokenizer: Tokenizer,
        *,
        pooling: Pooling = Pooling.MEAN,
        normalize: bool = True,
        max_length: int | None = None,
        batch_size: int = 64,
    ) -> None:
        most = limit(model.config.positions)
        sizes = {"batch_size": batch_size, "max_length": max_length}
        check_sizes(**{name: value for name, value in sizes.items() if value is not None})
        if most is not None and max_length is not None and max_length > most:
            raise ValueError(f"max_length ({max_length}) must be at most {most}, the learned positions of the model")
        self.tokenizer, self._batch_size = tokenizer, batch_size
        self._longest = most if max_length is None else max_length
        self._dim = model.config.block.model_dim
        graph, self._params = nnx.split(model)
        self._layout = Layout.of(self._params)
        self._embed = _compiled(graph, self._layout, pooling, normalize)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the vectors of texts in order, float32 `[N, D]`. That of a text without tokens is zero.

        Args:
            texts: N texts.
        """
        rows: list[Example] = [(ids, [0]) for ids in self._ids(texts)]
        found = np.zeros((len(rows), self._dim), np.float32)
        for chosen, batch in once(rows, size=self._batch_size, multiple=self._layout.parts):
            sources = {name: batch[name] for name in ("source", "source_length")}
            vectors = fetch(self._embed(self._params, self._layout.split(sources)))
            found[chosen] = vectors[: len(chosen)]
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids = self.tokenizer.inputs(texts)
        longest = self._longest
        long = [index for index, text in enumerate(ids) if longest is not None and len(text) > longest]
        if long and longest is not None:
            log.warning("%d of %d texts have more than %d tokens and were cut", len(long), len(texts), longest)
            for index, cut in zip(long, self.tokenizer.cut([texts[i] for i in long], longest), strict=True):
                ids[index] = cut
        return ids


@cache
def _compiled(graph: nnx.GraphDef, layout: Layout, pooling: Pooling, normalize: bool) -> Any:
    """Returns one compiled function for all models of a structure."""

    def embed(params: nnx.State, batch: dict[str, Array]) -> Float[Array, "B D"]:
        model = layout.merged(graph, params)
        at = Coordinates.from_lengths(batch["source_length"], batch["source"].shape[1])
        x = model.encode(batch["source"], at)
        real = jnp.broadcast_to(at.segment, x.shape[:-1]) != 0
        pooled = (mean_over_tokens if pooling is Pooling.MEAN else first_token)(x, real).astype(jnp.float32)
        if not normalize:
            return pooled
        return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), _SMALLEST)

    return jax.jit(embed)
