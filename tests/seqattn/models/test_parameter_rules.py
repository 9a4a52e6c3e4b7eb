"""Every parameter of every model is classified by a rule that stands beside its module."""

import pytest
from flax import nnx

from seqattn.interop import model_type
from seqattn.models.parameter_rules import PARAMETER_RULES, rule_of
from seqattn.nn.parameter_rule import Kind
from tests.every_model import GENERATING, LABELLING

EVERY = GENERATING | LABELLING


def parameters(config):
    """The shapes of a model's parameters by their paths; none is made."""
    kind = model_type(config)
    params = nnx.state(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))), nnx.Param)
    return {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(params)}


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_of_every_model_is_classified(name):
    found = parameters(EVERY[name])
    assert [path for path in found if rule_of(path) is None] == []
    for path, shape in found.items():
        rule = rule_of(path)
        assert len(rule.split) <= len(shape), path
        assert -len(shape) <= rule.outputs < len(shape), path
        assert len(shape) > 1 or rule.kind in (Kind.VECTOR, Kind.STATISTIC), path


def test_every_rule_is_about_some_parameter():
    deciding = {id(rule_of(path)) for config in EVERY.values() for path in parameters(config)}
    unused = {rule.glob for rule in PARAMETER_RULES if id(rule) not in deciding}
    # Of linear layers that no model of the list has under this name alone.
    assert unused <= {"*output/kernel"}


def test_a_parameter_without_a_rule_is_found_by_its_path():
    assert rule_of("something/new") is None
