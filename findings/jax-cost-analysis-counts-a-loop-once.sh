#!/usr/bin/env bash
# Compiled.cost_analysis counts the body of a loop once, even where the compiled program states how often it runs.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, NumPy 2.4.6.
#
# Expected: the "flops" of a loop of 100 products are those of the same 100 products without a loop. The number of
#   iterations is a Python integer, and the text of the compiled program holds it as known_trip_count.
# Seen: the loop has the "flops" of one product, and two operations for its counter. So a model whose layers are scanned,
#   or an attention that loops over tiles, seems to cost a small part of what it computes.
#
# Output:
#   100 products: 52428800
#   a loop of 100 products: 524290
#   the program states how often the loop runs: True
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.numpy as jnp

TIMES = 100
x = jnp.ones((64, 64))


def unrolled(y):
    for _ in range(TIMES):
        y = jnp.tanh(y @ x)
    return y


def looped(y):
    return jax.lax.fori_loop(0, TIMES, lambda _, y: jnp.tanh(y @ x), y)


flops = {}
for function in (unrolled, looped):
    compiled = jax.jit(function).lower(x).compile()
    flops[function] = int(compiled.cost_analysis()["flops"])
states = f'"known_trip_count":{{"n":"{TIMES}"}}' in compiled.as_text()
print(f"{TIMES} products: {flops[unrolled]}")
print(f"a loop of {TIMES} products: {flops[looped]}")
print(f"the program states how often the loop runs: {states}")

if flops[unrolled] != TIMES * 2 * 64**3 or not states:
    raise SystemExit(f"changed: {flops}, {states}")
if flops[looped] > flops[unrolled] / 2:
    raise SystemExit("changed: every iteration of the loop counts")
PYTHON
