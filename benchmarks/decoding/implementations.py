"""The implementations of decoding, by the name that `--implementations` takes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from benchmarks.bench import machine
from benchmarks.bench.marian import END, RandomMarian, marian_mt
from benchmarks.bench.program import Program, compiled, there_already
from benchmarks.decoding.case import DecodingCase
from seqattn.coordinates import Coordinates
from seqattn.decoding import AverageLength, Stopping, beam_search, generate
from seqattn.interop.huggingface import from_huggingface
from seqattn.models.transformer import Transformer

Translator = Callable[[DecodingCase], Program]
"""Makes a program for a case. Its result is the tokens `[B, L]` of the best hypotheses."""

Load = Callable[[RandomMarian], Translator]
"""Makes a translator from the weights.

Raises ImportError if the library is not installed, NotImplementedError if it does not support the device.
"""


def seqattn(model: RandomMarian) -> Translator:
    """`generate` and `beam_search` over our Transformer, compiled once with the parameters as arguments."""
    transformer = from_huggingface(model.config, model.arrays)
    graph, parameters = nnx.split(transformer)

    def prepare(case: DecodingCase) -> Program:
        def run(parameters: nnx.State, source: Array, lengths: Array) -> Array:
            return _translate(nnx.merge(graph, parameters), source, lengths, case)

        source = jnp.asarray(case.sources())
        arguments = (parameters, source, jnp.full(case.batch, source.shape[1], jnp.int32))
        return compiled(run, *arguments)

    return prepare


def _translate(
    model: Transformer, source: Int[Array, "B S"], lengths: Int[Array, "B"], case: DecodingCase
) -> Int[Array, "B L"]:
    memory = model.encode(source, Coordinates.from_lengths(lengths, source.shape[1]))
    pad_token = case.sizes.pad_token
    first = jnp.full(case.batch, pad_token, jnp.int32)
    limits: dict[str, Any] = {"max_length": case.length, "end_token": END, "pad_token": pad_token}
    state = model.start(memory, case.length)
    if case.beam_size == 1:
        return generate(model.step, state, first, **limits).tokens
    # The default length penalty and stopping rule of the other libraries.
    search: dict[str, Any] = {"length_penalty": AverageLength(1.0), "stopping": Stopping.LIKELY}
    return beam_search(model.step, state, first, beam_size=case.beam_size, **search, **limits).tokens[:, 0]


def hugging_face(model: RandomMarian) -> Translator:
    """`MarianMTModel.generate` of transformers, in eager PyTorch, as it comes."""
    machine.only_on_a_cpu("transformers")
    import torch

    torch.set_num_threads(machine.cores())
    network = marian_mt(model.config, model.arrays)

    def prepare(case: DecodingCase) -> Program:
        source = torch.from_numpy(case.sources().astype(np.int64))
        given = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        choices = {"num_beams": case.beam_size, "max_new_tokens": case.length, "do_sample": False}

        def run() -> Any:
            with torch.inference_mode():
                return network.generate(**given, **choices)

        return Program(run, there_already, lambda found: [found.numpy()[:, 1:].astype(np.int32)])

    return prepare


def ctranslate2(model: RandomMarian) -> Translator:
    """`Translator.translate_batch` of CTranslate2, without splitting batches."""
    machine.only_on_a_cpu("ctranslate2")
    import ctranslate2

    if not (model.folder / "model.bin").exists():
        _convert(model)
    threads = {"inter_threads": 1, "intra_threads": machine.cores()}
    translator = ctranslate2.Translator(str(model.folder), device="cpu", compute_type="float32", **threads)

    def prepare(case: DecodingCase) -> Program:
        source = [[str(token) for token in row] for row in case.sources()]
        choices = {"beam_size": case.beam_size, "max_decoding_length": case.length}
        return Program(lambda: translator.translate_batch(source, **choices), there_already, _hypotheses)

    return prepare


def _hypotheses(found: Any) -> Sequence[np.ndarray]:
    return [np.array([[int(token) for token in row.hypotheses[0]] for row in found], np.int32)]


class _Tokenizer:
    """The parts of a tokenizer that the converter needs: tokens are named by their ids, and the last is padding."""

    eos_token, unk_token = str(END), "1"

    def __init__(self, vocab_size: int) -> None:
        self._names = [*map(str, range(vocab_size - 1)), "<pad>"]

    def get_vocab(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._names)}


def _convert(model: RandomMarian) -> None:
    import torch
    from ctranslate2.converters.transformers import MarianMTLoader

    with torch.no_grad():
        spec = MarianMTLoader()(marian_mt(model.config, model.arrays), _Tokenizer(model.sizes.vocab_size))
        spec.validate()
        spec.optimize(quantization="float32")
        spec.save(str(model.folder))


NAMES: dict[str, Load] = {"seqattn": seqattn, "transformers": hugging_face, "ctranslate2": ctranslate2}

PEERS = ("transformers", "ctranslate2")
"""The libraries we compare with; the first one that works is the reference."""
