"""Completion: continuations of texts by a language model."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqattn import Coordinates
from seqattn.checks import check_integer
from seqattn.decoding import Greedy, Sampling, generate
from seqattn.models import EncoderDecoder
from train.data.tokenizer import SpecialTokens, Tokenizer
from train.devices.layout import TABLES, Layout, fetch
from train.inference.translator import padded_length

_GREEDY = Greedy()


class Completer:
    """Continues texts with a language model, which reads a text as if it had generated it.

    Args:
        model: a language model with the protocol of an encoder-decoder; its source is empty.
        tokenizer: the tokenizer of the model.
        length: maximum number of tokens to add; learned positions may limit it further.
        sampling: how tokens are chosen.
        seed: seed of sampling; the samples of a text depend on the seed and the index of the text.

    Raises:
        ValueError: `length` is below 1.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        tokenizer: Tokenizer,
        *,
        length: int = 64,
        sampling: Sampling = _GREEDY,
        seed: int = 0,
    ) -> None:
        check_integer("length", length, 1)
        self.tokenizer, self._length, self._sampling, self._seed = tokenizer, length, sampling, np.uint32(seed % 2**32)
        self._limit = model.room(0)
        graph, self._params = nnx.split(model)
        self._layout = Layout.of(self._params)
        self._find = _compiled(graph, tokenizer.special, self._layout)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """Returns the continuation of each text, without the text itself.

        Raises:
            ValueError: a text fills all learned positions of the model.
        """
        if not texts:
            return []
        ids = self.tokenizer.prompts(list(texts))
        # Devices share the rows. Those that only fill the batch repeat a text.
        ids += [ids[-1]] * (-len(ids) % self._layout.parts)
        width = padded_length(max(map(len, ids)))
        # The cache is filled with all tokens but the last, which is the input of the first decoding step. Padding on
        # the right is masked, so texts of different lengths share a batch.
        read = np.full((len(ids), width), self.tokenizer.pad_id, np.int32)
        for row, text in enumerate(ids):
            read[row, : len(text) - 1] = text[:-1]
        lengths = np.array([len(text) - 1 for text in ids], np.int32)
        last = np.array([text[-1] for text in ids], np.int32)
        room = self._length
        if self._limit is not None:
            if lengths.max() >= self._limit:
                raise ValueError(
                    f"a text of {lengths.max() + 1} tokens fills the {self._limit} learned positions of the model"
                )
            # The shortest text sets the limit. A longer one ends when it has no position left: its logits are NaN then.
            room = min(room, self._limit - int(lengths.min()))
        rows, chosen = (read, lengths, last), (self._sampling, self._seed)
        found = self._find(self._params, *self._layout.split(rows), *self._layout.copied(chosen), room=room)
        tokens, length = fetch(found)
        added = [tokens[row, : length[row]].tolist() for row in range(len(texts))]
        return [self.tokenizer.continuation(*each) for each in zip(ids, added, strict=False)]


@cache
def _compiled(graph: nnx.GraphDef, special: SpecialTokens, layout: Layout) -> Any:
    def complete(
        params: nnx.State,
        read: jax.Array,
        lengths: jax.Array,
        last: jax.Array,
        sampling: Sampling,
        seed: jax.Array,
        *,
        room: int,
    ) -> tuple[jax.Array, jax.Array]:
        model = layout.merged(graph, params, TABLES)
        nothing = jnp.zeros((len(read), 0), jnp.int32)
        memory = model.encode(nothing, Coordinates(nothing, nothing))
        _, state = model.prefill(read, lengths, model.start(memory, read.shape[1] + room))
        found = generate(
            *(model.step, state, last),
            max_length=room,
            end_token=special.end[0],
            pad_token=special.pad,
            sampling=sampling,
            key=jax.random.key(seed),
        )
        return found.tokens, found.length

    return jax.jit(complete, static_argnames="room")
