"""The derivative of a score modification with respect to the score, as operations for each pair."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array

from seqattn.kernels.hopper.operations import HOPPER
from seqattn.kernels.hopper.rule import Rule
from seqattn.kernels.instructions import Instructions
from seqattn.kernels.on_tile import check


def with_slope(rule: Rule) -> Rule:
    """Returns a rule with two results: the modified score, and its derivative with respect to the score.

    The operations are differentiated by JAX, before those that the compiler lacks are rewritten: |x|, which a rewritten
    tanh computes, has the derivative 0 at 0.

    Raises:
        NotImplementedError: the kernel cannot compute the derivative.
    """
    late = rule.late
    closed = core.jaxpr_as_fun(core.ClosedJaxpr(late.instructions.jaxpr, ()))

    def both(*inputs: Array) -> tuple[Array, Array]:
        *borders, score = inputs
        # A score is modified alone, so the derivative in the direction 1 is the derivative.
        return jax.jvp(lambda score: closed(*borders, score)[0], (score,), (jnp.ones_like(score),))

    avals: list[Any] = [x.aval for x in late.instructions.jaxpr.invars]
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
    made = jax.make_jaxpr(both)(*types)
    if any(equation.primitive.name == "custom_lin" for equation in made.jaxpr.eqns):  # of a `jax.custom_vjp`
        raise NotImplementedError("a function in the score_mod has a derivative rule for reverse mode only")
    if made.consts:
        raise NotImplementedError("the derivative of the score_mod holds arrays")
    jaxpr = made.jaxpr.replace(constvars=[])
    changed = dataclasses.replace(late, instructions=Instructions.of(jaxpr, late.instructions.num_operands))
    check(changed, HOPPER)
    return dataclasses.replace(rule, late=changed)
