"""Translation of texts with a trained model, in batches of few shapes; outputs come in order, as soon as possible."""

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
    ForcedPrefix,
    Greedy,
    LengthPenalty,
    LogitsProcessor,
    MinLength,
    PrefixCost,
    Sampling,
    Stopping,
    beam_search,
    generate,
)
from seqattn.decoding.generate import Step
from seqattn.models import EncoderDecoder
from seqattn.pytrees import pytree
from train.data.batches import Example, collate, rows_of
from train.data.tokenizer import SpecialTokens, Tokenizer
from train.devices.layout import TABLES, Layout, fetch

FAILED = "[FAILED]"
"""Replaces an output if the logits of the model were not finite."""

_MULTIPLE = 16
"""Source lengths up to 64 are padded to multiples of this; see `padded_length` for longer ones."""


@pytree
@dataclass(frozen=True)
class Beam:
    """Selects beam search, as `Greedy()` and `Sample(...)` select a search with one hypothesis.

    Raises:
        ValueError: `size` or `n_best` is below 1, or `n_best` is above `size`.
    """

    size: int = field(default=4, metadata={"static": True})
    """Number of hypotheses per text."""
    n_best: int = field(default=1, metadata={"static": True})
    """Number of outputs to return per text."""
    length_penalty: LengthPenalty = AverageLength(1.0)
    """How scores of outputs of different lengths are compared."""
    stopping: Stopping = field(default=Stopping.EXACT, metadata={"static": True})
    """When the search of a text stops."""

    def __post_init__(self) -> None:
        check_integer("beam_size", self.size, 1)
        check_integer("n_best", self.n_best, 1, self.size, maximum_name="beam_size")


Search = Sampling | Beam
"""The search for an output: `Greedy()`, `Sample(filters)` or `Beam(size)`."""


@dataclass(frozen=True)
class Output:
    """One output for a text.

    Attributes:
        text: the output; `[FAILED]` if the logits of the model were not finite.
        score: log probability in nats, with the length penalty in beam search. NaN if decoding failed; -inf, with an
            empty text, if beam search found fewer outputs than asked for.
    """

    text: str
    score: float


_GREEDY = Greedy()
_EMPTY = Output("", 0.0)
_NOT_FOUND = Output("", -math.inf)


class Translator:
    """Translates texts with an encoder-decoder.

    Args:
        model: any encoder-decoder; later changes of its parameters have no effect.
        tokenizer: the tokenizer of source and target.
        batch_size: maximum number of texts decoded together; on a mesh, rounded up to a multiple of its parts of rows.
        search: the search for outputs.
        processors: logits processors that constrain outputs, applied in this order.
        max_length: maximum number of tokens of an output, including the end token; by default twice the padded source
            length plus 16. Learned positions may limit it further.
        seed: seed of sampling. The sample of a text depends on the seed and the index of the text, not on its batch.

    Raises:
        ValueError: a minimum length among the processors exceeds the learned positions of the model, or the tokenizer
            has several end tokens, which a search cannot serve.
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
        # In a decoder-only model a longer source leaves less room for the output. Only texts of equal length are then
        # decoded together, so that no output depends on the other texts of its batch.
        self._padded = padded_length if model.room(0) == model.room(1) else int
        self._shortest = max((int(each.length) for each in processors if isinstance(each, MinLength)), default=0)
        most = model.room(0)
        if most is not None and self._shortest > most:
            raise ValueError(f"min_length ({self._shortest}) exceeds the learned positions of the model ({most})")
        if len(tokenizer.special.end) > 1:
            raise ValueError(
                f"a search for outputs serves one end token, but the tokenizer has {tokenizer.special.end}"
            )
        # The special tokens of a source.
        self._empty = len(tokenizer.sources([""])[0])
        graph, self.params = nnx.split(model)
        self._layout = Layout.of(self.params)
        self._find = _compiled(graph, tokenizer.special, self._layout)

    @property
    def n_best(self) -> int:
        """The number of outputs per text."""
        return self.search.n_best if isinstance(self.search, Beam) else 1

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Returns the best output for each text, in order.

        The output is `[FAILED]` if the logits of the model were not finite, and empty for a text without tokens.
        """
        return [outputs[0].text for outputs in self.stream([texts])]

    def stream(self, chunks: Iterable[Sequence[str]]) -> Iterator[list[Output]]:
        """Yields the `n_best` outputs of each text of each chunk, best first; texts in order, as soon as possible.

        A batch has texts of one chunk only. The number of its rows is the number of texts of the first chunk, at most
        `batch_size`, and becomes `batch_size` once a chunk has more texts. Each padded length is thus compiled once or
        twice. Batches of long texts have fewer rows.

        Args:
            chunks: lists of texts.

        Raises:
            ValueError: a text leaves no room for an output within the learned positions of the model.
        """
        rows = first = 0
        for texts in chunks:
            sources = self._sources(texts)
            self._check_lengths(sources, first)
            # A text without tokens has only special ones. It needs no decoding.
            count = sum(len(ids) > self._empty for ids, _ in sources)
            if count > rows:
                rows = self.batch_size if rows else min(self.batch_size, count)
            yield from in_order(self._outputs(sources, rows, first), len(texts))
            first += len(texts)

    def _sources(self, texts: Sequence[str]) -> list[Example]:
        return [(ids, [0]) for ids in self.tokenizer.sources(texts)]

    def _outputs(self, sources: list[Example], rows: int, first: int) -> Iterator[tuple[int, list[Output]]]:
        """Yields the index of each text in its chunk and its outputs, batch by batch; `first` texts came before."""
        rest = [_NOT_FOUND] * (self.n_best - 1)
        yield from ((index, [_EMPTY, *rest]) for index, (ids, _) in enumerate(sources) if len(ids) <= self._empty)
        for chosen, padded in _batches(sources, rows, self._padded, self._layout.parts, self._empty):
            # Rows that only fill the batch repeat a text, so that they end when it does.
            count = rows_of(padded, rows, self._layout.parts)
            filled = [*chosen, *[chosen[-1]] * (count - len(chosen))]
            batch = collate([sources[index] for index in filled], (count, padded, 1))
            indices = ((np.array(filled) + first) % 2**32).astype(np.uint32)
            found = self._find(
                *(self.params, *self._layout.split((batch["source"], batch["source_length"], indices))),
                *self._layout.copied((self._seed, self.search, self._processors)),
                max_length=self._room(padded, len(sources[chosen[0]][0])),
            )
            tokens, length, score, failed = fetch(found)
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
                    f"text {number} has {len(ids)} tokens: the learned positions of the model leave no room for an "
                    f"output of {max(1, self._shortest)}"
                )

    def _room(self, padded: int, length: int) -> int:
        """Returns the maximum number of output tokens; generous, as decoding stops when all texts have ended."""
        generous = max(2 * padded + _MULTIPLE, self._shortest)
        wanted = generous if self._max_length is None else self._max_length
        room = self._model_room(length)
        return wanted if room is None else min(wanted, room)


def in_order(found: Iterable[tuple[int, Any]], count: int) -> Iterator[Any]:
    """Yields the values with the indices 0 to `count - 1` in order, each as soon as all before it are available.

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
    """Returns the length to pad a source to: 16, 32, 48, 64, then two lengths per doubling: 96, 128, 192, 256, ...

    Few lengths mean few compilations, and padding adds less than half to lengths above 32 tokens.

    >>> [padded_length(length) for length in (1, 16, 17, 64, 65, 128, 129, 200)]
    [16, 16, 32, 64, 96, 128, 192, 256]
    """
    multiple = max(_MULTIPLE, 2 ** (length - 1).bit_length() // 4)
    return -(-length // multiple) * multiple


def _batches(
    sources: list[Example], rows: int, pad: Callable[[int], int], multiple: int, empty: int = 1
) -> Iterator[tuple[list[int], int]]:
    """Yields the indices of texts of similar length, and their padded length; batches with the earliest texts first."""
    groups: dict[int, list[int]] = {}
    for index, (ids, _) in enumerate(sources):
        if len(ids) > empty:
            groups.setdefault(pad(len(ids)), []).append(index)
    batches = [
        (group[start : start + rows_of(padded, rows, multiple)], padded)
        for padded, group in groups.items()
        for start in range(0, len(group), rows_of(padded, rows, multiple))
    ]
    # The output of text 0 is due first, so the batch of the earliest text comes first.
    return iter(sorted(batches))


@cache
def _compiled(graph: nnx.GraphDef, special: SpecialTokens, layout: Layout) -> Callable[..., tuple[Array, ...]]:
    """Returns one compiled function for all models of a structure, so that the evaluations of a run share it.

    It returns tokens `[B, n_best, L]`, length and score `[B, n_best]`, and whether a row failed `[B]`.
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
        model = layout.merged(graph, params, TABLES)
        memory = model.encode(source, Coordinates.from_lengths(length, source.shape[1]))
        state, first = model.start(memory, max_length), jnp.full(len(source), special.start, jnp.int32)
        processors = (*_forced(special.first, len(source)), *processors)
        tokens: dict[str, Any] = {"max_length": max_length, "end_token": special.end[0], "pad_token": special.pad}
        if isinstance(search, Beam):
            return _beams(model.step, state, first, search, processors=processors, **tokens)
        # A key for each text, from its index: its sample does not depend on its place in a batch.
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index) if search.random else None
        found = generate(model.step, state, first, processors=processors, sampling=search, key=keys, **tokens)
        one = (found.tokens, found.length, found.log_probability)
        return *(leaf[:, None] for leaf in one), found.failed

    return jax.jit(translate, static_argnames="max_length")


def _forced(first: tuple[int, ...], count: int) -> tuple[LogitsProcessor, ...]:
    """Forces the tokens that every target starts with."""
    if not first:
        return ()
    return (
        ForcedPrefix(
            jnp.tile(jnp.array(first, jnp.int32), (count, 1)), jnp.full(count, len(first)), PrefixCost.NOTHING
        ),
    )


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
