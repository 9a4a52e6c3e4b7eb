"""Masked language modeling: hidden tokens from the tokens on both sides (Devlin 2019, section 3.1)."""

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
    """Masked language modeling of the "target" column, as in BERT.

    The model predicts 15 % of the tokens. Of these 80 % are replaced with the start token, 10 % with a random token,
    and 10 % are unchanged. The start token serves as the mask token because encoders use it nowhere else. Training
    chooses new tokens at every step; evaluation always chooses the same ones.
    """

    name = "Masking"
    hub_task = "fill-mask"
    sentence = "It predicts hidden tokens; the start token (id 1) marks their places."
    models = (EncoderConfig,)
    head = MaskedTokens

    def __init__(self, tokenizer: Tokenizer, labels: tuple[str, ...] = ()) -> None:
        if type(tokenizer) is not Tokenizer:
            raise ValueError(
                "masked language modeling hides tokens with the start token of our own tokenizers, so it does not "
                "serve a model with a tokenizer of transformers"
            )
        super().__init__(tokenizer, labels)

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """Returns the targets."""
        return split["target"][:]

    def examples(self, split: Dataset) -> list[Example]:
        """Returns the ids of each text, with an unused target; the tokens themselves are the labels."""
        return [(ids, [0]) for ids in self.tokenizer.encode_batch(split["target"][:])]

    @staticmethod
    def loss(
        model: Encoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Computes the cross-entropy of every chosen token; see `Objective.loss`."""
        tokens, at = batch["source"], Coordinates.from_lengths(batch["source_length"], batch["source"].shape[1])
        # Without a dropout key the loss is for evaluation: a fixed key makes two evaluations comparable.
        key, dropout_key = (jax.random.key(0), None) if dropout_key is None else jax.random.split(dropout_key)
        seen, chosen = hide(tokens, key, model.config.vocab_size)
        logits = model(seen, at, dropout_key=dropout_key)
        weights = chosen & (at.segment != 0)
        return cross_entropy(logits, tokens, weights=weights, label_smoothing=label_smoothing)

    def evaluate(self, model: Encoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Measures `loss` and `perplexity` per chosen token; there are no outputs."""
        loss = self.mean_loss(model, split, batch_size=batch_size)
        return Scores({"loss": loss, "perplexity": perplexity(loss)}, [])

    def draw(self, model: Encoder, split: Dataset, folder: Path) -> list[Path]:
        """Draws the self-attention of the first texts, one picture for each text with all heads."""
        return draw_heads(model, self.tokenizer, split["target"], folder)

    def count(self, batch: Batch) -> int:
        """Returns the number of tokens of the texts."""
        return int(batch["source_length"].sum())


def hide(tokens: jax.Array, key: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Hides tokens for masked language modeling.

    Args:
        tokens: ids, int32 `[B, T]`.
        key: a random key.
        vocab_size: number of tokens; replacements are drawn from those that are not special.

    Returns:
        The tokens that the model sees, int32 `[B, T]`, and the places that it must predict, bool `[B, T]`. Padding may
        be among these places.
    """
    which, how, other = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(which, _CHOSEN, tokens.shape)
    # One uniform number per token decides: hidden below 0.8, replaced below 0.9, unchanged from there on.
    share = jax.random.uniform(how, tokens.shape)
    # A vocabulary may consist of special tokens only; the upper bound keeps the range from being empty.
    random = jax.random.randint(other, tokens.shape, len(SPECIAL_TOKENS), max(vocab_size, len(SPECIAL_TOKENS) + 1))
    replaced = jnp.where(share < _HIDDEN + _REPLACED, random.astype(tokens.dtype), tokens)
    hidden = jnp.where(share < _HIDDEN, jnp.full_like(tokens, Tokenizer.start_id), replaced)
    return jnp.where(chosen, hidden, tokens), chosen
