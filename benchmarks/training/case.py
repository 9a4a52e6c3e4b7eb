"""The benchmark cases of training: models by name, with their batch, weights and operation counts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.bench.marian import END, RandomMarian, Sizes
from seqattn.interop.huggingface import from_huggingface
from seqattn.nn import with_implementation
from train.data.batches import Batch, collate, filled
from train.objectives.sequences import SequenceToSequence
from train.reports.flops import products

START = 1
"""Starts a target. Unlike in Marian it is not the padding token, whose embedding gets no gradient in torch."""
_SHORTEST = 5 / 8
"""Shortest length relative to the longest: typical for a bucket of similar lengths in Multi30k."""


@dataclass(frozen=True)
class TrainingCase:
    """An update of a model on one batch, which is the same in every process."""

    name: str
    sizes: Sizes
    target_length: int
    """Number of tokens of each target, including padding."""
    rows: int
    """Number of source-target pairs in a batch."""
    dropout_rate: float
    """Dropout rate of the embeddings and of each sublayer's output, and nowhere else."""
    label_smoothing: float = 0.1

    def fields(self) -> dict[str, Any]:
        """Returns name and sizes of the model and its batch, and the rates of dropout and label smoothing."""
        batch = {"target_length": self.target_length, "rows": self.rows}
        rates = {"dropout_rate": self.dropout_rate, "label_smoothing": self.label_smoothing, "dtype": "float32"}
        return {"model": self.name} | asdict(self.sizes) | batch | rates

    @property
    def config(self) -> dict[str, Any]:
        """The fields of a MarianMT `config.json`."""
        dropout = {"dropout": self.dropout_rate, "attention_dropout": 0.0, "activation_dropout": 0.0}
        return RandomMarian(self.sizes, Path()).config | dropout

    def weights(self) -> dict[str, np.ndarray]:
        """Returns float32 parameters by Marian's names, under which every token is possible."""
        arrays = RandomMarian(self.sizes, Path()).arrays
        bias = arrays["final_logits_bias"]
        return arrays | {"final_logits_bias": np.where(bias < -1, 0, bias)}

    def batch(self) -> Batch:
        """Returns a batch of random tokens, in the format of `train.data.batches`."""
        shape = (self.rows, self.sizes.source_length, self.target_length + 1)
        random = np.random.default_rng(shape)

        def text(longest: int) -> list[int]:
            length = random.integers(max(1, round(_SHORTEST * longest)), longest, endpoint=True)
            return [*random.integers(START + 1, self.sizes.pad_token, length - 1).tolist(), END]

        rows = [(text(self.sizes.source_length), [START, *text(self.target_length)]) for _ in range(self.rows)]
        return collate(rows, shape, self.sizes.pad_token)


MODELS = {
    case.name: case
    for case in (
        TrainingCase("multi30k", Sizes(4, 128, 256, 4, 10_000, source_length=16), 16, 256, dropout_rate=0.3),
        TrainingCase("base256", Sizes(3, 256, 1024, 4, 8000, source_length=32), 32, 64, dropout_rate=0.1),
    )
}
"""Models by the name that `--models` takes: the sizes of the best Multi30k model, and 3 + 3 layers of 256."""


def tokens(batch: Batch) -> int:
    """Returns the number of source and target tokens, without padding."""
    return int(batch["source_length"].sum() + (batch["target_length"] - 1).sum())


def operations(case: TrainingCase, weights: dict[str, np.ndarray]) -> float:
    """Returns the forward operations of our loss's products per padded token: F of `train.engine.meter.Meter`."""
    graph, parameters = nnx.split(from_huggingface(case.config, weights))

    def loss(parameters: nnx.State, batch: dict[str, jax.Array]) -> Any:
        # Other kernels loop over tiles, and the number of iterations is unknown to the operation count.
        model = with_implementation(nnx.merge(graph, parameters), "reference")
        return SequenceToSequence.loss(model, batch)

    batch = case.batch()
    return products(loss, parameters, batch) / tokens(filled(batch))
