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

from benchmarks.compile.program import Built, Program
from benchmarks.compile.work import of_function
from seqattn import Coordinates
from seqattn.interop import model_type
from seqattn.models import LanguageModelConfig, TransformerConfig
from seqattn.models.position_encodings import Rotary
from seqattn.nn import BlockConfig

_ROWS, _SOURCE, _ROOM = 32, 256, 4096
_MODELS: dict[str, TransformerConfig | LanguageModelConfig] = {
    "base": TransformerConfig.base(37_000),
    "decoder": LanguageModelConfig(50_257, 12, BlockConfig(768, 3072, 12, norm_first=True), Rotary()),
}


def decoding_programs() -> list[Program]:
    """Makes a step of each model. Its attention to the cache is the implementation `cached`."""
    return [
        Program(
            f"decode/{name}/t{_ROOM}",
            (1,),
            functools.partial(_step, config),
            {"rows": _ROWS, "source_length": _SOURCE, "max_length": _ROOM, "dtype": "bfloat16"},
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
    # Donated: a decoding loop updates its cache in place.
    return Built(jax.jit(step, donate_argnums=2).trace(*placed).lower(), of_function(platform, step, *given))
