"""A program that was saved and read again gives the model's logits, or is refused."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.interop import to_arrays
from seqattn.models import Encoder
from tests.forward_programs import PROGRAMS, deserialize, logits, shapes
from tests.parameters import drawn
from train.hub import exported, stablehlo
from train.hub.exported import FORWARD, SUMS

LENGTHS = {"source_length": [5, 2], "target_length": [3, 4]}


def save(folder, program):
    folder.mkdir()
    (folder / FORWARD).write_bytes(bytes(program.serialize()))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    sign(folder)
    return folder / FORWARD


def sign(folder):
    lines = (f"{exported._digest(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != SUMS)
    (folder / SUMS).write_text("".join(lines))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_was_reloaded_gives_the_models_logits(name, unchecked, tmp_path):
    kind, config, objective = PROGRAMS[name]
    model = drawn(lambda: kind(config, rngs=nnx.Rngs(0)))
    program = stablehlo.forward(model, objective, shape=(2, 6), image=(4, 9), platforms=("cpu",))
    again = deserialize(save(tmp_path / "folder", program))
    random, given = np.random.default_rng(3), {}
    for argument, shape in shapes(program).items():
        size = [x if isinstance(x, int) else (2, 6)[axis] for axis, x in enumerate(shape.shape)]
        drawn_ids = random.integers(3, 11, size) if shape.dtype == jnp.int32 else random.normal(size=size)
        given[argument] = jnp.asarray(LENGTHS.get(argument, drawn_ids), shape.dtype)
    np.testing.assert_allclose(again.call(to_arrays(model), given), jax.jit(logits)(model, given), atol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_for_any_number_of_rows_and_tokens(name, unchecked):
    kind, config, objective = PROGRAMS[name]
    model = drawn(lambda: kind(config, rngs=nnx.Rngs(0)))
    program = stablehlo.forward(model, objective, image=(4, 9), platforms=("cpu",))
    for argument, shape in shapes(program).items():
        sizes = shape.shape[:1] if argument == "image" else shape.shape
        assert not any(isinstance(size, int) for size in sizes), (argument, shape)


def test_d22_a_truncated_program_is_refused(tmp_path):
    content = bytes(1000)
    path = save(tmp_path / "folder", SimpleNamespace(serialize=lambda: content))
    for length in (0, 3, 999):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"forward\.stablehlo is damaged or was changed"):
            exported.check_digests(path.parent)


def test_d22_a_program_for_another_platform_is_refused(tmp_path):
    model = drawn(lambda: Encoder(PROGRAMS["classifier"][1], rngs=nnx.Rngs(0)))
    path = save(tmp_path / "folder", stablehlo.forward(model, "Classification", platforms=("cuda", "tpu")))
    given = {"source": jnp.ones((2, 3), jnp.int32), "source_length": jnp.array([3, 3])}
    with pytest.raises(ValueError, match=r"exported for platforms .*cuda.*tpu.* used on .*cpu"):
        deserialize(path).call(to_arrays(model), given)
