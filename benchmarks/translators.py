"""Who decodes: every implementation by the name that `--implementations` takes, and by the name of its module."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from benchmarks import machine
from benchmarks.marian import END, Case, Model
from benchmarks.program import Program
from seqattn.coordinates import Coordinates
from seqattn.decoding import AverageLength, Stopping, beam_search, generate
from seqattn.interop import from_marian
from seqattn.models.transformer import Transformer

Translator = Callable[[Case], Program]
"""Makes a program for a case, whose result is the tokens `[B, L]` of the best hypotheses."""

Load = Callable[[Model], Translator]
"""Makes a translator of the weights.

Raises ImportError where the library is not installed, NotImplementedError where it cannot serve.
"""


def seqattn(model: Model) -> Translator:
    """`generate` and `beam_search` over our Transformer: one compiled function, to which the parameters are given."""
    transformer = from_marian(model.config, model.arrays)
    graph, parameters = nnx.split(transformer)

    def prepare(case: Case) -> Program:
        def run(parameters: nnx.State, source: Array, lengths: Array) -> Array:
            return _translate(nnx.merge(graph, parameters), source, lengths, case)

        source = jnp.asarray(case.sources())
        arguments = (parameters, source, jnp.full(case.batch, source.shape[1], jnp.int32))
        start = time.perf_counter()
        executable = jax.jit(run).lower(*arguments).compile()
        return Program(
            run=lambda: executable(*arguments),
            wait=jax.block_until_ready,
            arrays=lambda tokens: [np.asarray(tokens)],
            compile_seconds=time.perf_counter() - start,
        )

    return prepare


def _translate(
    model: Transformer, source: Int[Array, "B S"], lengths: Int[Array, "B"], case: Case
) -> Int[Array, "B L"]:
    memory = model.encode(source, Coordinates.from_lengths(lengths, source.shape[1]))
    pad_token = case.sizes.pad_token
    first = jnp.full(case.batch, pad_token, jnp.int32)
    limits: dict[str, Any] = {"max_length": case.length, "end_token": END, "pad_token": pad_token}
    state = model.start(memory, case.length)
    if case.beam_size == 1:
        return generate(model.step, state, first, **limits).tokens
    # As the others search unless they are told otherwise.
    search: dict[str, Any] = {"length_penalty": AverageLength(1.0), "stopping": Stopping.LIKELY}
    return beam_search(model.step, state, first, beam_size=case.beam_size, **search, **limits).tokens[:, 0]


def hugging_face(model: Model) -> Translator:
    """`MarianMTModel.generate` of transformers, in eager PyTorch, as it comes."""
    _only_on_a_cpu("transformers")
    import torch

    torch.set_num_threads(machine.cores())
    network = marian_mt(model.config, model.arrays)

    def prepare(case: Case) -> Program:
        source = torch.from_numpy(case.sources().astype(np.int64))
        given = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        choices = {"num_beams": case.beam_size, "max_new_tokens": case.length, "do_sample": False}

        def run() -> Any:
            with torch.inference_mode():
                return network.generate(**given, **choices)

        return Program(run, _nothing_to_wait_for, lambda found: [found.numpy()[:, 1:].astype(np.int32)])

    return prepare


def marian_mt(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """The `MarianMTModel` of transformers with these parameters."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    network = transformers.MarianMTModel(transformers.MarianConfig(**config)).eval()
    found = network.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()}, strict=False)
    # The rest are sines and second names of the one table.
    missing = [name for name in found.missing_keys if "embed_" not in name and name != "lm_head.weight"]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"MarianMTModel lacks {missing} and does not know {found.unexpected_keys}")
    return network


def ctranslate2(model: Model) -> Translator:
    """`Translator.translate_batch` of CTranslate2, whose batches are not split."""
    _only_on_a_cpu("ctranslate2")
    import ctranslate2

    if not (model.folder / "model.bin").exists():
        _convert(model)
    threads = {"inter_threads": 1, "intra_threads": machine.cores()}
    translator = ctranslate2.Translator(str(model.folder), device="cpu", compute_type="float32", **threads)

    def prepare(case: Case) -> Program:
        source = [[str(token) for token in row] for row in case.sources()]
        choices = {"beam_size": case.beam_size, "max_decoding_length": case.length}
        return Program(lambda: translator.translate_batch(source, **choices), _nothing_to_wait_for, _hypotheses)

    return prepare


def _hypotheses(found: Any) -> Sequence[np.ndarray]:
    return [np.array([[int(token) for token in row.hypotheses[0]] for row in found], np.int32)]


class _Tokenizer:
    """What the converter asks of a tokenizer: tokens are called by their numbers, and the last is the padding."""

    eos_token, unk_token = str(END), "1"

    def __init__(self, vocab_size: int) -> None:
        self._names = [*map(str, range(vocab_size - 1)), "<pad>"]

    def get_vocab(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._names)}


def _convert(model: Model) -> None:
    import torch
    from ctranslate2.converters.transformers import MarianMTLoader

    with torch.no_grad():
        spec = MarianMTLoader()(marian_mt(model.config, model.arrays), _Tokenizer(model.sizes.vocab_size))
        spec.validate()
        spec.optimize(quantization="float32")
        spec.save(str(model.folder))


def _only_on_a_cpu(name: str) -> None:
    if machine.platform_name() != "cpu":
        raise NotImplementedError(f"{name} is measured on the CPU only, set JAX_PLATFORMS=cpu")


def _nothing_to_wait_for(result: Any) -> None:
    """What is returned is there."""


NAMES: dict[str, Load] = {"seqattn": seqattn, "transformers": hugging_face, "ctranslate2": ctranslate2}

PEERS = ("transformers", "ctranslate2")
"""Whom ours are compared with; the first that answers says what is right."""
