#!/usr/bin/env bash
# jax.lax.slice with static bounds, outside jit, is a transfer to the device, which jax.transfer_guard refuses.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, NumPy 2.4.6.
#
# Expected: the bounds of lax.slice are Python integers that are compiled in. A slice of an array on the device then needs
#   nothing from the host, as inside jit.
# Seen: outside jit it becomes a dynamic slice whose bounds are sent to the device, so it raises under
#   transfer_guard("disallow"). The same slice inside jit, and lax.iota, are accepted.
#
# Output:
#   slice inside jit: accepted
#   iota: accepted
#   slice: Disallowed host-to-device transfer
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import lax

x = jax.block_until_ready(jnp.arange(6.0))


def first(x):
    return lax.slice(x, (0,), (2,))


def outcome(fn, *arguments):
    with jax.transfer_guard("disallow"):
        try:
            jax.block_until_ready(fn(*arguments))
        except jax.errors.JaxRuntimeError as error:
            return str(error).split(": ")[1]
    return "accepted"


seen = {
    "slice inside jit": outcome(jax.jit(first), x),
    "iota": outcome(lambda: lax.iota(jnp.int32, 2)),
    "slice": outcome(first, x),
}
for name, what in seen.items():
    print(f"{name}: {what}")

if (seen["slice inside jit"], seen["iota"]) != ("accepted", "accepted"):
    raise SystemExit(f"changed: {seen}")
if seen["slice"] == "accepted":
    raise SystemExit("changed: a static slice is no transfer any more")
PYTHON
