"""How good a model is on a split: `python -m train.evaluate RUN --split test`."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax
import sacrebleu
import tyro
from datasets import Dataset
from flax import nnx

from train import environment, run
from train.batches import examples, once
from train.step import loss
from train.tokenizer import Tokenizer
from train.translator import Translator


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `evaluate` measured.

    Attributes:
        loss: mean cross entropy of a label in nats, without label smoothing.
        exact_match: share of outputs that equal their reference, 0 to 1.
        bleu: corpus BLEU, 0 to 100; None where not asked for.
        chrf: corpus chrF, 0 to 100; likewise.
        signature: what sacrebleu says of how BLEU was computed.
        outputs: the output for each source.
    """

    loss: float
    exact_match: float
    bleu: float | None
    chrf: float | None
    signature: str | None
    outputs: list[str]

    def numbers(self) -> dict[str, float]:
        """The figures that were measured, by name."""
        fields = {"loss": self.loss, "exact_match": self.exact_match, "bleu": self.bleu, "chrf": self.chrf}
        return {name: value for name, value in fields.items() if value is not None}


def evaluate(model: Any, tokenizer: Tokenizer, split: Dataset, *, bleu: bool = False, batch_size: int = 64) -> Scores:
    """Loss under teacher forcing and greedy outputs of a model on a split (columns "source" and "target")."""
    references = list(split["target"])
    outputs = Translator(model, tokenizer, batch_size=batch_size)(list(split["source"]))
    matches = sum(output == reference for output, reference in zip(outputs, references, strict=True))
    metric = sacrebleu.metrics.BLEU() if bleu else None
    return Scores(
        loss=mean_loss(model, tokenizer, split, batch_size=batch_size),
        exact_match=matches / len(references),
        bleu=None if metric is None else metric.corpus_score(outputs, [references]).score,
        chrf=sacrebleu.corpus_chrf(outputs, [references]).score if bleu else None,
        signature=None if metric is None else str(metric.get_signature()),
        outputs=outputs,
    )


def mean_loss(model: Any, tokenizer: Tokenizer, split: Dataset, *, batch_size: int = 64) -> float:
    """Mean cross entropy of a label in nats, without dropout and label smoothing."""
    graph, params = nnx.split(model)
    sums = [_compiled(graph)(params, batch) for _, batch in once(examples(split, tokenizer), size=batch_size)]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))


@cache
def _compiled(graph: nnx.GraphDef) -> Any:
    return jax.jit(lambda params, batch: loss(nnx.merge(graph, params), batch))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measures the latest model of a run on one of its splits."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    split: Literal["train", "validation", "test"] = "test"
    """Which examples."""
    examples: int | None = None
    """At most this many of them, from the first on; all by default."""


def main(arguments: Arguments) -> None:
    """Prints the figures, one a line."""
    trained = run.load(arguments.run)
    split = trained.experiment.task.load()[arguments.split]
    if arguments.examples is not None:
        if arguments.examples < 1:
            raise ValueError(f"--examples ({arguments.examples}) must be at least 1")
        split = split.select(range(min(len(split), arguments.examples)))
    scores = evaluate(trained.model, trained.tokenizer, split, bleu=trained.experiment.bleu)
    print(f"{arguments.split} split of {arguments.run}: {len(split)} examples, after {trained.step} updates")
    for name, value in scores.numbers().items():
        print(f"{name}: {value:.4f}")
    if scores.signature is not None:
        print(f"sacrebleu: {scores.signature}")


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.evaluate")))
