"""Sequence to sequence: the target text given the source text, as in translation and summarization."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import sacrebleu
from datasets import Dataset

from seqattn import Coordinates, cross_entropy
from seqattn.decoding import Greedy
from seqattn.models import (
    EncoderDecoder,
    LanguageModelConfig,
    RecurrentLanguageModelConfig,
    Seq2SeqConfig,
    TransformerConfig,
)
from train.data.batches import Example, examples
from train.data.tokenizer import Tokenizer
from train.inference.translator import Beam, Search, Translator
from train.objectives.objective import Arrays, Objective, Scores, Sums, bits_per_character, perplexity
from train.objectives.pictures import draw_texts
from train.objectives.rouge import english_rouge_l, is_english, rouge_l

_DRAWN, _LINE = 3, 64


class SequenceToSequence(Objective):
    """The target text, token by token, given the source text.

    Args:
        tokenizer: the tokenizer of sources and targets.
        bleu: if True, also measure BLEU and chrF.
        rouge: if True, also measure ROUGE-L and perplexity; outputs are then one line of at most 64 tokens.
        beam_size: number of hypotheses of the beam search, scored by their mean log probability; 1 is greedy search.
    """

    name = "SequenceToSequence"
    hub_task = "text2text-generation"
    sentence = "It generates a text from a source text."
    command = "translate"
    models = (TransformerConfig, Seq2SeqConfig, LanguageModelConfig, RecurrentLanguageModelConfig)
    given = ("source", "target")
    searches = True
    by_coordinates = True

    def __init__(self, tokenizer: Tokenizer, *, bleu: bool = False, rouge: bool = False, beam_size: int = 1) -> None:
        super().__init__(tokenizer)
        self._bleu, self._rouge = bleu, rouge
        self._search: Search = Beam(beam_size) if beam_size > 1 else Greedy()

    @classmethod
    def of_run(
        cls, tokenizer: Tokenizer, labels: tuple[str, ...], *, bleu: bool, rouge: bool, beam_size: int
    ) -> "SequenceToSequence":
        """Makes the objective of a run; `labels` are ignored."""
        del labels
        return cls(tokenizer, bleu=bleu, rouge=rouge, beam_size=beam_size)

    def examples(self, split: Dataset) -> list[Example]:
        """Returns pairs of source ids with the end token and target ids between start and end token."""
        return examples(split, self.tokenizer)

    @staticmethod
    def loss(
        model: EncoderDecoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Computes the cross-entropy of every target token under teacher forcing; see `Objective.loss`."""
        encode_key, decode_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        inputs, labels, source_at, target_at = _places(batch)
        memory = model.encode(batch["source"], source_at, dropout_key=encode_key)
        logits = model.decode(inputs, target_at, memory, dropout_key=decode_key)
        return cross_entropy(logits, labels, weights=target_at.segment != 0, label_smoothing=label_smoothing)

    def evaluate(self, model: EncoderDecoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Measures the loss under teacher forcing and the outputs of the search.

        `loss` is in nats per token and `exact_match` is a fraction from 0 to 1. With BLEU, sacrebleu computes `bleu`,
        `bleu_lowercase` (of lower-cased texts) and `chrf`, each from 0 to 100; its signatures make them comparable with
        published values. With ROUGE, there are also `perplexity` per token, `bits_per_character` (end tokens count as
        tokens) and `rouge_l` from 0 to 100, with the words of `rouge.words`. If the references are English, there are
        also `rouge_l_english` and `rouge_l_english_stemmed`, which can be compared with published values.
        """
        references = split["target"][:]
        # ROUGE compares single lines. The limit also ends outputs of models that do not learn to stop.
        longest = _LINE if self._rouge else None
        options: dict[str, Any] = {"batch_size": batch_size, "search": self._search, "max_length": longest}
        outputs = Translator(model, self.tokenizer, **options)(split["source"][:])
        matches = sum(output == reference for output, reference in zip(outputs, references, strict=True))
        loss = self.mean_loss(model, split, batch_size=batch_size)
        numbers, signatures = {"loss": loss, "exact_match": matches / len(references)}, {}
        for name, metric in self._metrics().items() if self._bleu else ():
            numbers[name] = metric.corpus_score(outputs, [references]).score
            signatures[name] = str(metric.get_signature())
        if self._rouge:
            numbers["perplexity"] = perplexity(loss)
            tokens = sum(len(target) - 1 for _, target in self.examples(split))
            numbers["bits_per_character"] = bits_per_character(loss, tokens, references)
            numbers |= _rouge(outputs, references)
        return Scores(numbers, outputs, signatures)

    @staticmethod
    def _metrics() -> dict[str, sacrebleu.metrics.BLEU | sacrebleu.metrics.CHRF]:
        """The metrics of sacrebleu by name; a metric has its signature only after it has scored something."""
        metrics = sacrebleu.metrics
        return {"bleu": metrics.BLEU(), "bleu_lowercase": metrics.BLEU(lowercase=True), "chrf": metrics.CHRF()}

    def draw(self, model: EncoderDecoder, split: Dataset, folder: Path) -> list[Path]:
        """Draws the attention to each of the first three sources while the model writes its output."""
        texts = list(split["source"][:_DRAWN])
        return draw_texts(model, self.tokenizer, texts, folder)


def _rouge(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Returns the means of ROUGE-L over the texts, from 0 to 100."""
    measures: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l}
    if is_english(references):
        measures["rouge_l_english"] = partial(english_rouge_l, stemmed=False)
        measures["rouge_l_english_stemmed"] = partial(english_rouge_l, stemmed=True)
    return {name: 100 * sum(map(of, outputs, references)) / len(references) for name, of in measures.items()}


def _places(batch: Arrays) -> tuple[jax.Array, jax.Array, Coordinates, Coordinates]:
    """Returns the inputs of the decoder `[B, T]`, their labels `[B, T]`, and the coordinates of sources and targets."""
    # A packed row holds several texts, so its labels cannot be made by shifting the row.
    if "label" in batch:
        source_at, target_at = (
            Coordinates(batch[f"{side}_position"], batch[f"{side}_segment"]) for side in ("source", "target")
        )
        return batch["target"], batch["label"], source_at, target_at
    inputs, labels = batch["target"][:, :-1], batch["target"][:, 1:]
    source_at = Coordinates.from_lengths(batch["source_length"], batch["source"].shape[1])
    return inputs, labels, source_at, Coordinates.from_lengths(batch["target_length"] - 1, inputs.shape[1])
