"""One step of decoding with a cache: one token for each row."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compile.pipelines import moved_by_kernels
from benchmarks.compile.program import Built, Program
from benchmarks.compile.work import of_function
from seqattn import Coordinates
from seqattn.interop import model_type
from seqattn.models import LanguageModelConfig, TransformerConfig
from seqattn.models.position_encodings import Rotary
from seqattn.nn import BlockConfig, KeyColumns

_ROWS, _SOURCE, _ROOM = 32, 256, 4096
_FILLED = 100
"""The tokens that each row has read, to count the bytes that kernels for TPUs read of a cache."""
_MODELS: dict[str, TransformerConfig | LanguageModelConfig] = {
    "base": TransformerConfig.base(37_000),
    "decoder": LanguageModelConfig(50_257, 12, BlockConfig(768, 3072, 12, norm_first=True), Rotary()),
}


def decoding_programs() -> list[Program]:
    """Makes a step of each model. Attention to its caches and to its memory is `cached`, on a TPU `tpu_cached`."""
    return [
        Program(
            f"decode/{name}/t{_ROOM}",
            (1,),
            functools.partial(_step, config),
            {"rows": _ROWS, "source_length": _SOURCE, "max_length": _ROOM, "filled": _FILLED, "dtype": "bfloat16"},
        )
        for name, config in _MODELS.items()
    ]


def _step(config: TransformerConfig | LanguageModelConfig, devices: Sequence[Any], platform: str) -> Built:
    here = NamedSharding(Mesh(np.array(devices), ("device",)), P())
    kind: Any = model_type(config)
    model = nnx.eval_shape(lambda: kind(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0)))
    graph, params = nnx.split(model)

    def begin(params: Any, source: Any) -> Any:
        model = nnx.merge(graph, params)
        memory = model.encode(source, Coordinates.from_lengths(jnp.full(len(source), _SOURCE), _SOURCE))
        return model.start(memory, _ROOM)

    def step(params: Any, tokens: Any, state: Any) -> Any:
        return nnx.merge(graph, params).step(tokens, state)

    source = jax.ShapeDtypeStruct((_ROWS, _SOURCE), jnp.int32)
    tokens = jax.ShapeDtypeStruct((_ROWS,), jnp.int32)
    given = (params, tokens, jax.eval_shape(begin, params, source))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), given)
    known = (*given[:2], jax.tree_util.tree_map_with_path(_known, given[2]))
    moved = moved_by_kernels(step, *known) if platform == "tpu" else None
    # Donated: a decoding loop updates its cache in place.
    return Built(jax.jit(step, donate_argnums=2).trace(*placed).lower(), of_function(platform, step, *given), moved)


def _known(path: Sequence[Any], x: Any) -> Any:
    """Returns the integers and marks of a state whose rows have read as many tokens each; shapes of all else."""
    name = getattr(path[-1], "name", "segment")
    name = "segment" if name == "value" else name  # of `Shared`
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if name in ("finite", "overflowed"):
        return np.full(x.shape, name == "finite")
    if x.ndim < 2:
        return np.full(x.shape, 1 if name == "segment" else _FILLED, x.dtype)
    # The source fills its memory.
    slot = np.arange(x.shape[1], dtype=np.int32)
    real = (slot < _FILLED) | (path[0].name == "memory")
    never = np.asarray(KeyColumns.empty(1, 1, 1, 1, value_dim=1, dtype=jnp.float32).at.position)[0]
    return np.broadcast_to(np.where(real, slot, never) if name == "position" else real.astype(np.int32), x.shape)
