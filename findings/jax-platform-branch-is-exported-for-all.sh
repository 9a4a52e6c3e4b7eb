#!/usr/bin/env bash
# jax.export for several platforms lowers the TPU branch of lax.platform_dependent for the CPU, too, and refuses it.
#
# Versions: jax 0.10.2, jaxlib 0.10.2.
#
# Expected: a branch that jax.lax.platform_dependent holds for TPUs alone is lowered for TPUs alone. So it is for one
#   platform: the same function exports for the CPU and exports for the TPU.
# Seen: for both at once each branch is lowered for both platforms, and a Pallas kernel for TPUs has no lowering for the
#   CPU. A function that runs on the CPU and compiles for the TPU cannot be exported for the two.
#
# Output:
#   cpu: exported
#   tpu: exported
#   cpu, tpu: ValueError: Only interpret mode is supported on CPU backend.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'jax==0.10.2' 'jaxlib==0.10.2'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.export
import jax.numpy as jnp
from jax.experimental import pallas as pl


def double(x_ref, y_ref):
    y_ref[...] = x_ref[...] * 2


def on_tpu(x):
    return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def doubled(x):
    return jax.lax.platform_dependent(x, tpu=on_tpu, default=lambda x: x * 2)


def exported(*platforms):
    try:
        jax.export.export(jax.jit(doubled), platforms=platforms)(jnp.ones((8, 128)))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "exported"


for platforms in (("cpu",), ("tpu",), ("cpu", "tpu")):
    print(f"{', '.join(platforms)}: {exported(*platforms)}")

if [exported("cpu"), exported("tpu")] != ["exported"] * 2:
    raise SystemExit("changed: one platform alone is now refused")
if exported("cpu", "tpu") == "exported":
    raise SystemExit("changed: both platforms at once are now exported")
PYTHON
