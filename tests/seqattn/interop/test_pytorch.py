"""PyTorch's recurrent layers as ours: its equations in NumPy, and the weights of a published model.

The published model is downloaded: it is a slow test, which is left out where nothing can be downloaded.

    .venv/bin/python -m pytest -m "slow or not slow" tests/seqattn/interop/test_pytorch.py
"""

import hashlib
import importlib
import subprocess
import sys
import warnings
import zipfile
from unittest import mock

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.decoding import generate
from seqattn.interop import recurrent_from_torch
from seqattn.models import Seq2Seq, Seq2SeqConfig
from seqattn.nn import Cell, Direction

B, T, D, H = 3, 7, 5, 4
GATES = {Cell.SIMPLE: 1, Cell.GRU: 3, Cell.LSTM: 4}
X = np.random.default_rng(1).normal(size=(B, T, D))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def weights(cell: Cell) -> tuple[np.ndarray, ...]:
    """weight_ih, weight_hh, bias_ih and bias_hh, all of one size, so that no bias hides."""
    random, rows = np.random.default_rng(2), GATES[cell] * H
    return tuple(random.normal(size=shape) for shape in ((rows, D), (rows, H), (rows,), (rows,)))


def states(cell: Cell, weight_ih, weight_hh, bias_ih, bias_hh) -> np.ndarray:
    """The states `[B, T, H]` over X, by the equations in PyTorch's documentation of RNN, GRU and LSTM, in float64."""
    hidden, memory, found = np.zeros((B, H)), np.zeros((B, H)), []
    for t in range(T):
        given = np.split(X[:, t] @ weight_ih.T + bias_ih, GATES[cell], axis=-1)
        kept = np.split(hidden @ weight_hh.T + bias_hh, GATES[cell], axis=-1)
        if cell is Cell.SIMPLE:
            hidden = np.tanh(given[0] + kept[0])
        elif cell is Cell.GRU:
            r, z = sigmoid(given[0] + kept[0]), sigmoid(given[1] + kept[1])
            n = np.tanh(given[2] + r * kept[2])
            hidden = (1 - z) * n + z * hidden
        else:
            i, f, g, o = (a + b for a, b in zip(given, kept, strict=True))
            memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(memory)
        found.append(hidden)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("cell", Cell)
def test_layers_with_pytorchs_weights_are_pytorchs_equations(cell):
    """With all four biases of a GRU's gates: also the one inside the reset gate."""
    with jax.enable_x64(True):
        layer = recurrent_from_torch(cell, *weights(cell), param_dtype=jnp.float64)
        output, _ = jax.jit(layer.__call__)(jnp.asarray(X), Coordinates.range(T))
    np.testing.assert_allclose(output, states(cell, *weights(cell)), rtol=1e-10, atol=1e-12)


def test_a_layer_that_reads_backward_is_a_reversed_one():
    forward, backward = (recurrent_from_torch(Cell.GRU, *weights(Cell.GRU), backward=back) for back in (False, True))
    at, x = Coordinates.range(T), jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(backward(x, at)[0], forward(x[:, ::-1], at)[0][:, ::-1], atol=1e-6)


def test_a_gru_with_the_weights_of_linen_is_linens():
    theirs = flax.linen.GRUCell(H)
    start = jax.eval_shape(lambda: theirs.init(jax.random.key(0), jnp.zeros((B, H)), jnp.zeros((B, D))))
    random = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), start)["params"]
    assert params["hn"]["bias"].shape == (H,)
    none = jnp.zeros(H)
    layer = recurrent_from_torch(
        Cell.GRU,
        np.concatenate([params[f"i{gate}"]["kernel"].T for gate in "rzn"]),
        np.concatenate([params[f"h{gate}"]["kernel"].T for gate in "rzn"]),
        np.concatenate([params[f"i{gate}"]["bias"] for gate in "rzn"]),
        np.concatenate([none, none, params["hn"]["bias"]]),
    )
    output, _ = layer(jnp.asarray(X, jnp.float32), Coordinates.range(T))
    carry = jnp.zeros((B, H))
    for t in range(T):
        carry, _ = theirs.apply({"params": params}, carry, jnp.asarray(X[:, t], jnp.float32))
        np.testing.assert_allclose(output[:, t], carry, atol=1e-5)


@pytest.mark.parametrize("cell", Cell)
def test_layers_without_biases_and_of_any_dtype(cell):
    plain = recurrent_from_torch(cell, *weights(cell)[:2], param_dtype=jnp.bfloat16)
    for path, leaf in nnx.to_flat_state(nnx.state(plain)):
        assert leaf.dtype == jnp.bfloat16
        assert np.any(leaf[...] != 0) == (path[-1] == "kernel")


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2 * H, D), r"weight_ih of GRU must be \[12, 5\], got \[8, 5\]"),
        (1, (4 * H, H), r"weight_hh of GRU must be \[12, 4\], got \[16, 4\]"),
        (2, (H,), r"bias_ih of GRU must be \[12\], got \[4\]"),
        (3, (1,), r"bias_hh of GRU must be \[12\], got \[1\]"),
        (1, (3 * H,), r"weight_hh of GRU must have 2 dims, got \[12\]"),
        (0, (), r"weight_ih of GRU must have 2 dims, got \[\]"),
    ],
)
def test_other_shapes_are_refused(index, shape, message):
    arrays = list(weights(Cell.GRU))
    arrays[index] = np.zeros(shape)
    with pytest.raises(ValueError, match=message):
        recurrent_from_torch(Cell.GRU, *arrays)


WHEEL = "g2p_en-2.1.0-py3-none-any.whl"
SHA256 = "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f"
NUM_WORDS, MOST_PHONEMES, PHONEME_START, PHONEME_END = 2000, 20, 2, 3


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The class of g2p_en 2.1.0 (Park and Kim 2019, Apache 2.0), from English spelling to phonemes; its own code."""
    folder = tmp_path_factory.mktemp("g2p_en")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        subprocess.run([*command, "--dest", folder, "g2p_en==2.1.0"], check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"g2p_en 2.1.0 cannot be downloaded: {error}")
    wheel = folder / WHEEL
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == SHA256
    zipfile.ZipFile(wheel).extractall(folder)
    # What finds words in a text and numbers is not needed for a word alone.
    absent = {name: mock.MagicMock() for name in ("nltk", "nltk.corpus", "nltk.tokenize", "inflect")}
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(sys.modules, absent), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in its source
        patch.syspath_prepend(folder)
        yield importlib.import_module("g2p_en.g2p").G2p()


def words(known: list[str]) -> list[str]:
    """Words that are known, with characters that the model does not know, and others coined of their halves."""
    random, found = np.random.default_rng(0), dict.fromkeys([*known, "", "x", "can't", "café"])
    while len(found) < NUM_WORDS:
        first, second = (known[index] for index in random.integers(len(known), size=2))
        found[first[: len(first) // 2 + 1] + second[len(second) // 2 :]] = None
    return list(found)


def translator(theirs) -> Seq2Seq:
    """Our model with its weights, over one vocabulary of its graphemes, then its phonemes."""
    graphemes, (vocab_size, dim), size = len(theirs.graphemes), theirs.dec_emb.shape, theirs.enc_w_hh.shape[1]
    config = Seq2SeqConfig(
        graphemes + vocab_size, dim, size, direction=Direction.FORWARD, attention=None, input_feeding=False
    )
    model = Seq2Seq(config, rngs=nnx.Rngs(0))
    # Ours multiplies vectors by the root of their size, here 16.
    model.embedding.table[...] = jnp.concatenate([theirs.enc_emb, theirs.dec_emb]) / dim**0.5
    model.encoder.layers[0][0], model.layers[0] = (
        recurrent_from_torch(Cell.GRU, *(getattr(theirs, f"{side}_{x}") for x in ("w_ih", "w_hh", "b_ih", "b_hh")))
        for side in ("enc", "dec")
    )
    model.output.kernel[...] = jnp.pad(theirs.fc_w.T, ((0, 0), (graphemes, 0)))
    model.output.bias[...] = jnp.pad(theirs.fc_b, (graphemes, 0), constant_values=-jnp.inf)  # no grapheme is written
    return model


@pytest.mark.slow
def test_a_published_gru_gives_by_greedy_search_what_its_package_gives(published):
    """Its biases inside the reset gate reach 0.27: without them 257 of the words become others."""
    chosen, first = words(sorted(published.homograph2features)), len(published.graphemes)
    assert len(set(chosen)) == NUM_WORDS
    spelt = [[published.g2idx.get(x, published.g2idx["<unk>"]) for x in [*word, "</s>"]] for word in chosen]
    source = np.zeros((NUM_WORDS, max(map(len, spelt))), np.int32)
    for row, letters in zip(source, spelt, strict=True):
        row[: len(letters)] = letters

    @jax.jit
    def said(model, source, lengths):
        memory = model.encode(source, Coordinates.from_lengths(lengths, source.shape[1]))
        start = jnp.full(NUM_WORDS, first + PHONEME_START, jnp.int32)
        limit = {"max_length": MOST_PHONEMES, "end_token": first + PHONEME_END}
        return generate(model.step, model.start(memory, MOST_PHONEMES), start, **limit)

    found = said(translator(published), jnp.asarray(source), jnp.array([len(letters) for letters in spelt]))
    assert not np.any(found.failed)
    rows = zip(*map(np.asarray, (found.tokens, found.length, found.ended)), strict=True)
    ours = [[published.phonemes[token - first] for token in tokens[: size - ended]] for tokens, size, ended in rows]
    assert dict(zip(chosen, ours, strict=True)) == {word: published.predict(word) for word in chosen}
