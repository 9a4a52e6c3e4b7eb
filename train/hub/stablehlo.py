"""Export of a model's logits under teacher forcing as a StableHLO program, which runs without seqattn."""

import contextlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from seqattn import Coordinates
from seqattn.interop import from_arrays, to_arrays
from seqattn.nn import with_implementation
from train.hub.exported import FORWARD
from train.objectives import named

PLATFORMS = ("cpu", "cuda", "tpu")
"""The platforms of a forward program."""


def forward(
    model: Any,
    objective: str,
    *,
    shape: tuple[int, int] = (8, 64),
    image: tuple[int, int] | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> export.Exported:
    """Exports the logits of a model under teacher forcing as one program for several platforms.

    The arguments of the program are the parameters, by the names of `to_arrays`, and a dict with the inputs of the
    objective, among `source` and `target` (ids, int32 `[B, T]`), `source_length` and `target_length` (int32 `[B]`), and
    `image` (float32 `[B, height, width]`). It returns logits `[B, T, V]`; for labels of texts `[B, labels]`. B and T
    are symbolic if the model can be exported that way; else T is fixed, and if necessary B, too.

    Args:
        model: the model.
        objective: the objective of the model, by the name of a class of `train.objectives`.
        shape: B and T for models that need fixed sizes.
        image: height and width of the images of a captioner.
        platforms: the platforms that the program supports.
    """
    parameters = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in to_arrays(model).items()}
    any_batch, *any_lengths = export.symbolic_shape("batch, source_tokens, target_tokens")
    compiled = export.export(jax.jit(_logits(model.config)), platforms=platforms)
    for sizes in ((any_batch, *any_lengths), (any_batch, shape[1], shape[1])):
        # JAX raises one of these if the model needs the actual number of a symbolic dimension.
        with contextlib.suppress(TypeError, jax.errors.InconclusiveDimensionOperation):
            return compiled(parameters, _shapes(objective, sizes, image))
    return compiled(parameters, _shapes(objective, (*shape, shape[1]), image))


def _shapes(objective: str, sizes: tuple[Any, ...], image: tuple[int, int] | None) -> dict[str, jax.ShapeDtypeStruct]:
    batch, *lengths = sizes
    given = named(objective).given
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for side, length in zip(("source", "target"), lengths, strict=True):
        if side in given:
            shapes[side] = jax.ShapeDtypeStruct((batch, length), jnp.int32)
            shapes[f"{side}_length"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if "image" in given:
        assert image is not None, "a captioner's forward program has images of one size"
        shapes["image"] = jax.ShapeDtypeStruct((batch, *image), jnp.float32)
    return shapes


def _logits(config: Any) -> Any:
    def compute(parameters: dict[str, jax.Array], given: dict[str, jax.Array]) -> jax.Array:
        # `reference` works with symbolic lengths and on all platforms. Other kernels need lengths to choose tiles, or
        # run on one platform only.
        model = with_implementation(from_arrays(config, parameters), "reference")

        def at(side: str) -> Coordinates:
            return Coordinates.from_lengths(given[f"{side}_length"], given[side].shape[1])

        if "target" not in given:
            return model(given["source"], at("source"))
        if "image" in given:
            rows, columns = model.grid(*given["image"].shape[1:])
            places = jnp.full(given["image"].shape[:1], rows * columns)
            memory = model.encode(given["image"], Coordinates.from_lengths(places, rows * columns))
        elif "source" in given:
            memory = model.encode(given["source"], at("source"))
        else:
            nothing = jnp.zeros((given["target"].shape[0], 0), jnp.int32)
            memory = model.encode(nothing, Coordinates(nothing, nothing))
        return model.decode(given["target"], at("target"), memory)

    return compute


def check_flatbuffers() -> None:
    """Raises ValueError if the package flatbuffers is not installed, which JAX needs to serialize programs."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError(f"{FORWARD} needs the package flatbuffers: pip install flatbuffers")
