"""The pictures of a run: `python -m train.plot RUN`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro
from datasets import Dataset

from seqattn import Coordinates
from train import environment, run
from train.batches import collate
from train.drawing import attention_map, learning_curves
from train.log import read_metrics
from train.run import Run
from train.translator import FAILED, Translator, longest

_MAPS = 3


def draw(trained: Run, texts: Sequence[str]) -> list[Path]:
    """Learning curves, and where the model looks while it writes the output for each text."""
    paths = list(learning_curves(read_metrics(trained.folder / "metrics.jsonl"), trained.folder / "curves"))
    outputs = Translator(trained.model, trained.tokenizer)(texts)
    for number, (text, output) in enumerate(zip(texts, outputs, strict=True), 1):
        paths += draw_attention(trained, text, output, trained.folder / "attention" / str(number))
    return paths


def examples_to_draw(test: Dataset) -> list[str]:
    """The first few sources of a test split."""
    return list(test["source"][:_MAPS])


def draw_attention(trained: Run, source: str, output: str, path_stem: Path) -> list[Path]:
    """Where each token of `output` looks in `source`: the mean over heads, and every head.

    Nothing is drawn without attention, of an empty source, or of an output that failed.
    """
    tokenizer, limit = trained.tokenizer, longest(trained.model)
    ids = [*tokenizer.encode(source), tokenizer.end_id]
    # An output that filled all learned positions has none left for its end token.
    target = [tokenizer.start_id, *tokenizer.encode(output), tokenizer.end_id][: None if limit is None else limit + 1]
    if output == FAILED or len(ids) == 1:
        return []
    batch = collate([(ids, target)])
    memory = trained.model.encode(jnp.asarray(batch["source"]), Coordinates.from_lengths([len(ids)], len(ids)))
    inputs = jnp.asarray(batch["target"][:, :-1])
    weights = trained.model.alignment(inputs, Coordinates.from_lengths([inputs.shape[1]], inputs.shape[1]), memory)
    heads = np.asarray(weights[0])
    if not len(heads):
        return []
    path_stem.parent.mkdir(parents=True, exist_ok=True)
    labels = (tokenizer.tokens(ids), tokenizer.tokens(target[1:]))
    paths = [*attention_map(heads.mean(axis=0), *labels, path_stem, title=f"{source} → {output}")]
    if len(heads) > 1:
        each = path_stem.with_name(f"{path_stem.name}-heads")
        paths += attention_map(heads, *labels, each, title=f"every head: {source} → {output}")
    return paths


@dataclass(frozen=True)
class Arguments:
    """Draws learning curves and attention maps of a run into its folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to draw the attention of; without any, the first few of the test split."""


def main(arguments: Arguments) -> None:
    """Prints the path of each picture."""
    trained = run.load(arguments.run)
    for path in draw(trained, arguments.text or examples_to_draw(trained.experiment.task.load()["test"])):
        print(path)


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.plot")))
