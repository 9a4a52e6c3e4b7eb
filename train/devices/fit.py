"""What a model demands of a mesh: its heads and experts must divide among the devices. Where its parameters go."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seqattn.models.parameter_rules import PARAMETER_RULES
from seqattn.nn import MixtureOfExperts, MultiHeadAttention
from seqattn.nn.parameter_rule import Kind, ParameterRule
from train.devices.sharding import AXES, shardings
from train.update.step import TrainState


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> Any:
    """Returns where the parameters of a model go on a mesh, as `Sharded` places them in training.

    Args:
        model: the model, of arrays or shapes.
        mesh: the mesh, as from `train.devices.parallel.Sharded.mesh`.

    Returns:
        The tree of `nnx.state(model)` with a `NamedSharding` in place of each array.

    Raises:
        ValueError: the mesh has other axes; or see `check_model`.
    """
    if set(mesh.axis_names) != set(AXES):
        raise ValueError(
            f"mesh must have the axes {', '.join(AXES)}, as Sharded().mesh() of train.devices.parallel makes it, got "
            f"{', '.join(map(str, mesh.axis_names))}"
        )
    rules = rules_for(model, tensor=mesh.shape["tensor"], expert=mesh.shape["expert"])
    return shardings(TrainState(jnp.zeros(()), nnx.state(model), ()), mesh, rules).params


def rules_for(model: nnx.Module, *, tensor: int, expert: int) -> tuple[ParameterRule, ...]:
    """Returns the rules that split the parameters of a model, after `check_model`."""
    check_model(model, tensor=tensor, expert=expert)
    return (*whole_heads(model, tensor=tensor), *PARAMETER_RULES)


def check_model(model: nnx.Module, *, tensor: int, expert: int) -> None:
    """Checks that mesh axes divide what they split of a model.

    Args:
        model: the model, of arrays or shapes.
        tensor: the size of the axis that splits heads.
        expert: the size of the axis that splits experts.

    Raises:
        ValueError: `tensor` does not divide a number of heads, or cuts groups of query heads unevenly; or `expert` does
            not divide a number of experts.
    """
    for path, module in nnx.iter_modules(model):
        where = "/".join(map(str, path))
        if isinstance(module, MultiHeadAttention):
            _check_heads(module.num_heads, module.num_kv_heads, tensor, where)
        if isinstance(module, MixtureOfExperts) and module.config.num_experts % expert:
            raise ValueError(
                f"parallel.expert ({expert}) must divide num_experts ({module.config.num_experts}) of {where}"
            )


def _check_heads(num_heads: int, num_kv_heads: int, tensor: int, where: str) -> None:
    # A device with a part of a head would need the other parts for every score.
    if num_heads % tensor:
        raise ValueError(f"parallel.tensor ({tensor}) must divide num_heads ({num_heads}) of {where}")
    # As `seqattn.attend` demands: the query heads of a device are whole groups, or lie within one group.
    group = num_heads // num_kv_heads
    if num_kv_heads % tensor and group % (num_heads // tensor):
        raise ValueError(
            f"parallel.tensor ({tensor}) must divide num_kv_heads ({num_kv_heads}) of {where}, or cut each group of "
            f"{group} query heads into equal parts"
        )


def whole_heads(model: nnx.Module, *, tensor: int) -> tuple[ParameterRule, ...]:
    """Returns rules for the grouped key heads that an axis does not divide: every device computes all of them.

    Args:
        model: the model, of arrays or shapes.
        tensor: the size of the axis that splits heads.

    >>> layer = MultiHeadAttention(8, 4, num_kv_heads=2, rngs=nnx.Rngs(0))
    >>> [rule.glob for rule in whole_heads(layer, tensor=4)]
    ['key/kernel', 'value/kernel']
    >>> whole_heads(layer, tensor=2)
    ()
    """
    return tuple(ParameterRule(path, Kind.MATRIX, P("fsdp")) for path in _grouped(model, tensor))


def _grouped(model: nnx.Module, tensor: int) -> Iterator[str]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, MultiHeadAttention) and module.num_kv_heads % tensor:
            yield from ("/".join([*map(str, path), name, "kernel"]) for name in ("key", "value"))
