"""What splash attention is asked for, and what it refuses. No TPU is needed: its kernel is interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.attention import attend
from seqattn.coordinates import Coordinates
from seqattn.kernels import dispatch, splash
from seqattn.kernels.native import Native
from seqattn.masks import Causal, Dilated, NotPadding, SlidingWindow
from seqattn.score_mods import SoftCap
from tests import oracle
from tests.contract import Shape, arrays, close
from tests.vendor_calls import lengths, text


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(dispatch, "platform_of", lambda arrays: "tpu")


SPLASH = Shape(batch=(1,), T=128, S=256, N=4, K=2, H=64, V=64)


@pytest.mark.parametrize(
    ("mask", "start"),
    [(None, 0), (Causal(), 0), (Causal(), 100), (Causal() & SlidingWindow(40), 0), (SlidingWindow(9, ahead=30), 0)],
    ids=str,
)
def test_splash_computes_what_it_is_asked_for(mask, start):
    q_at, kv_at, x = text(SPLASH.T, start), text(SPLASH.S), arrays(SPLASH)
    native = Native.of(mask, q_at, kv_at)
    scaled = (jnp.asarray(x["query"] / np.float32(8)), jnp.asarray(x["key"]), jnp.asarray(x["value"]))
    output = splash.output_of(*scaled, native, interpret=True)
    pairs = True if mask is None else np.asarray(mask.dense(q_at, kv_at))
    close(output, oracle.attention(**x, visible=pairs).output)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", [None, Causal(), Causal() & SlidingWindow(40)], ids=str)
def test_splash_lowers_for_a_tpu_with_gradients(on_tpu, mask, dtype):
    def loss(query, key, value):
        located = {"mask": mask} if mask is None else {"mask": mask, "q_at": at[0], "kv_at": at[1]}
        return jnp.sum(attend(query, key, value, **located, implementation="splash").astype(jnp.float32))

    at = Coordinates.range(SPLASH.T), Coordinates.range(SPLASH.S)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays(SPLASH, dtype).values())
    assert "splash" in lowered.lower(lowering_platforms=("tpu",)).as_text()


def test_layers_of_one_shape_build_the_kernel_once(monkeypatch):
    built, real = [], splash._output
    monkeypatch.setattr(splash, "_output", lambda *arrays, **mask: built.append(mask) or real(*arrays, **mask))
    splash._traced_once.cache_clear()

    def layers(x):
        for _ in range(3):
            x = attend(x, x, x, mask=Causal(), q_at=at, kv_at=at, implementation=("splash", "chunked"))
        return x.sum()

    at, x = Coordinates.range(128), jnp.ones((1, 128, 1, 64))
    jax.jit(jax.grad(layers)).trace(x)
    splash._traced_once.cache_clear()
    # Alone, and with its derivative: jax 0.12 traces both at once.
    assert 1 <= len(built) <= 2


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((2, 128, 4, 64), {"bias": jnp.ones((128, 128))}, "no bias"),
        ((2, 128, 4, 64), {"dtype": jnp.float16}, "not float16"),
        ((2, 100, 4, 64), {}, r"T \(100\) and S \(100\) must be multiples of 128"),
        ((2, 128, 4, 64), {"mask": jnp.ones((128, 128), bool)}, "boolean array"),
        ((2, 128, 4, 64), {"mask": Dilated(2)}, "Dilated"),
        ((2, 128, 4, 64), {"score_mod": SoftCap(1.0)}, "SoftCap"),
        ((2, 128, 4, 64), {"mask": NotPadding(), "q_at": lengths([9], 128), "kv_at": text(128)}, "padding"),
    ],
    ids=str,
)
def test_what_splash_refuses(on_tpu, shape, options, reason):
    options = {name: jax.tree.map(lambda x: x[0], x) if "at" in name else x for name, x in options.items()}
    x = jnp.ones(shape, options.pop("dtype", jnp.float32))
    with pytest.raises(NotImplementedError, match=reason):
        attend(x, x, x, **options, implementation="splash")
