"""Masked language modelling: tokens that were hidden, from those on both sides (Devlin 2019, section 3.1)."""

from pathlib import Path

import jax
import jax.numpy as jnp
from datasets import Dataset

from seqattn import Coordinates, cross_entropy
from seqattn.models import Encoder, EncoderConfig, MaskedTokens
from train.data.batches import Batch, Example
from train.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from train.objectives.objective import Arrays, Objective, Scores, Sums, perplexity
from train.objectives.pictures import draw_heads

_CHOSEN, _HIDDEN, _REPLACED = 0.15, 0.8, 0.1


class Masking(Objective):
    """The text of the "target" column with some tokens hidden, as BERT is trained.

    15 % of the tokens are to be found: of these 80 % are hidden, 10 % are another token and 10 % as they were. The
    start token, which an encoder sees nowhere else, stands where one is hidden. Training hides others at every step,
    evaluation the same ones each time.
    """

    name = "Masking"
    hub_task = "fill-mask"
    sentence = "It finds hidden tokens; the start token (id 1) stands where one is to be found."
    models = (EncoderConfig,)
    head = MaskedTokens

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """The targets."""
        return list(split["target"])

    def examples(self, split: Dataset) -> list[Example]:
        """The ids of the text; nothing else is a label."""
        return [(ids, [0]) for ids in self.tokenizer.encode_batch(list(split["target"]))]

    @staticmethod
    def loss(
        model: Encoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """The cross entropy of every token that is to be found."""
        tokens, at = batch["source"], Coordinates.from_lengths(batch["source_length"], batch["source"].shape[1])
        key, dropout_key = (jax.random.key(0), None) if dropout_key is None else jax.random.split(dropout_key)
        seen, chosen = hide(tokens, key, model.config.vocab_size)
        logits = model(seen, at, dropout_key=dropout_key)
        weights = chosen & (at.segment != 0)
        return cross_entropy(logits, tokens, weights=weights, label_smoothing=label_smoothing)

    def evaluate(self, model: Encoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """`loss` and `perplexity` of a hidden token."""
        loss = self.mean_loss(model, split, batch_size=batch_size)
        return Scores({"loss": loss, "perplexity": perplexity(loss)}, [])

    def draw(self, model: Encoder, split: Dataset, folder: Path) -> list[Path]:
        """Where each token of the first few texts looks, in every head."""
        return draw_heads(model, self.tokenizer, split["target"], folder)

    def count(self, batch: Batch) -> int:
        """The tokens of the texts."""
        return int(batch["source_length"].sum())


def hide(tokens: jax.Array, key: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Tokens `[B, T]` as the model sees them, and which of them it is to find `[B, T]`."""
    which, how, other = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(which, _CHOSEN, tokens.shape)
    share = jax.random.uniform(how, tokens.shape)
    random = jax.random.randint(other, tokens.shape, len(SPECIAL_TOKENS), max(vocab_size, len(SPECIAL_TOKENS) + 1))
    replaced = jnp.where(share < _HIDDEN + _REPLACED, random.astype(tokens.dtype), tokens)
    hidden = jnp.where(share < _HIDDEN, jnp.full_like(tokens, Tokenizer.start_id), replaced)
    return jnp.where(chosen, hidden, tokens), chosen
