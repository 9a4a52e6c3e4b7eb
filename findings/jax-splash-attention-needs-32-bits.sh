#!/usr/bin/env bash
# JAX's splash attention does not compile for a TPU where jax_enable_x64 is on, whatever the dtype of its inputs.
#
# Versions: jax 0.10.2, jaxlib 0.10.2.
#
# Expected: jax_enable_x64 lets 64-bit types exist; a kernel that is given float32 compiles as without it.
# Seen: lowering fails with "Pallas encountered an internal verification error" on a product of a 32-bit and a 64-bit
#   integer. Nothing in the documentation of the kernel says so.
#
# Output:
#   32 bits: lowered
#   64 bits: VerificationError: Pallas encountered an internal verification error.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'jax==0.10.2' 'jaxlib==0.10.2'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


def attend(x):
    mask = masks.MultiHeadMask([masks.CausalMask((128, 128))])
    return kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)(x, x, x)


def lowered(enabled):
    with jax.enable_x64(enabled):
        traced = jax.jit(attend).trace(jnp.ones((1, 128, 128), jnp.float32))
        try:
            traced.lower(lowering_platforms=("tpu",))
        except Exception as error:
            return f"{type(error).__name__}: {error}".split(" Please")[0]
    return "lowered"


print("32 bits:", lowered(False))
print("64 bits:", lowered(True))

if lowered(False) != "lowered":
    raise SystemExit("changed: it is now refused in 32 bits")
if lowered(True) == "lowered":
    raise SystemExit("changed: it now compiles with jax_enable_x64")
PYTHON
