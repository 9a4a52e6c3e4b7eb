"""A run folder: what training writes there, and what translating and evaluating read."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from datasets import Dataset
from flax import nnx

from seqattn.models import EncoderDecoder, Seq2Seq, Seq2SeqConfig, Transformer, TransformerConfig
from train.checkpoint import Checkpoints
from train.config import FROM_TOKENIZER, Experiment, decode, differences, encode
from train.step import TrainState, start
from train.tokenizer import Tokenizer

_FREE = ("run", "evaluate_every", "evaluate_examples", "log_every", "keep_checkpoints", "bleu")
"""Fields in which a resumed run may differ: they change what is shown and kept, not the parameters."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as it lies in a run folder.

    Attributes:
        folder: the run folder.
        experiment: its resolved config.
        tokenizer: its tokenizer.
        step: updates that the parameters have seen.
        model: the model with these parameters.
    """

    folder: Path
    experiment: Experiment
    tokenizer: Tokenizer
    step: int
    model: EncoderDecoder


def build(config: TransformerConfig | Seq2SeqConfig, *, seed: int) -> nnx.Module:
    """The model of a config, with parameters drawn from the seed."""
    rngs = nnx.Rngs(params=seed)
    return Seq2Seq(config, rngs=rngs) if isinstance(config, Seq2SeqConfig) else Transformer(config, rngs=rngs)


def resolve(experiment: Experiment, tokenizer: Tokenizer) -> Experiment:
    """The experiment with the size of the vocabulary filled in.

    Raises:
        ValueError: the model's table is smaller than the vocabulary.
    """
    size = experiment.model.vocab_size
    if size == FROM_TOKENIZER:
        model = dataclasses.replace(experiment.model, vocab_size=tokenizer.vocab_size)
        return dataclasses.replace(experiment, model=model)
    if size < tokenizer.vocab_size:
        raise ValueError(f"vocab_size of the model ({size}) is below that of the tokenizer ({tokenizer.vocab_size})")
    return experiment


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
    wrong = [line for line in wrong if line.partition(":")[0] not in _FREE]
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
    graph, fresh = start(build(experiment.model, seed=0), experiment.optimizer.make(experiment.steps))
    state: TrainState = checkpoints.restore(fresh)
    checkpoints.close()
    model = nnx.merge(graph, state.params)
    return Run(folder, experiment, Tokenizer.from_json(texts["tokenizer"]), int(jnp.asarray(state.step)), model)
