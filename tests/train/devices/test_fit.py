"""What a model demands of a mesh, before anything is compiled."""

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from seqattn.models import Encoder, EncoderConfig, TokenLabels
from seqattn.nn import BlockConfig, MixtureConfig
from train.devices.parallel import Replicated, Sharded
from train.update.parameters import paths
from train.update.step import TrainState


def model(**block):
    config = EncoderConfig(24, num_layers=1, block=BlockConfig(24, 32, **block), head=TokenLabels(5))
    return nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("axes", "block", "said"),
    [
        (
            {"tensor": 4},
            {"num_heads": 6},
            r"^parallel.tensor \(4\) must divide num_heads \(6\) of stack/blocks/0/attention$",
        ),
        (
            {"tensor": 2},
            {"num_heads": 6, "num_kv_heads": 3},
            r"^parallel.tensor \(2\) must divide num_kv_heads \(3\) of .*, or cut each group of 2 query heads",
        ),
        (
            {"expert": 4},
            {"num_heads": 2, "mixture": MixtureConfig(num_experts=6)},
            r"^parallel.expert \(4\) must divide num_experts \(6\) of stack/blocks/0/feed_forward$",
        ),
    ],
    ids=["heads", "groups", "experts"],
)
def test_e6_a_mesh_that_the_model_does_not_divide_over_is_refused(axes, block, said):
    with pytest.raises(ValueError, match=said):
        Sharded(**axes).spread(None, model=model(**block))
    Replicated().spread(lambda *_, **__: None, model=model(**block))


def test_key_heads_that_the_axis_does_not_divide_are_whole():
    given = model(num_heads=4, num_kv_heads=2)
    params = nnx.state(given, nnx.Param)
    state = TrainState(jax.ShapeDtypeStruct((), int), params, {"mu": params})
    for tensor, split in ((2, P("fsdp", "tensor")), (4, P("fsdp"))):
        where = Sharded(tensor=tensor).spread(None, model=given).shardings(state)
        found = dict(zip(jax.tree.leaves(paths(where.opt_state)), jax.tree.leaves(where.opt_state), strict=True))
        specs = {name: found[f"mu/stack/blocks/0/attention/{name}/kernel"].spec for name in ("query", "key", "value")}
        assert specs == {"query": P("fsdp", "tensor"), "key": split, "value": split}
