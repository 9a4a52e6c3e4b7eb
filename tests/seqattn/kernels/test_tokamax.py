"""What tokamax is asked for, and what it refuses. No device is needed, nor tokamax but where a test says so.

In most tests a function in JAX takes its place: tokamax needs Python 3.12, and its XLA computes the same.
"""

import dataclasses
import functools
import importlib.metadata
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.kernels import dispatch, tokamax
from seqattn.kernels.dispatch import IMPLEMENTATIONS, Implementation, call_of, explain
from seqattn.masks import Causal, Dilated, NotPadding, SlidingWindow
from seqattn.score_mods import Alibi, SoftCap
from tests import oracle
from tests.contract import Shape, arrays, close, cotangents, spoil
from tests.vendor_calls import lengths, text

CAP = 1.5

real_import = tokamax._tokamax


def stand_in(asked, query, key, value, *, implementation, scale, key_value_seq_lengths=None, **options):
    """Computes what `tokamax.dot_product_attention` documents for the arguments that it is given here."""
    asked.append(options | {"implementation": implementation, "scale": scale, "lengths": key_value_seq_lengths})
    length, size, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    behind = np.arange(length)[:, None] - np.arange(size)
    left, right = options.get("local_window_size", (length, size))
    seen = (behind <= left) & (behind >= -right) & ((behind >= 0) | (not options.get("is_causal", False)))
    seen = jnp.asarray(seen)[None, None]
    if key_value_seq_lengths is not None:
        seen = seen & (jnp.arange(size) < key_value_seq_lengths[:, None])[:, None, None]
    key, value = (jnp.repeat(x, group, axis=2).astype(jnp.float32) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), key) * scale
    if "logits_soft_cap" in options:
        scores = options["logits_soft_cap"] * jnp.tanh(scores / options["logits_soft_cap"])
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bnts,bsnv->btnv", weights, value).astype(query.dtype)


@pytest.fixture
def asked(monkeypatch):
    """Puts the stand-in in the place of tokamax; each call leaves its options here."""
    asked = []
    option = lambda value: jax.numpy_rank_promotion("raise")  # noqa: E731 -- some setting
    config = types.SimpleNamespace(cross_compile=option, ignore_autotuning_cache=option)
    library = types.SimpleNamespace(dot_product_attention=functools.partial(stand_in, asked), config=config)
    monkeypatch.setattr(tokamax, "_tokamax", lambda: library)
    monkeypatch.setattr(tokamax, "why_missing", lambda: None)
    tokamax._traced_once.cache_clear()
    yield asked
    tokamax._traced_once.cache_clear()


@pytest.fixture(params=["stand-in", "tokamax"])
def on_xla(request, monkeypatch):
    """Holds `attend` to what is around tokamax's kernels, with the stand-in or tokamax's XLA in their place."""
    if request.param == "stand-in":
        request.getfixturevalue("asked")
    elif reason := tokamax.why_missing():
        pytest.skip(reason)
    held = Implementation(functools.partial(tokamax.attend, on="xla"))
    monkeypatch.setitem(IMPLEMENTATIONS, "tokamax", held)


@pytest.fixture
def on_hopper(asked, monkeypatch):
    monkeypatch.setattr(dispatch, "platform_of", lambda arrays: "gpu")
    monkeypatch.setattr(tokamax, "_capability", lambda: "9.0")
    return asked


@pytest.fixture
def on_tpu(asked, monkeypatch):
    monkeypatch.setattr(dispatch, "platform_of", lambda arrays: "tpu")
    return asked


def of_row(options):
    return {name: jax.tree.map(lambda x: x[0], x) if "at" in name else x for name, x in options.items()}


def computed(inputs, directions, **options):
    """Output and log-sum-exp, and the gradients. The coordinates in `options` stay known: they are not traced."""

    @jax.jit
    def both(inputs):
        results, pull = jax.vjp(
            lambda inputs: attend(**inputs, **options, implementation="tokamax", return_lse=True), inputs
        )
        return results, pull(directions)[0]

    directions = jax.tree.map(jnp.asarray, directions)
    return jax.tree.map(np.asarray, both(inputs))


SHAPE = Shape(T=7, S=11, N=4, K=2, H=5, V=3)


@pytest.mark.parametrize(
    ("mask", "shape", "start"),
    [
        (Causal(), SHAPE, 0),
        (Causal(), SHAPE, 3),
        (Causal() & SlidingWindow(3), SHAPE, 2),
        (SlidingWindow(3, ahead=2), SHAPE, 1),
        # The last queries lie so far behind the last key that they see none.
        (Causal() & SlidingWindow(2), dataclasses.replace(SHAPE, T=11, S=7), 0),
    ],
    ids=str,
)
def test_values_and_gradients_are_the_oracles_and_hidden_garbage_leaves_no_trace(on_xla, mask, shape, start):
    q_at, kv_at = text(shape.T, start), text(shape.S)
    pairs = np.asarray(mask.dense(q_at, kv_at))[:, None]
    inputs, directions = arrays(shape), cotangents(shape)
    spoilt = inputs
    for key in np.flatnonzero(~pairs[0, 0].any(axis=0)):
        spoilt = spoil(spoilt, (0, key, 1), np.nan, "key", "value")
    located = of_row({"mask": mask, "q_at": q_at, "kv_at": kv_at})
    (output, lse), gradients = computed(spoilt, directions, **located)
    expected = oracle.attention(**inputs, visible=pairs)
    close(output, expected.output)
    close(lse, expected.lse)
    wanted = oracle.attention_gradients(**inputs, d_output=directions[0], d_lse=directions[1], visible=pairs)
    for name, gradient in gradients.items():
        close(gradient, wanted[name], what=name)


def test_padding_and_a_row_without_a_token(on_xla):
    shape = dataclasses.replace(SHAPE, batch=(3,), T=7, S=7)
    at = lengths([7, 4, 0], 7)
    mask = Causal() & NotPadding()
    pairs = np.asarray(mask.dense(at, at))[:, None]
    inputs, directions = arrays(shape), cotangents(shape)
    spoilt = spoil(spoil(inputs, (1, 5, 0), np.inf, "key"), (2, 3, 1), np.nan, "query", "value")
    (output, lse), gradients = computed(spoilt, directions, mask=mask, q_at=at, kv_at=at)
    close(output, oracle.attention(**inputs, visible=pairs).output)
    assert not output[2].any()
    assert (lse[1, 4:] == -np.inf).all()
    wanted = oracle.attention_gradients(**inputs, d_output=directions[0], d_lse=directions[1], visible=pairs)
    for name, gradient in gradients.items():
        close(gradient, wanted[name], what=name)


def test_a_visible_nan_spoils_the_rows_that_see_it(on_xla):
    shape = dataclasses.replace(SHAPE, S=7)
    inputs = arrays(shape)
    output = computed(spoil(inputs, (1, 4, 0), np.nan, "key"), cotangents(shape), mask=Causal())[0][0]
    seen = np.zeros(output.shape[:3], bool)
    seen[1, 4:, :2] = True
    assert np.isnan(output[seen]).all()
    close(output[~seen], oracle.attention(**inputs, visible=np.tri(7, dtype=bool)).output[~seen])


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_soft_cap_and_a_traced_scale(on_xla, scale):
    shape = dataclasses.replace(SHAPE, S=7)
    inputs, directions = arrays(shape) | {"scale": np.float32(scale)}, cotangents(shape)
    options = {"mask": Causal(), "score_mod": SoftCap(CAP)}
    (output, lse), gradients = computed(inputs, directions, **options)
    told = {"visible": np.tri(7, dtype=bool), "cap": CAP}
    close(output, oracle.attention(**inputs, **told).output)
    close(lse, oracle.attention(**inputs, **told).lse)
    wanted = oracle.attention_gradients(**inputs, d_output=directions[0], d_lse=directions[1], **told)
    for name, gradient in gradients.items():
        close(gradient, wanted[name], what=name)


def test_chunked_computes_the_gradients_where_tokamax_has_none(asked, monkeypatch):
    @jax.custom_vjp
    def output_alone(*arrays):
        return real(*arrays)

    def refuse(*anything):
        raise NotImplementedError("no backward pass")

    output_alone.defvjp(lambda *arrays: (real(*arrays), ()), refuse)
    real = functools.partial(stand_in, asked, implementation="xla", scale=1.0, is_causal=True, logits_soft_cap=CAP)
    library = types.SimpleNamespace(dot_product_attention=lambda *arrays, **options: output_alone(*arrays))
    monkeypatch.setattr(tokamax, "_tokamax", lambda: library)
    monkeypatch.setattr(tokamax, "_capability", lambda: "8.0")
    held = Implementation(functools.partial(tokamax.attend, on="xla"))
    monkeypatch.setitem(IMPLEMENTATIONS, "tokamax", held)
    shape = dataclasses.replace(SHAPE, S=7)
    inputs, directions = arrays(shape) | {"scale": np.float32(0.3)}, cotangents(shape)
    _, gradients = computed(inputs, directions, mask=Causal(), score_mod=SoftCap(CAP))
    told = {"visible": np.tri(7, dtype=bool), "cap": CAP}
    wanted = oracle.attention_gradients(**inputs, d_output=directions[0], d_lse=directions[1], **told)
    for name, gradient in gradients.items():
        close(gradient, wanted[name], what=name)


def by_text(value):
    """A short name for a test: the words among its parameters."""
    return value if isinstance(value, str) else "-".join(value)


BF16 = jnp.ones((2, 128, 4, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"mask": Causal()}, {"is_causal": True}),
        # With a window tokamax gets the lengths as well, or it splits the keys and refuses its own split.
        ({"mask": Causal() & SlidingWindow(3)}, {"local_window_size": (2, 0), "lengths": [128, 128]}),
        ({"mask": SlidingWindow(3, ahead=1)}, {"local_window_size": (2, 1), "lengths": [128, 128]}),
        (
            {"mask": Causal() & NotPadding(), "q_at": lengths([128, 0], 128), "kv_at": lengths([128, 0], 128)},
            {"is_causal": True, "lengths": [128, 1]},
        ),
        ({"score_mod": SoftCap(30.0)}, {"logits_soft_cap": 30.0}),
        # And for causal keys after the last query: without lengths its backward pass steps backwards.
        (
            {"mask": Causal(), "q_at": Coordinates.range(128), "kv_at": Coordinates.range(256)},
            {"is_causal": True, "lengths": [256, 256]},
        ),
    ],
    ids=["full", "causal", "window", "window-ahead", "padding", "cap", "more-keys"],
)
def test_a_gpu_is_asked_by_the_name_of_its_kernel(on_hopper, options, expected):

    def loss(x):
        keys = jnp.concatenate([x] * (options["kv_at"].shape[-1] // 128 if "kv_at" in options else 1), axis=1)
        return attend(x, keys, keys, **options, implementation="tokamax").astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss)).trace(BF16)
    (given,) = on_hopper[:1]
    assert given["implementation"] == "mosaic_gpu"
    assert given["scale"] == 1
    if "lengths" in expected:
        # The lengths reach the kernel as an operand: the program holds them as a constant.
        assert expected["lengths"] in [np.asarray(x).tolist() for x in program.jaxpr.consts]
    rest = {name: x for name, x in given.items() if name not in ("implementation", "scale", "lengths")}
    assert rest == {name: x for name, x in expected.items() if name != "lengths"}
    assert (given["lengths"] is not None) == ("lengths" in expected)


def test_a_tpu_is_asked_by_the_name_of_its_kernel(on_tpu):
    x = jnp.ones((2, 128, 4, 64))
    jax.jit(lambda x: attend(x, x, x, mask=Causal(), implementation="tokamax")).trace(x)
    assert on_tpu == [{"implementation": "mosaic_tpu", "scale": 1.0, "is_causal": True, "lengths": None}]


def test_a_branch_for_several_platforms_names_the_kernel_of_each(asked, monkeypatch):
    monkeypatch.setattr(tokamax, "_capability", lambda: "9.0")
    call = dataclasses.replace(call_of(BF16, BF16, BF16, mask=Causal()), platform=None)
    assert jax.eval_shape(lambda: tokamax.attend(call))[0].shape == BF16.shape
    assert {each["implementation"] for each in asked} == {"mosaic_gpu", "mosaic_tpu"}


AT = {"q_at": lengths([9, 128], 128), "kv_at": lengths([128, 128], 128)}
REFUSED = [
    ({"bias": jnp.ones((128, 128))}, "is given no bias"),
    ({"mask": jnp.ones((128, 128), bool)}, "boolean array"),
    ({"mask": Dilated(2)}, "Dilated is no causal mask"),
    ({"score_mod": Alibi()}, r"no score modification \(Alibi\)"),
    ({"dropout": Dropout(0.5, jax.random.key(0))}, "no dropout"),
    ({"shape": (2, 100, 4, 64)}, r"T \(100\) and S \(100\) must be multiples of 128"),
]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *REFUSED,
        ({"dtype": jnp.float32}, "takes float16 and bfloat16 on a gpu, not float32"),
        ({"shape": (2, 128, 4, 264)}, r"H and V \(264\) must be at most 256 on compute capability 9.0"),
        ({"capability": "10.0", "shape": (2, 128, 4, 256)}, r"\(256\) must be at most 192 on compute capability 10.0"),
        ({"capability": "12.0"}, "compute capability 8, 9, 10, and this GPU has 12.0"),
        ({"capability": None}, "and here is none"),
        ({"capability": "8.6", "version": (0, 11, 2)}, "needs a JAX newer than 0.11.2"),
    ],
    ids=by_text,
)
def test_what_a_gpu_refuses(on_hopper, monkeypatch, options, reason):
    options = dict(options)
    if "capability" in options:
        capability = options.pop("capability")
        monkeypatch.setattr(tokamax, "_capability", lambda: capability)
    monkeypatch.setattr(jax, "__version_info__", options.pop("version", (0, 12, 0)))
    refused(options, jnp.bfloat16, reason)
    assert not on_hopper


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *REFUSED,
        ({"dtype": jnp.float16}, "takes float32 and bfloat16 on a tpu, not float16"),
        ({"mask": Causal() & SlidingWindow(3)}, "takes no window on a tpu"),
        ({"mask": NotPadding(), **AT}, "takes no padding lengths on a tpu"),
        ({}, "without a mask the kind of TPU must be known"),
    ],
    ids=by_text,
)
def test_what_a_tpu_refuses(on_tpu, options, reason):
    refused(dict(options), jnp.float32, reason)
    assert not on_tpu


def refused(options, dtype, reason):
    x = jnp.ones(options.pop("shape", (2, 128, 4, 64)), options.pop("dtype", dtype))
    with pytest.raises(NotImplementedError, match=reason):
        attend(x, x, x, **options, implementation="tokamax")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "tokamax is not installed: the extra `tokamax` does so on Python 3.12 and newer"),
        ("0.0.12", r"tokamax 0\.0\.17 or newer is needed, .* and this is 0\.0\.12"),
        ("0.0.17", None),
        ("0.0.18rc1", None),
        ("0.1.dev5", None),
    ],
)
def test_a_missing_or_old_tokamax_is_named(monkeypatch, version, reason):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    told = tokamax.why_missing.__wrapped__()
    assert told is None if reason is None else re.fullmatch(reason, told)


def test_a_tokamax_that_cannot_be_imported_is_a_refusal(on_tpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    monkeypatch.setattr(tokamax, "_tokamax", real_import)
    with pytest.raises(NotImplementedError, match="tokamax cannot be imported: import of tokamax halted"):
        jax.jit(lambda x: attend(x, x, x, mask=Causal(), implementation="tokamax")).trace(BF16)


def test_the_library_does_not_import_tokamax():
    program = "import sys; sys.modules['tokamax'] = None; import seqattn"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_cpu_refuses_and_the_gradients_of_an_ampere_are_noted(asked, monkeypatch):
    x = jax.ShapeDtypeStruct(BF16.shape, BF16.dtype)
    told = explain(x, x, x, mask=Causal()).refusals["tokamax"]
    assert told == "tokamax runs on a gpu or a tpu, and this is a cpu"
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    for capability, by_chunked in (("8.0", True), ("9.0", False)):
        monkeypatch.setattr(tokamax, "_capability", lambda capability=capability: capability)
        told = explain(x, x, x, mask=Causal(), implementation="tokamax", platform="gpu")
        assert told.chosen == "tokamax"
        assert ("chunked computes the gradients" in told.notes["tokamax"]) == by_chunked


@pytest.fixture
def installed():
    if reason := tokamax.why_missing():
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokamax_lowers_for_a_tpu_with_gradients(installed, dtype):
    def loss(query, key, value):
        output = attend(
            query, key, value, mask=Causal(), q_at=at[0], kv_at=at[1], implementation=("tokamax", "chunked")
        )
        return jnp.sum(output.astype(jnp.float32))

    shape = Shape(batch=(1,), T=128, S=256, N=4, K=2, H=64, V=32)
    at = Coordinates.range(shape.T), Coordinates.range(shape.S)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays(shape, dtype).values())
    told = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert told.count("@tpu_custom_call") == 2
    assert "splash" in told


@pytest.mark.slow  # Pallas interprets the kernel
@pytest.mark.parametrize(("mask", "cap"), [(Causal(), None), (None, CAP)], ids=str)
def test_the_kernel_for_tpus_computes_what_it_is_asked_for(installed, monkeypatch, mask, cap):
    shape = Shape(batch=(1,), T=128, S=256, N=2, K=1, H=16, V=8)
    at = {} if mask is None else {"q_at": Coordinates.range(shape.T), "kv_at": Coordinates.range(shape.S)}
    inputs, mod = arrays(shape), None if cap is None else SoftCap(cap)
    call = call_of(**{name: jnp.asarray(x) for name, x in inputs.items()}, mask=mask, score_mod=mod, **at)
    with pltpu.force_tpu_interpret_mode():
        output, _ = jax.jit(lambda: tokamax.attend(call, on="mosaic_tpu"))()
    pairs = True if mask is None else np.asarray(mask.dense(text(shape.T), text(shape.S)))
    close(output, oracle.attention(**inputs, visible=pairs, cap=np.inf if cap is None else cap).output)
