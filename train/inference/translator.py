"""From texts to texts with a trained model: in batches of few shapes, in order, as soon as they are known."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from seqattn import Coordinates
from seqattn.checks import check_integer
from seqattn.decoding import (
    AverageLength,
    Greedy,
    LengthPenalty,
    LogitsProcessor,
    MinLength,
    Sampling,
    Stopping,
    beam_search,
    generate,
)
from seqattn.decoding.generate import Step
from seqattn.models import EncoderDecoder
from seqattn.pytrees import pytree
from train.data.batches import Example, collate, rows_of
from train.data.tokenizer import Tokenizer

FAILED = "[FAILED]"
"""Stands for an output that is none: the model's logits were not finite."""

_MULTIPLE = 16
"""Source lengths are padded to multiples of this, up to four of them; longer ones to few more lengths."""


@pytree
@dataclass(frozen=True)
class Beam:
    """Beam search as a choice: what `Greedy()` and `Sample(...)` are for one hypothesis.

    Raises:
        ValueError: a size below 1, or more to return than there are hypotheses.
    """

    size: int = field(default=4, metadata={"static": True})
    """Hypotheses of a text."""
    n_best: int = field(default=1, metadata={"static": True})
    """How many of them to return."""
    length_penalty: LengthPenalty = AverageLength(1.0)
    """How outputs of different lengths compare."""
    stopping: Stopping = field(default=Stopping.EXACT, metadata={"static": True})
    """When a text is done."""

    def __post_init__(self) -> None:
        check_integer("beam_size", self.size, 1)
        check_integer("n_best", self.n_best, 1, self.size, maximum_name="beam_size")


Search = Sampling | Beam
"""How an output is found: `Greedy()`, `Sample(filters)` or `Beam(size)`."""


@dataclass(frozen=True)
class Output:
    """One output for a text.

    Attributes:
        text: the output; `[FAILED]` where the model's logits were not finite.
        score: its log probability in nats, penalised for its length where a beam was searched; NaN where it failed,
            -inf (and no text) where a beam found fewer outputs than were asked for.
    """

    text: str
    score: float


_GREEDY = Greedy()
_EMPTY = Output("", 0.0)
_NOT_FOUND = Output("", -math.inf)


class Translator:
    """Decoding of whole texts.

    Args:
        model: any encoder-decoder; its parameters are read once, here.
        tokenizer: of source and target.
        batch_size: most texts decoded together.
        search: how outputs are found.
        processors: what outputs may hold, in this order.
        max_length: most tokens of an output, the end token counted; by default twice as many as the source has, and
            some more. Learned positions set a limit of their own.
        seed: of samples. A text's sample depends on the seed and the text's index alone, not on its batch.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 64,
        search: Search = _GREEDY,
        processors: Sequence[LogitsProcessor] = (),
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.batch_size, self.search = tokenizer, batch_size, search
        self._processors, self._max_length, self._seed = tuple(processors), max_length, np.uint32(seed)
        self._model_room = model.room
        # Where a longer source leaves less room, only texts of one length are decoded together: no output depends on
        # the texts beside it.
        self._padded = padded_length if model.room(0) == model.room(1) else int
        self._shortest = max((int(each.length) for each in processors if isinstance(each, MinLength)), default=0)
        most = model.room(0)
        if most is not None and self._shortest > most:
            raise ValueError(f"min_length ({self._shortest}) exceeds the model's learned positions ({most})")
        graph, self.params = nnx.split(model)
        self._find = _compiled(graph, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)

    @property
    def n_best(self) -> int:
        """How many outputs a text has."""
        return self.search.n_best if isinstance(self.search, Beam) else 1

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The best output for each text, in the same order; `[FAILED]` where the model's logits were not finite.

        A text without tokens has an empty output.
        """
        return [outputs[0].text for outputs in self.stream([texts])]

    def stream(self, chunks: Iterable[Sequence[str]]) -> Iterator[list[Output]]:
        """The `n_best` outputs for each text of each chunk, the best first: in order, each as soon as it is known.

        Batches are made of texts of one chunk. All have so many rows as the first chunk has texts, at most
        `batch_size`, and that many once a chunk has more: a compilation for each length, or two. Those of long texts
        have fewer.

        Raises:
            ValueError: a text has more tokens than the model has learned positions.
        """
        rows = first = 0
        for texts in chunks:
            sources = self._sources(texts)
            self._check_lengths(sources, first)
            # A text without tokens has nothing but its end token.
            count = sum(len(ids) > 1 for ids, _ in sources)
            if count > rows:
                rows = self.batch_size if rows else min(self.batch_size, count)
            yield from in_order(self._outputs(sources, rows, first), len(texts))
            first += len(texts)

    def _sources(self, texts: Sequence[str]) -> list[Example]:
        return [([*ids, self.tokenizer.end_id], [0]) for ids in self.tokenizer.encode_batch(texts)]

    def _outputs(self, sources: list[Example], rows: int, first: int) -> Iterator[tuple[int, list[Output]]]:
        """Each text's index in its chunk and its outputs, batch by batch; `first` is the index of the first text."""
        rest = [_NOT_FOUND] * (self.n_best - 1)
        yield from ((index, [_EMPTY, *rest]) for index, (ids, _) in enumerate(sources) if len(ids) == 1)
        for chosen, padded in _batches(sources, rows, self._padded):
            # Rows that only fill the batch repeat a text: they end when it does.
            count = rows_of(padded, rows)
            filled = [*chosen, *[chosen[-1]] * (count - len(chosen))]
            batch = collate([sources[index] for index in filled], (count, padded, 1))
            indices = ((np.array(filled) + first) % 2**32).astype(np.uint32)
            found = self._find(
                *(self.params, batch["source"], batch["source_length"], indices, self._seed),
                *(self.search, self._processors),
                max_length=self._room(padded, len(sources[chosen[0]][0])),
            )
            tokens, length, score, failed = map(np.asarray, found)
            for row, index in enumerate(chosen):
                if failed[row]:
                    yield index, [Output(FAILED, math.nan), *rest]
                else:
                    yield index, [self._output(*one) for one in zip(tokens[row], length[row], score[row], strict=True)]

    def _output(self, tokens: np.ndarray, length: np.ndarray, score: np.ndarray) -> Output:
        return Output(self.tokenizer.decode(tokens[:length].tolist()), float(score))

    def _check_lengths(self, sources: list[Example], first: int) -> None:
        for number, (ids, _) in enumerate(sources, first + 1):
            room = self._model_room(len(ids))
            if room is not None and room < max(1, self._shortest):
                raise ValueError(
                    f"text {number} is a text of {len(ids)} tokens: the model's learned positions leave no room for an "
                    f"output of {max(1, self._shortest)}"
                )

    def _room(self, padded: int, length: int) -> int:
        """Tokens of an output of a source of some length: generous, since decoding stops when all texts have ended."""
        generous = max(2 * padded + _MULTIPLE, self._shortest)
        wanted = generous if self._max_length is None else self._max_length
        room = self._model_room(length)
        return wanted if room is None else min(wanted, room)


def in_order(found: Iterable[tuple[int, Any]], count: int) -> Iterator[Any]:
    """The values 0 to `count - 1` in order, each as soon as it and all before it are there.

    >>> list(in_order([(1, "b"), (0, "a"), (2, "c")], 3))
    ['a', 'b', 'c']
    """
    waiting: dict[int, Any] = {}
    due = 0
    for index, value in found:
        waiting[index] = value
        while due in waiting:
            yield waiting.pop(due)
            due += 1
    assert due == count, f"{count - due} of {count} values are missing"


def padded_length(length: int) -> int:
    """The length that a source is padded to: 16, 32, 48, 64, and then two for each doubling: 96, 128, 192, 256, ...

    >>> [padded_length(length) for length in (1, 16, 17, 64, 65, 128, 129, 200)]
    [16, 16, 32, 64, 96, 128, 192, 256]
    """
    multiple = max(_MULTIPLE, 2 ** (length - 1).bit_length() // 4)
    return -(-length // multiple) * multiple


def _batches(sources: list[Example], rows: int, pad: Callable[[int], int]) -> Iterator[tuple[list[int], int]]:
    """Indices of texts of similar length, and that length; those first that hold the earliest text."""
    groups: dict[int, list[int]] = {}
    for index, (ids, _) in enumerate(sources):
        if len(ids) > 1:
            groups.setdefault(pad(len(ids)), []).append(index)
    batches = [
        (group[start : start + rows_of(padded, rows)], padded)
        for padded, group in groups.items()
        for start in range(0, len(group), rows_of(padded, rows))
    ]
    return iter(sorted(batches))


@cache
def _compiled(graph: nnx.GraphDef, start_id: int, end_id: int, pad_id: int) -> Callable[..., tuple[Array, ...]]:
    """One compiled function for every model of a structure: evaluations during training share it.

    It gives tokens `[B, n_best, L]`, length and score `[B, n_best]`, and which rows failed `[B]`.
    """

    def translate(
        params: nnx.State,
        source: Array,
        length: Array,
        index: Array,
        seed: Array,
        search: Search,
        processors: tuple[LogitsProcessor, ...],
        *,
        max_length: int,
    ) -> tuple[Array, ...]:
        model = nnx.merge(graph, params)
        memory = model.encode(source, Coordinates.from_lengths(length, source.shape[1]))
        state, first = model.start(memory, max_length), jnp.full(len(source), start_id, jnp.int32)
        tokens: dict[str, Any] = {"max_length": max_length, "end_token": end_id, "pad_token": pad_id}
        if isinstance(search, Beam):
            return _beams(model.step, state, first, search, processors=processors, **tokens)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index) if search.random else None
        found = generate(model.step, state, first, processors=processors, sampling=search, key=keys, **tokens)
        one = (found.tokens, found.length, found.log_probability)
        return *(leaf[:, None] for leaf in one), found.failed

    return jax.jit(translate, static_argnames="max_length")


def _beams(step: Step, state: Any, first: Array, beam: Beam, **settings: Any) -> tuple[Array, ...]:
    found = beam_search(
        *(step, state, first),
        beam_size=beam.size,
        n_best=beam.n_best,
        length_penalty=beam.length_penalty,
        stopping=beam.stopping,
        **settings,
    )
    return found.tokens, found.length, found.score, found.failed
