"""MarianMT's parameters as ours and back: the network written down in NumPy, and Hugging Face's own where installed.

transformers and PyTorch are no part of the `test` extra. With them, all of this file, some minutes:

    .venv/bin/pip install -e .[test,bench]
    .venv/bin/python -m pytest -m "slow or not slow" tests/seqattn/interop/test_marian.py
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.bench.marian import END, RandomMarian, Sizes, marian_mt
from seqattn.coordinates import Coordinates
from seqattn.decoding import AverageLength, Stopping, beam_search, generate
from seqattn.interop.huggingface import from_huggingface, huggingface_config, to_huggingface
from seqattn.models.position_encodings import Sinusoidal
from seqattn.models.transformer import Transformer, TransformerConfig
from seqattn.nn.blocks import BlockConfig
from tests.parameters import drawn

CONFIG = {
    "model_type": "marian",
    "vocab_size": 13,
    "d_model": 14,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 11,
    "decoder_ffn_dim": 11,
    "activation_function": "swish",
    "scale_embedding": True,
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
SOURCE = np.array([[3, 9, 1, 12, 5], [7, 2, 4, 0, 0], [8, 0, 0, 0, 0]])
LENGTHS = np.array([5, 3, 1])
TARGET = np.array([[12, 4, 4, 6, 1, 9, 2], [12, 7, 3, 3, 1, 1, 5], [12, 2, 10, 6, 6, 8, 11]])


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    """Random parameters by Marian's names."""
    random, wide, hidden = np.random.default_rng(5), CONFIG["d_model"], CONFIG["encoder_ffn_dim"]
    shapes = {"model.shared.weight": (CONFIG["vocab_size"], wide), "final_logits_bias": (1, CONFIG["vocab_size"])}
    for block in ("encoder.layers.0", "encoder.layers.1", "decoder.layers.0"):
        attentions = ["self_attn", "encoder_attn"] if block.startswith("decoder") else ["self_attn"]
        linears = {f"{name}.{part}": (wide, wide) for name in attentions for part in PROJECTIONS}
        linears |= {"fc1": (hidden, wide), "fc2": (wide, hidden)}
        shapes |= {f"model.{block}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"model.{block}.{name}.bias": shape[:1] for name, shape in linears.items()}
        for name in [*(f"{name}_layer_norm" for name in attentions), "final_layer_norm"]:
            shapes |= {f"model.{block}.{name}.{part}": (wide,) for part in ("weight", "bias")}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def arrays_of(model) -> dict[str, np.ndarray]:
    """The parameters of a model by Marian's names."""
    return to_huggingface(model, "marian")[1]


class Oracle:
    """MarianMT of one sentence in float64, as the paper (Vaswani 2017) and transformers' modeling_marian.py say it."""

    def __init__(self, config, parameters):
        self.config, self.parameters = config, {name: x.astype(np.float64) for name, x in parameters.items()}

    def logits(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        memory = self.embed(source)
        for layer in range(self.config["encoder_layers"]):
            name = f"model.encoder.layers.{layer}"
            memory = self.feed_forward(name, self.attend(f"{name}.self_attn", memory, memory))
        x = self.embed(target)
        for layer in range(self.config["decoder_layers"]):
            name = f"model.decoder.layers.{layer}"
            x = self.attend(f"{name}.self_attn", x, x, causal=True)
            x = self.feed_forward(name, self.attend(f"{name}.encoder_attn", x, memory))
        return x @ self.parameters["model.shared.weight"].T + self.parameters["final_logits_bias"]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        dim = self.config["d_model"]
        angles = np.arange(len(tokens))[:, None] / 10000 ** (np.arange(0, dim, 2) / dim)
        positions = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        return self.parameters["model.shared.weight"][tokens] * dim**0.5 + positions

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return scaled * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]

    def attend(self, name: str, x: np.ndarray, memory: np.ndarray, causal: bool = False) -> np.ndarray:
        heads = self.config["encoder_attention_heads"]
        query, key, value = (
            self.linear(f"{name}.{part}", of).reshape(len(of), heads, -1).swapaxes(0, 1)
            for part, of in zip(PROJECTIONS, (x, memory, memory), strict=False)
        )
        scores = query @ key.swapaxes(1, 2) / query.shape[-1] ** 0.5
        if causal:
            scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        seen = (weights / weights.sum(axis=-1, keepdims=True) @ value).swapaxes(0, 1).reshape(x.shape)
        return self.norm(f"{name}_layer_norm", x + self.linear(f"{name}.out_proj", seen))

    def feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        hidden = self.linear(f"{name}.fc1", x)
        act = {"swish": lambda x: x / (1 + np.exp(-x)), "relu": lambda x: np.maximum(x, 0)}
        hidden = act[self.config["activation_function"]](hidden)
        return self.norm(f"{name}.final_layer_norm", x + self.linear(f"{name}.fc2", hidden))


@nnx.jit
def decoded(model, source, lengths, target):
    memory = model.encode(source, Coordinates.from_lengths(lengths, source.shape[1]))
    return model.decode(
        target, Coordinates.from_lengths(jnp.full(len(target), target.shape[1]), target.shape[1]), memory
    )


@pytest.mark.parametrize("activation", ["swish", "relu"])
def test_the_network_is_marians(activation):
    config = CONFIG | {"activation_function": activation}
    found = decoded(from_huggingface(config, arrays()), SOURCE, LENGTHS, TARGET)
    oracle = Oracle(config, arrays())
    expected = [oracle.logits(s[:length], t) for s, length, t in zip(SOURCE, LENGTHS, TARGET, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_there_and_back_is_exact():
    back = arrays_of(from_huggingface(CONFIG, arrays()))
    assert back.keys() == arrays().keys()
    for name, x in arrays().items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_back_and_there_is_exact():
    model = drawn(lambda: Transformer(huggingface_config(CONFIG), rngs=nnx.Rngs(0)))
    again = from_huggingface(CONFIG, arrays_of(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(again))


def test_second_names_of_one_table_are_passed_over():
    table = arrays()["model.shared.weight"]
    doubled = arrays() | {f"model.{side}.embed_positions.weight": np.zeros((3, 14)) for side in ("encoder", "decoder")}
    doubled |= {"lm_head.weight": table, "model.encoder.embed_tokens.weight": table}
    model = from_huggingface(CONFIG, doubled)
    np.testing.assert_array_equal(arrays_of(model)["model.shared.weight"], table)


def test_second_names_of_another_table_are_refused():
    other = arrays() | {"lm_head.weight": np.zeros((13, 14))}
    with pytest.raises(ValueError, match=r"lm_head\.weight must equal model\.shared\.weight"):
        from_huggingface(CONFIG, other)


def test_what_a_config_leaves_out_is_what_transformers_means():
    config = huggingface_config({"model_type": "marian", "scale_embedding": True, "activation_function": "swish"})
    block = config.block
    assert (config.vocab_size, config.num_encoder_layers, config.num_decoder_layers) == (58101, 12, 12)
    assert (block.model_dim, block.hidden_dim, block.num_heads, block.dropout_rate) == (1024, 4096, 16, 0.1)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"activation_function": "mish"}, "marian: activation_function must be one of .*, got 'mish'"),
        ({"activation_function": ["relu"]}, "activation_function must be one of .*, got a list"),
        ({"static_position_embeddings": False}, "static_position_embeddings"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"decoder_vocab_size": 7}, r"decoder_vocab_size \(7\) must be vocab_size \(13\)"),
        ({"rotary": 2}, r"marian: rotary \(2\) is unknown"),
    ],
)
def test_a_choice_that_our_model_lacks_is_refused(choice, message):
    with pytest.raises(NotImplementedError, match=message):
        from_huggingface(CONFIG | choice, arrays())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"d_model": 15}, r"d_model \(15\) must be even"),
        ({"d_model": 0}, r"d_model \(0\) must be an integer of at least 1"),
        ({"d_model": "14"}, r"d_model \('14'\) must be an integer"),
        ({"d_model": 14.0}, r"d_model \(14.0\) must be an integer"),
        ({"encoder_attention_heads": 3}, r"d_model \(14\) must be a multiple of encoder_attention_heads \(3\)"),
        ({"encoder_attention_heads": 0}, r"encoder_attention_heads \(0\) must be"),
        ({"encoder_attention_heads": -2}, r"encoder_attention_heads \(-2\) must be"),
        ({"encoder_ffn_dim": 0}, r"encoder_ffn_dim \(0\) must be"),
        ({"vocab_size": None}, r"vocab_size \(None\) must be"),
        ({"encoder_layers": -1}, r"encoder_layers \(-1\) must be an integer of at least 0"),
        ({"decoder_layers": 0}, r"decoder_layers \(0\) must be an integer of at least 1"),
        ({"decoder_layers": 1.5}, r"decoder_layers \(1.5\) must be"),
        ({"dropout": 1}, r"dropout \(1\) must be in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"attention_dropout \(-0.1\) must be in"),
        ({"activation_dropout": float("nan")}, r"activation_dropout \(nan\) must be in"),
        ({"activation_dropout": None}, r"activation_dropout \(None\) must be in"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("as_users_call_it")
def test_an_odd_d_model_and_other_numbers_that_make_no_model_are_refused_by_name(numbers, message):
    others = {name.replace("encoder", "decoder"): x for name, x in numbers.items() if "heads" in name or "ffn" in name}
    with pytest.raises(ValueError, match=message):
        huggingface_config(CONFIG | numbers | others)


def test_a_model_without_encoder_layers_is_one():
    assert huggingface_config(CONFIG | {"encoder_layers": 0}).num_encoder_layers == 0


def test_missing_and_unknown_parameters_are_named():
    others = dict(arrays())
    others["model.encoder.layers.2.fc1.bias"] = others.pop("model.encoder.layers.1.fc1.bias")
    with pytest.raises(ValueError, match=r"missing '.*1.fc1.bias'; unknown '.*2.fc1.bias'"):
        from_huggingface(CONFIG, others)


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("name", ["model.shared.weight", "model.decoder.layers.0.fc1.weight", "final_logits_bias"])
def test_parameters_of_another_shape_are_refused(name, by):
    x = arrays()[name]
    wrong = np.zeros((*x.shape[:-1], x.shape[-1] + by), np.float32)
    with pytest.raises(ValueError, match=rf"{name} must have the shape \[{x.shape[0]}, {x.shape[1]}\], got"):
        from_huggingface(CONFIG, arrays() | {name: wrong})


@pytest.mark.parametrize(("bias", "logits_bias"), [(False, True), (True, False)])
def test_a_model_of_another_kind_has_no_marian_names(bias, logits_bias):
    block = BlockConfig(model_dim=14, hidden_dim=11, num_heads=2, attention_bias=bias)
    config = TransformerConfig(13, 2, 1, block, Sinusoidal(), logits_bias=logits_bias)
    with pytest.raises(ValueError, match="marian has no such Transformer: "):
        arrays_of(drawn(lambda: Transformer(config, rngs=nnx.Rngs(0))))


# From here on beside Hugging Face.

VOCABULARY, PAD, MAX_LENGTH = 61, 60, 17
END_BIAS = 5.0
STOPPING = {True: Stopping.FIRST, False: Stopping.LIKELY, "never": Stopping.EXACT}
POWERS = (0.6, 1.0, 2.0)


@functools.cache
def random_model() -> RandomMarian:
    """Weights of the decoding benchmark, with which tokens seldom repeat; but here sequences end, at many lengths."""
    sizes = Sizes(num_layers=2, model_dim=32, hidden_dim=29, num_heads=2, vocab_size=VOCABULARY)
    model = RandomMarian(sizes, Path())
    model.arrays["final_logits_bias"][0, END] = END_BIAS
    return model


@pytest.fixture(scope="module")
def peer():
    """Hugging Face's MarianMT."""
    pytest.importorskip("torch", reason="PyTorch is not installed: see above how to run this")
    pytest.importorskip("transformers", reason="transformers is not installed: see above how to run this")
    return marian_mt(random_model().config, random_model().arrays)


@pytest.fixture(scope="module")
def ours(peer):
    """Ours, from what Hugging Face's own model says that it consists of."""
    return from_huggingface(peer.config.to_dict(), {name: x.numpy() for name, x in peer.state_dict().items()})


@functools.cache
def sources() -> tuple[np.ndarray, np.ndarray]:
    """50 sources of 1 to 13 tokens, and how long they are."""
    random = np.random.default_rng(2)
    lengths = random.integers(1, 14, 50)
    tokens = random.integers(1, PAD, (50, 13))
    return np.where(np.arange(13) < lengths[:, None], tokens, PAD), lengths


def in_torch() -> dict:
    import torch

    source, lengths = sources()
    mask = np.arange(source.shape[1]) < lengths[:, None]
    return {"input_ids": torch.from_numpy(source), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def test_logits_are_hugging_faces(peer, ours):
    import torch

    target = np.random.default_rng(3).integers(0, PAD, (50, 11))
    with torch.no_grad():
        expected = peer(**in_torch(), decoder_input_ids=torch.from_numpy(target)).logits.numpy()
    np.testing.assert_allclose(decoded(ours, *sources(), target), expected, atol=1e-4)
    parameters = peer.state_dict()
    assert all(np.array_equal(x, parameters[name].numpy()) for name, x in arrays_of(ours).items())


def by_hugging_face(peer, **choices) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[50, L]` without the first one, and scores where there are beams."""
    found = peer.generate(
        **in_torch(),
        max_new_tokens=MAX_LENGTH,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **choices,
    )
    tokens = found.sequences.numpy()[:, 1:]
    padded = np.pad(tokens, ((0, 0), (0, MAX_LENGTH - tokens.shape[1])), constant_values=PAD)
    return padded, found.sequences_scores.numpy() if choices["num_beams"] > 1 else np.array([])


def _start(model, source, lengths):
    memory = model.encode(source, Coordinates.from_lengths(lengths, source.shape[1]))
    return model.start(memory, MAX_LENGTH), jnp.full(len(source), PAD)


@nnx.jit
def greedily(model, source, lengths):
    state, first = _start(model, source, lengths)
    return generate(model.step, state, first, max_length=MAX_LENGTH, end_token=END, pad_token=PAD)


@functools.partial(nnx.jit, static_argnames=("beam_size", "stopping"))
def by_beam(model, source, lengths, power, beam_size, stopping):
    state, first = _start(model, source, lengths)
    limits = {"max_length": MAX_LENGTH, "end_token": END, "pad_token": PAD}
    choices = {"length_penalty": AverageLength(power), "stopping": stopping}
    return beam_search(model.step, state, first, beam_size=beam_size, **limits, **choices)


def test_greedy_is_hugging_faces(peer, ours):
    expected, _ = by_hugging_face(peer, num_beams=1)
    found = greedily(ours, *sources())
    np.testing.assert_array_equal(found.tokens, expected)
    np.testing.assert_array_equal(by_beam(ours, *sources(), 1.0, 1, Stopping.EXACT).tokens[:, 0], expected)
    assert len(set(found.length.tolist())) > 5, "the sequences should end at many lengths"
    assert 0 < found.ended.sum() < 50, "some should be cut"


@pytest.mark.slow
@pytest.mark.parametrize(("beam_size", "early"), [(size, early) for size in (4, 5) for early in STOPPING])
def test_beams_are_hugging_faces(beam_size, early, peer, ours):
    lengths = []
    for power in POWERS:
        expected, scores = by_hugging_face(peer, num_beams=beam_size, length_penalty=power, early_stopping=early)
        found = by_beam(ours, *sources(), power, beam_size, STOPPING[early])
        np.testing.assert_array_equal(found.tokens[:, 0], expected, err_msg=f"length_penalty {power}")
        np.testing.assert_allclose(found.score[:, 0], scores, rtol=1e-4, atol=1e-5)
        lengths.append(found.length.sum())
    assert len(set(map(int, lengths))) == len(POWERS), "the penalties should matter"
