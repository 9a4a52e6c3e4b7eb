"""What a model demands of a mesh: its heads and experts must divide among the devices."""

from collections.abc import Iterator

from flax import nnx
from jax.sharding import PartitionSpec as P

from seqattn.nn import MixtureOfExperts, MultiHeadAttention
from seqattn.nn.parameter_rule import Kind, ParameterRule


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
