"""A run folder: what training writes there, and what translating and evaluating read."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from datasets import Dataset
from flax import nnx

from seqattn.models import (
    Captioner,
    CaptionerConfig,
    Encoder,
    EncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    Seq2Seq,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    Transformer,
    TransformerConfig,
)
from train.checkpoint import Checkpoints
from train.config import FROM_DATA, FROM_TOKENIZER, Experiment, Model, decode, differences, encode
from train.freezing import freeze
from train.step import TrainState, start
from train.tokenizer import Tokenizer

_MODELS: dict[type, type] = {
    CaptionerConfig: Captioner,
    EncoderConfig: Encoder,
    LanguageModelConfig: LanguageModel,
    RecurrentLanguageModelConfig: RecurrentLanguageModel,
    Seq2SeqConfig: Seq2Seq,
    TransformerConfig: Transformer,
}

_FREE = ("run", "evaluate_every", "evaluate_examples", "log_every", "keep_checkpoints", "bleu")
"""Fields in which a resumed run may differ: they change what is shown and kept, not the parameters."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as it lies in a run folder.

    Attributes:
        folder: the run folder.
        experiment: its resolved config.
        tokenizer: its tokenizer.
        labels: the labels of a model that gives labels, in the order of their ids.
        step: updates that the parameters have seen.
        model: the model with these parameters.
    """

    folder: Path
    experiment: Experiment
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    step: int
    model: Any


def build(config: Model, *, seed: int) -> nnx.Module:
    """The model of a config, with parameters drawn from the seed."""
    return _MODELS[type(config)](config, rngs=nnx.Rngs(params=seed))


def resolve(experiment: Experiment, tokenizer: Tokenizer, labels: tuple[str, ...]) -> Experiment:
    """The experiment with the size of the vocabulary and the number of labels filled in.

    Raises:
        ValueError: the model's table is smaller than the vocabulary, or its labels are not as many as there are.
    """
    model = experiment.model
    if model.vocab_size == FROM_TOKENIZER:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size of the model ({model.vocab_size}) is below that of the tokenizer ({tokenizer.vocab_size})"
        )
    if isinstance(model, EncoderConfig) and isinstance(head := model.head, TokenLabels | TextLabels):
        head = dataclasses.replace(head, num_labels=len(labels)) if head.num_labels == FROM_DATA else head
        if head.num_labels != len(labels):
            raise ValueError(f"num_labels of the model ({head.num_labels}) must be that of the data ({len(labels)})")
        model = dataclasses.replace(model, head=head)
    return dataclasses.replace(experiment, model=model)


def fingerprint(splits: Mapping[str, Dataset]) -> str:
    """A digest of every text of every split, in order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for column in ("source", "target"):
            for text in splits[name][column]:
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def to_text(experiment: Experiment) -> str:
    """The resolved config as JSON."""
    return json.dumps(encode(experiment), indent=2, ensure_ascii=False)


def check_same(folder: Path, saved: str, experiment: Experiment) -> None:
    """Raises ValueError where a saved config differs from the experiment in what decides the parameters."""
    wrong = differences(json.loads(saved), encode(experiment))
    # With patience it is the evaluations that decide where training stops.
    free = _FREE if experiment.patience is None else ("run", "log_every", "bleu")
    wrong = [line for line in wrong if line.partition(":")[0] not in free]
    if wrong:
        raise ValueError(
            f"{folder} holds a run with another configuration (there and here):\n  "
            + "\n  ".join(wrong)
            + "\nGive the same flags to resume it, or another folder with --run"
        )


def load(folder: Path) -> Run:
    """The latest model of a run folder.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
    """
    checkpoints = Checkpoints(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if checkpoints is None or checkpoints.latest is None:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint; train it with python -m train EXPERIMENT --run {folder}"
        )
    texts = checkpoints.texts()
    experiment: Experiment = decode(json.loads(texts["config"]))
    optimizer = freeze(experiment.optimizer.make(experiment.steps), experiment.frozen)
    graph, fresh = start(build(experiment.model, seed=0), optimizer)
    state: TrainState = checkpoints.restore(fresh)
    checkpoints.close()
    model = nnx.merge(graph, state.params)
    labels = tuple(json.loads(texts.get("labels", "[]")))
    tokenizer = Tokenizer.from_json(texts["tokenizer"])
    return Run(folder, experiment, tokenizer, labels, int(jnp.asarray(state.step)), model)
