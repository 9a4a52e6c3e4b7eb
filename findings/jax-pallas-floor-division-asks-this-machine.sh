#!/usr/bin/env bash
# A Pallas kernel for TPUs that divides integers with // cannot be lowered on a machine without a TPU; lax.div can.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, NumPy 2.4.6.
#
# Expected: lowering_platforms=("tpu",) lowers a program for TPUs on any machine, so both divisions of the index of a
#   step by 2 lower: the index is never negative, and they are the same number.
# Seen: // needs the sign of its operands, and the lowering of the sign asks the machine's own device which TPU it is.
#   On a CPU it raises ValueError. lax.div has no sign, and lowers.
#
# Output:
#   lax.div: lowered
#   //: ValueError: Unsupported TPU device kind: cpu
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

X = jax.ShapeDtypeStruct((32, 128), jnp.float32)


def lowered(half):
    """Lowers a kernel that adds half the index of its step, and returns what happens."""

    def kernel(x, output):
        output[...] = x[...] + half(pl.program_id(0)).astype(jnp.float32)

    rows = pl.BlockSpec((8, 128), lambda i: (i, 0))
    call = pl.pallas_call(kernel, out_shape=X, grid=(4,), in_specs=[rows], out_specs=rows)
    try:
        jax.jit(call).trace(X).lower(lowering_platforms=("tpu",))
    except ValueError as error:
        return f"ValueError: {str(error).splitlines()[0]}"
    return "lowered"


found = {"lax.div": lowered(lambda i: jax.lax.div(i, 2)), "//": lowered(lambda i: i // 2)}
for name, what in found.items():
    print(f"{name}: {what}")

if found["lax.div"] != "lowered":
    raise SystemExit("changed: lax.div does not lower")
if "Unsupported TPU device kind" not in found["//"]:
    raise SystemExit(f"changed: // gives {found['//']}")
PYTHON
