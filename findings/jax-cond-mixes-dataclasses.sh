#!/usr/bin/env bash
# jax.lax.cond accepts branches that return different dataclasses, and gives the values of one the type of the other.
#
# Versions: jax and jaxlib 0.10.2, NumPy 2.4.6.
#
# Expected: a TypeError, "cond branch outputs must have the same pytree structure", as for two named tuples of
#   different types and for two classes registered with register_pytree_node_class.
# Seen: for dataclasses registered with jax.tree_util.register_dataclass, the structures of two types compare equal
#   (though their hashes differ) if they have equally many data fields and equal metadata; field names do not matter.
#   cond, switch and scan trust that comparison. The result of cond has the type that the branch for True returns,
#   so a radius of 5 comes back as an x of 5.
#
# Output:
#   structures equal: True, hashes equal: False
#   cond(True):  Cartesian(x=3.0, y=4.0)
#   cond(False): Cartesian(x=5.0, y=0.9273)
#   named tuples: TypeError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cartesian:
    x: jax.Array
    y: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Polar:
    radius: jax.Array
    angle: jax.Array


class CartesianTuple(NamedTuple):
    x: jax.Array
    y: jax.Array


class PolarTuple(NamedTuple):
    radius: jax.Array
    angle: jax.Array


def choose(first, cartesian, polar):
    one, other = jnp.array([3.0, 4.0]), jnp.array([5.0, 0.9273])
    return jax.lax.cond(first, lambda: cartesian(*one), lambda: polar(*other))


one, other = jax.tree.structure(Cartesian(0, 0)), jax.tree.structure(Polar(0, 0))
print(f"structures equal: {one == other}, hashes equal: {hash(one) == hash(other)}")
for first in (True, False):
    result = choose(first, Cartesian, Polar)
    fields = ", ".join(f"{name}={round(float(value), 4)}" for name, value in vars(result).items())
    print(f"cond({first}):".ljust(12), f"{type(result).__name__}({fields})")
try:
    tuples = type(choose(False, CartesianTuple, PolarTuple)).__name__
except TypeError:
    tuples = "TypeError"
print("named tuples:", tuples)

if one != other or hash(one) == hash(other):
    raise SystemExit("changed: the structures of the two dataclasses no longer compare equal with different hashes")
if type(result) is not Cartesian or float(result.x) != 5:
    raise SystemExit(f"changed: cond now returns {result}")
if tuples != "TypeError":
    raise SystemExit(f"changed: cond now accepts two types of named tuples and returns a {tuples}")
PYTHON
