"""Language modelling: every token given those before it."""

from pathlib import Path

import jax
from datasets import Dataset

from seqattn.models import EncoderDecoder
from train.data.batches import Example
from train.inference.completer import Completer
from train.objectives.objective import Arrays, Objective, Scores, Sums, bits_per_character, perplexity
from train.objectives.pictures import draw_reading
from train.objectives.sequences import SequenceToSequence

_SAID, _DRAWN, _LETTERS = 16, 2, 40


class Continuation(Objective):
    """The text of the "target" column from its start, as a language model reads it: sources are empty.

    A piece of a longer text does not end where it was cut, so no end token is learned.
    """

    name = "Continuation"
    hub_task = "text-generation"
    sentence = "It goes on with a text."
    command = "complete"
    models = SequenceToSequence.models
    given = ("target",)

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """The targets."""
        return list(split["target"])

    def examples(self, split: Dataset) -> list[Example]:
        """Empty sources, and the start token with the ids of the text behind it."""
        start = self.tokenizer.start_id
        return [([], [start, *ids]) for ids in self.tokenizer.encode_batch(list(split["target"]))]

    @staticmethod
    def loss(
        model: EncoderDecoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """The negative log likelihood of every token."""
        return SequenceToSequence.loss(model, batch, label_smoothing=label_smoothing, dropout_key=dropout_key)

    def evaluate(self, model: EncoderDecoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """`loss`, `perplexity` of a token and `bits_per_character`; outputs go on from the first half of a text."""
        loss = self.mean_loss(model, split, batch_size=batch_size)
        tokens = sum(len(target) - 1 for _, target in self.examples(split))
        bits = bits_per_character(loss, tokens, split["target"])
        outputs = Completer(model, self.tokenizer)([_half(text) for text in split["target"][:_SAID]])
        numbers = {"loss": loss, "perplexity": perplexity(loss), "bits_per_character": bits}
        return Scores(numbers, outputs)

    def draw(self, model: EncoderDecoder, split: Dataset, folder: Path) -> list[Path]:
        """Where the model looks in the first half of a text while it reads the second."""
        paths: list[Path] = []
        for number, text in enumerate(split["target"][:_DRAWN], 1):
            half = _half(text)
            rest = text[len(half) :]
            paths += draw_reading(model, self.tokenizer, half[-_LETTERS:], rest[:_LETTERS], folder / str(number))
        return paths


def _half(text: str) -> str:
    return text[: (len(text) + 1) // 2]
