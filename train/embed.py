"""Gives a vector for each text: `python -m train.embed hf:FOLDER "a text" "another text"`.

Standard output has one line for each text: a JSON list of numbers. `--to FILE.npy` writes an array of all vectors
instead, float32 `[texts, D]`.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import tyro

from seqattn.models import EncoderConfig, Pooling
from train.data.standard_input import lines_as_they_come, standard_input
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import loading, sentence_vectors
from train.inference.embedder import Embedder


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Gives a vector for each text, or for each line of standard input, with the encoder of a run.

    A folder of sentence-transformers says by itself how its vectors are made. The flags below change that.
    """

    run: tyro.conf.Positional[Path]
    """Run folder, folder of an exported model, or hf:FOLDER for a folder of Hugging Face transformers (hf:NAME for a
    model of the hub)."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts. Without any, reads all of standard input and takes each line as a text."""
    pooling: Pooling | None = None
    """Which vector stands for a text: the mean of those of its tokens, or that of its first token. By default the
    mean."""
    normalize: bool | None = None
    """Whether vectors have length 1, so that their products are cosines. By default True."""
    max_length: int | None = None
    """Maximum number of tokens of a text; longer texts are cut. By default all that the model allows."""
    batch_size: int = 64
    """Maximum number of texts in a batch."""
    to: Path | None = None
    """Write the vectors to this file in the format of NumPy, .npy, and print nothing."""


def main(arguments: Arguments) -> None:
    """Prints or writes the vectors."""
    if arguments.to is not None and arguments.to.suffix != ".npy":
        raise ValueError(f"--to ({arguments.to}) must end in .npy")
    trained = loading.load_trained(arguments.run)
    loading.check_task(trained, arguments.experiment)
    config = trained.model.config
    if not isinstance(config, EncoderConfig):
        raise ValueError(f"train.embed serves encoders, but {arguments.run} holds a {type(trained.model).__name__}")
    settings = sentence_vectors.settings_of(trained.folder)
    given = {name: getattr(arguments, name) for name in ("pooling", "normalize", "max_length")}
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})
    embedder = Embedder(
        trained.model, trained.tokenizer, batch_size=arguments.batch_size, **dataclasses.asdict(settings)
    )
    texts = arguments.text or [line for lines in lines_as_they_come(standard_input(), sys.maxsize) for line in lines]
    vectors = embedder(texts)
    if arguments.to is not None:
        np.save(arguments.to, vectors, allow_pickle=False)
        return
    for vector in vectors.tolist():
        print(json.dumps(vector))


if __name__ == "__main__":
    environment.command(
        lambda: main(tyro.cli(Arguments, prog="python -m train.embed", config=(tyro.conf.EnumChoicesFromValues,)))
    )
