"""Updates and evaluations of a model over the axes of a mesh, by the machinery of `train.devices`, of shapes."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compile.program import Built, Program
from benchmarks.compile.work import of_function
from seqattn.interop import model_type
from seqattn.models import LanguageModelConfig, TransformerConfig
from seqattn.models.position_encodings import Rotary
from seqattn.nn import BlockConfig, MixtureConfig
from seqattn.nn.feed_forward import Activation
from train.devices.layout import Layout
from train.devices.parallel import Sharded
from train.devices.sharding import ROWS, shardings
from train.objectives.sequences import SequenceToSequence
from train.update.optimizer import Optimizer
from train.update.step import TrainState, make_update, start


@dataclasses.dataclass(frozen=True)
class Training:
    """A model and its batches of packed texts, whose segments are known at run time only."""

    model: TransformerConfig | LanguageModelConfig
    rows: int
    """Rows of a batch for each device that splits them."""
    target: int
    """Tokens of a row of targets."""
    source: int = 0
    """Tokens of a row of sources; 0 for a plain language model."""

    def batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the arrays of `train.data.packing.pack`."""
        source, target = ("source", "source_segment", "source_position"), ("target", "label")
        sizes = dict.fromkeys(source, self.source)
        sizes |= dict.fromkeys((*target, "target_segment", "target_position"), self.target)
        return {name: jax.ShapeDtypeStruct((rows, size), jnp.int32) for name, size in sizes.items()}

    def sizes(self) -> dict[str, Any]:
        """Returns the sizes of the model and its batch, for the JSON line."""
        block = self.model.block
        fields = ("model_dim", "hidden_dim", "num_heads", "scan_layers", "remat")
        layers = {name: getattr(self.model, name) for name in vars(self.model) if name.endswith("layers")}
        batch = {"rows_per_part": self.rows, "source_length": self.source, "target_length": self.target}
        return {"vocab_size": self.model.vocab_size} | layers | {name: getattr(block, name) for name in fields} | batch


_BASE = TransformerConfig.base(37_000)
_DECODER = BlockConfig(768, 3072, 12, activation=Activation.GELU, norm_first=True, remat=True)
# Llama 2 7B (arXiv 2307.09288, table 1; sizes from its config), with layer norms in place of its RMS norms.
_7B = BlockConfig(
    4096, 11008, 32, activation=Activation.SILU, gated=True, norm_first=True, remat=True, dropout_rate=0.0
)


def _once(config: Any) -> Any:
    """Returns the config with its layers in a scan: the compiler sees one block."""
    return dataclasses.replace(config, block=dataclasses.replace(config.block, scan_layers=True))


def _mixed(config: TransformerConfig) -> TransformerConfig:
    return dataclasses.replace(config, block=dataclasses.replace(config.block, mixture=MixtureConfig()))


_DECODER_ONLY = LanguageModelConfig(50_257, 12, _DECODER, Rotary())

TRAININGS = {
    "base": Training(_BASE, 16, 256, 256),
    "base-scan": Training(_once(_BASE), 16, 256, 256),
    "experts": Training(_mixed(_BASE), 16, 256, 256),
    "decoder": Training(_once(_DECODER_ONLY), 8, 1024),
    "decoder-long": Training(_once(_DECODER_ONLY), 1, 65536),
    "decoder-7b": Training(_once(LanguageModelConfig(32_000, 32, _7B, Rotary())), 1, 4096),
}
"""What is trained, by the second word of a program's name."""

_SPLITS_ROWS = ("data", "fsdp", "expert")
_AXES = {
    "base": ("data",),
    "base-scan": ("data", "fsdp", "tensor", "sequence"),
    "experts": ("expert",),
    "decoder": ("data", "fsdp", "tensor", "sequence"),
}


def update_programs() -> list[Program]:
    """Makes the updates of each model along each axis of a mesh."""
    programs = [_program(name, axis, (1, 8) if axis == "data" else (8,)) for name in _AXES for axis in _AXES[name]]
    return [
        *programs,
        _program("base-scan", "data", (256,), name="update/base-256/data"),
        _program("decoder-long", "sequence", (8,)),
        _program("decoder-7b", "fsdp", (256,)),
    ]


def evaluation_programs() -> list[Program]:
    """Makes the loss of a batch for a model that no device should hold whole."""
    sizes = TRAININGS["decoder-7b"].sizes() | {"axis": "fsdp", "dtype": "float32"}
    build = functools.partial(_evaluation, TRAININGS["decoder-7b"])
    return [Program("evaluate/decoder-7b/fsdp", (8, 256), build, sizes, seconds=900)]


def _program(training: str, axis: str, counts: tuple[int, ...], *, name: str = "") -> Program:
    sizes = TRAININGS[training].sizes() | {"axis": axis, "dtype": "bfloat16"}
    build = functools.partial(_update, TRAININGS[training], axis)
    # Every model and axis for the smallest chip and for a GPU, and one of them for the other chips.
    kinds = () if (training, axis) == ("base-scan", "data") else ("v5e", "h200")
    return Program(name or f"update/{training}/{axis}", counts, build, sizes, seconds=900, kinds=kinds)


def _update(training: Training, axis: str, devices: Sequence[Any], platform: str) -> Built:
    optimizer = Optimizer().make(steps=1000)
    model = nnx.eval_shape(lambda: model_type(training.model)(training.model, rngs=nnx.Rngs(params=0)))
    graph, params = nnx.split(model, nnx.Param)
    state = jax.eval_shape(lambda params: start(nnx.merge(graph, params), optimizer)[1], params)
    # Each axis alone takes all devices; `data` takes those that the others leave. Heads must divide over `tensor`.
    size = math.gcd(training.model.block.num_heads, len(devices)) if axis == "tensor" else len(devices)
    sharded = Sharded() if axis == "data" else Sharded(**{axis: size})
    make = functools.partial(make_update, graph, optimizer, SequenceToSequence.loss, seed=0, compute_dtype=jnp.bfloat16)
    batch = training.batch(training.rows * (len(devices) if axis in _SPLITS_ROWS else len(devices) // size))
    lowered = sharded.spread(make(prepare=sharded.prepare), devices, model=model).lower(state, batch)
    # Counted as one device computes it: the work is the same, however it is split.
    return Built(lowered, of_function(platform, make(), state, batch))


def _evaluation(training: Training, devices: Sequence[Any], platform: str) -> Built:
    mesh = Sharded(fsdp=len(devices)).mesh(devices)
    graph, params = nnx.split(nnx.eval_shape(lambda: model_type(training.model)(training.model, rngs=nnx.Rngs(0))))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    where = shardings(TrainState(step, params, ()), mesh).params
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, where)
    rows, layout = NamedSharding(mesh, P(ROWS)), Layout.of(params)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        for name, x in training.batch(training.rows * len(devices)).items()
    }

    def loss(layout: Layout, params: Any, batch: Any) -> Any:
        return SequenceToSequence.loss(layout.merged(graph, params), batch)

    lowered = jax.jit(functools.partial(loss, layout)).trace(params, batch).lower()
    return Built(lowered, of_function(platform, functools.partial(loss, Layout()), params, batch))
