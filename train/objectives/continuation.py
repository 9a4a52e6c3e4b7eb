"""Language modeling: each token given the tokens before it."""

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
    """Language modeling of the "target" column; sources are empty.

    Examples have no end token: a piece of a longer text does not end where it was cut.
    """

    name = "Continuation"
    hub_task = "text-generation"
    sentence = "It continues a text."
    command = "complete"
    models = SequenceToSequence.models
    given = ("target",)
    by_coordinates = True

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """Returns the targets."""
        return split["target"][:]

    def examples(self, split: Dataset) -> list[Example]:
        """Returns pairs of an empty source and the start token followed by the ids of the text."""
        return [([], ids) for ids in self.tokenizer.prompts(split["target"][:])]

    @staticmethod
    def loss(
        model: EncoderDecoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Computes the cross-entropy of every token in nats; see `Objective.loss`."""
        return SequenceToSequence.loss(model, batch, label_smoothing=label_smoothing, dropout_key=dropout_key)

    def evaluate(self, model: EncoderDecoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Measures `loss`, `perplexity` per token and `bits_per_character`.

        The outputs are greedy continuations of the first halves of the first 16 texts.
        """
        loss = self.mean_loss(model, split, batch_size=batch_size)
        # One token of each target is the start token, which has no label.
        tokens = sum(len(target) - 1 for _, target in self.examples(split))
        bits = bits_per_character(loss, tokens, split["target"])
        outputs = Completer(model, self.tokenizer)([_half(text) for text in split["target"][:_SAID]])
        numbers = {"loss": loss, "perplexity": perplexity(loss), "bits_per_character": bits}
        return Scores(numbers, outputs)

    def draw(self, model: EncoderDecoder, split: Dataset, folder: Path) -> list[Path]:
        """Draws the attention to the first half of a text while the model reads the second; two texts."""
        paths: list[Path] = []
        for number, text in enumerate(split["target"][:_DRAWN], 1):
            half = _half(text)
            rest = text[len(half) :]
            paths += draw_reading(model, self.tokenizer, half[-_LETTERS:], rest[:_LETTERS], folder / str(number))
        return paths


def _half(text: str) -> str:
    return text[: (len(text) + 1) // 2]
