#!/usr/bin/env bash
# tokamax's attention with its default implementation cannot be compiled for a TPU if the length is no multiple of 128.
#
# Versions: tokamax 0.0.17, jax 0.11.2, jaxlib 0.11.2. Needs Python 3.12 or newer as python3.
#
# Expected: the documentation of `implementation` says that None selects the best available backend and is guaranteed to
#   work on all platforms. So a length of 100 is traced for other platforms as a length of 128 is.
# Seen: the kernel for TPUs raises ValueError for 100, because its block of 128 must divide the length. tokamax tries
#   another backend only after a NotImplementedError, so the program is not traced. On the CPU alone it runs.
#
# Output:
#   on the CPU, length 100: runs
#   for other platforms, length 128: traced
#   for other platforms, length 100: ValueError: q_block_size=128 should divide q_seq_len=100.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'tokamax==0.0.17' 'jax==0.11.2' 'jaxlib==0.11.2'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import logging

import jax
import jax.numpy as jnp
import tokamax

logging.getLogger("absl").setLevel(logging.ERROR)  # no warnings that nothing was tuned


def attention(x):
    return tokamax.dot_product_attention(x, x, x, is_causal=True)


def traced(length):
    """Traces attention for all platforms, and returns what happens."""
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16)
    with tokamax.config.cross_compile(True):
        try:
            jax.jit(attention).trace(x)
        except ValueError as error:
            return f"ValueError: {str(error).splitlines()[0]}"
    return "traced"


x = jnp.ones((1, 100, 2, 64), jnp.bfloat16)
here = "runs" if jnp.isfinite(attention(x)).all() else "is not finite"
found = {length: traced(length) for length in (128, 100)}
print(f"on the CPU, length 100: {here}")
for length, what in found.items():
    print(f"for other platforms, length {length}: {what}")

if here != "runs" or found[128] != "traced":
    raise SystemExit(f"changed: {here} on the CPU, {found[128]} for a length of 128")
if "should divide" not in found[100]:
    raise SystemExit(f"changed: {found[100]} for a length of 100")
PYTHON
