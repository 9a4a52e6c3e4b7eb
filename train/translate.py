"""Text to text with a trained model: `python -m train.translate RUN [TEXT ...]`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from seqattn import Coordinates
from seqattn.decoding import Generated, generate
from seqattn.models import EncoderDecoder, Learned
from train import environment, run
from train.batches import Example, collate
from train.tokenizer import Tokenizer

_MULTIPLE = 16
"""Source lengths are padded to multiples of this, so that few shapes are compiled."""


FAILED = "[FAILED]"
"""Stands for an output that is none: the model's logits were not finite."""


class Translator:
    """Greedy decoding of whole texts.

    Args:
        model: any encoder-decoder; its parameters are read once, here.
        tokenizer: of source and target.
        batch_size: texts decoded together.
    """

    def __init__(self, model: EncoderDecoder, tokenizer: Tokenizer, *, batch_size: int = 64) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._limit = longest(model)
        graph, self.params = nnx.split(model)
        self._generate = _compiled(graph, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The output for each text, in the same order; `[FAILED]` where the model's logits were not finite.

        A text without tokens has an empty output.
        """
        outputs = [""] * len(texts)
        sources: list[Example] = [([*ids, self.tokenizer.end_id], [0]) for ids in self.tokenizer.encode_batch(texts)]
        for chosen, source, length in self._batches(sources):
            found = self._generate(self.params, source, length, self._max_length(source.shape[1]))
            tokens, ends, failed = (np.asarray(x) for x in (found.tokens, found.length, found.failed))
            for row, index in enumerate(chosen):
                text = self.tokenizer.decode(tokens[row, : ends[row]].tolist())
                outputs[index] = FAILED if failed[row] else text
        return outputs

    def _batches(self, sources: list[Example]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Batches of similar length in few shapes."""
        groups: dict[int, list[int]] = {}
        for index, (ids, _) in enumerate(sources):
            if len(ids) == 1:
                continue  # the end token alone: nothing to translate
            padded = -(-len(ids) // _MULTIPLE) * _MULTIPLE
            if self._limit is not None and len(ids) > self._limit:
                raise ValueError(f"a text of {len(ids)} tokens: the model's learned positions end at {self._limit}")
            groups.setdefault(padded, []).append(index)
        for padded, group in sorted(groups.items()):
            for first in range(0, len(group), self.batch_size):
                chosen = group[first : first + self.batch_size]
                size = self.batch_size if len(group) > 1 else 1
                batch = collate([sources[index] for index in chosen], (size, padded, 1))
                yield chosen, batch["source"], batch["source_length"]

    def _max_length(self, source_length: int) -> int:
        """Room for the output: generous, since decoding stops when all texts have ended."""
        room = 2 * source_length + _MULTIPLE
        return room if self._limit is None else min(room, self._limit)


def longest(model: EncoderDecoder) -> int | None:
    """The most tokens that a model can place; None without a limit."""
    positions = getattr(getattr(model, "config", None), "positions", None)
    return positions.max_length if isinstance(positions, Learned) else None


@cache
def _compiled(graph: nnx.GraphDef, start_id: int, end_id: int, pad_id: int) -> Callable[..., Generated]:
    """One compiled function for every model of a structure: evaluations during training share it."""

    def translate(params: nnx.State, source: jax.Array, length: jax.Array, max_length: int) -> Generated:
        model = nnx.merge(graph, params)
        memory = model.encode(source, Coordinates.from_lengths(length, source.shape[1]))
        first = jnp.full(len(source), start_id, jnp.int32)
        state = model.start(memory, max_length)
        return generate(model.step, state, first, max_length=max_length, end_token=end_id, pad_token=pad_id)

    return jax.jit(translate, static_argnums=3)


@dataclass(frozen=True)
class Arguments:
    """Translates texts, or standard input line by line, with the latest model of a run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to translate; without any, lines of standard input."""


def main(arguments: Arguments) -> None:
    """Prints one line for each text."""
    trained = run.load(arguments.run)
    translator = Translator(trained.model, trained.tokenizer)
    lines = arguments.text or tuple(line.rstrip("\r\n") for line in sys.stdin)
    for output in translator(lines):
        print(output)


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.translate")))
