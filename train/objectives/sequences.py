"""Source to target, by anything that encodes and decodes: translation, and all that can be told as one."""

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
        tokenizer: of both.
        bleu: also measure BLEU and chrF.
        rouge: also measure ROUGE-L and perplexity; outputs are then one line, of at most 64 tokens.
        beam_size: outputs are the best of so many hypotheses, scored by their mean log probability; 1 for greedy ones.
    """

    name = "SequenceToSequence"
    hub_task = "text2text-generation"
    sentence = "It writes a text, given a source text."
    command = "translate"
    models = (TransformerConfig, Seq2SeqConfig, LanguageModelConfig, RecurrentLanguageModelConfig)
    given = ("source", "target")
    searches = True

    def __init__(self, tokenizer: Tokenizer, *, bleu: bool = False, rouge: bool = False, beam_size: int = 1) -> None:
        super().__init__(tokenizer)
        self._bleu, self._rouge = bleu, rouge
        self._search: Search = Beam(beam_size) if beam_size > 1 else Greedy()

    @classmethod
    def of_run(
        cls, tokenizer: Tokenizer, labels: tuple[str, ...], *, bleu: bool, rouge: bool, beam_size: int
    ) -> "SequenceToSequence":
        """The objective of a run, with what it measures; it has no labels."""
        del labels
        return cls(tokenizer, bleu=bleu, rouge=rouge, beam_size=beam_size)

    def examples(self, split: Dataset) -> list[Example]:
        """Source ids with the end token, target ids between start and end token."""
        return examples(split, self.tokenizer)

    @staticmethod
    def loss(
        model: EncoderDecoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """The cross entropy of every target token under teacher forcing."""
        encode_key, decode_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        inputs, labels, source_at, target_at = _places(batch)
        memory = model.encode(batch["source"], source_at, dropout_key=encode_key)
        logits = model.decode(inputs, target_at, memory, dropout_key=decode_key)
        return cross_entropy(logits, labels, weights=target_at.segment != 0, label_smoothing=label_smoothing)

    def evaluate(self, model: EncoderDecoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Loss under teacher forcing, and outputs: `exact_match` from 0 to 1; `bleu`, `chrf` from 0 to 100.

        BLEU is sacrebleu's, `bleu_lowercase` the same of lower-cased texts. With ROUGE also `perplexity` of a token,
        `bits_per_character` (line ends included), and `rouge_l` from 0 to 100, by the words of `rouge.words`;
        where the references are English also `rouge_l_english` and `rouge_l_english_stemmed`, which can be compared
        with published figures.
        """
        references = list(split["target"])
        longest = _LINE if self._rouge else None
        options: dict[str, Any] = {"batch_size": batch_size, "search": self._search, "max_length": longest}
        outputs = Translator(model, self.tokenizer, **options)(list(split["source"]))
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
        """What sacrebleu measures, by name; each knows its signature once it has measured."""
        metrics = sacrebleu.metrics
        return {"bleu": metrics.BLEU(), "bleu_lowercase": metrics.BLEU(lowercase=True), "chrf": metrics.CHRF()}

    def draw(self, model: EncoderDecoder, split: Dataset, folder: Path) -> list[Path]:
        """Where the model looks while it writes the output for each of the first few sources."""
        texts = list(split["source"][:_DRAWN])
        return draw_texts(model, self.tokenizer, texts, folder)


def _rouge(outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means over the texts, from 0 to 100."""
    measures: dict[str, Callable[[str, str], float]] = {"rouge_l": rouge_l}
    if is_english(references):
        measures["rouge_l_english"] = partial(english_rouge_l, stemmed=False)
        measures["rouge_l_english_stemmed"] = partial(english_rouge_l, stemmed=True)
    return {name: 100 * sum(map(of, outputs, references)) / len(references) for name, of in measures.items()}


def _places(batch: Arrays) -> tuple[jax.Array, jax.Array, Coordinates, Coordinates]:
    """What the decoder is given `[B, T]`, the label of each token of it, and where sources and targets are."""
    if "label" in batch:  # packed
        source_at, target_at = (
            Coordinates(batch[f"{side}_position"], batch[f"{side}_segment"]) for side in ("source", "target")
        )
        return batch["target"], batch["label"], source_at, target_at
    inputs, labels = batch["target"][:, :-1], batch["target"][:, 1:]
    source_at = Coordinates.from_lengths(batch["source_length"], batch["source"].shape[1])
    return inputs, labels, source_at, Coordinates.from_lengths(batch["target_length"] - 1, inputs.shape[1])
