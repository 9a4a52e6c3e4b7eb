#!/usr/bin/env bash
# A staircase schedule of optax takes a step later under jax.jit than without it.
#
# Versions: optax 0.2.8, jax and jaxlib 0.10.2, NumPy 2.4.6, on the CPU.
#
# Expected: exponential_decay(1.0, transition_steps=41, decay_rate=0.5, staircase=True) halves the learning rate at
#   updates 41, 82, 123 and so on, jitted or not: its documentation calls the quotient of the step
#   and transition_steps an integer division.
# Seen: without jit it does. With jit the rate at update 41 is still 1.0, and it falls at update 42. The schedule
#   computes floor(step / 41.0); XLA compiles the division by a constant as a product with the float32 reciprocal, and
#   41 * (1 / 41) is 0.99999994, whose floor is 0. This happens for about one length in eight; the smallest is 41. A
#   jitted training loop therefore follows another schedule than the one that was plotted or tested eagerly.
#
# Output:
#   update      eager   jitted
#       40        1.0      1.0
#       41        0.5      1.0
#       42        0.5      0.5
#   jitted schedules with a late first step: 23 of the lengths 1 to 200, from 41 on
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'optax==0.2.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def staircase(length):
    return optax.exponential_decay(1.0, transition_steps=length, decay_rate=0.5, staircase=True)


def rates(jitted):
    """The learning rate of each of 43 updates, read off the parameter that plain gradient descent moves."""
    descent = optax.sgd(staircase(41))
    update = jax.jit(descent.update) if jitted else descent.update
    state = descent.init(jnp.zeros(()))
    found = []
    for _ in range(43):
        step, state = update(jnp.ones(()), state)
        found.append(-float(step))
    return found


eager, jitted = rates(jitted=False), rates(jitted=True)
print("update      eager   jitted")
for count in (40, 41, 42):
    print(f"{count:6d} {eager[count]:10} {jitted[count]:8}")
late = [length for length in range(1, 201) if jax.jit(staircase(length))(length) == 1]
print(f"jitted schedules with a late first step: {len(late)} of the lengths 1 to 200, from {min(late, default=None)} on")

if eager[40:43] != [1.0, 0.5, 0.5]:
    raise SystemExit(f"changed: eager rates at updates 40 to 42 are {eager[40:43]}")
if jitted[40:43] != [1.0, 1.0, 0.5]:
    raise SystemExit(f"changed: jitted rates at updates 40 to 42 are {jitted[40:43]}")
PYTHON
