#!/usr/bin/env bash
# jax.device_put(array, may_alias=False) shares the memory of a NumPy array on a CPU: writing to one changes the other.
#
# Versions: jax and jaxlib 0.10.2, NumPy 2.4.6; the same with jax 0.12.0.1.
#
# Expected: a copy. The docstring of device_put says of may_alias: "If False, `x` will be copied."
# Seen: an array at an address that is a multiple of 64 bytes is not copied, with a device or without one. Numbers
#   that NumPy writes afterwards appear in the array of JAX, which should never change. jnp.array copies. Whether an
#   array of NumPy has such an address is chance, so a program may be right in a test and wrong later: a view of a
#   file that is mapped into memory, or a buffer that is filled again for the next batch.
#
# Output:
#   device_put: shares memory True, after a write 2.0
#   device_put to a device: shares memory True, after a write 2.0
#   jnp.array: shares memory False, after a write 1.0
#   device_put at another address: shares memory False, after a write 1.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np


def ones(remainder):
    """1,024 floats at an address with this remainder by 64."""
    memory = np.empty(4096 + 128, np.uint8)
    start = -memory.ctypes.data % 64 + remainder
    array = memory[start : start + 4096].view(np.float32)
    array[:] = 1
    return array


ways = {
    "device_put": (0, lambda x: jax.device_put(x, may_alias=False)),
    "device_put to a device": (0, lambda x: jax.device_put(x, jax.devices()[0], may_alias=False)),
    "jnp.array": (0, jnp.array),
    "device_put at another address": (4, lambda x: jax.device_put(x, may_alias=False)),
}
shared = []
for name, (remainder, put) in ways.items():
    array = ones(remainder)
    found = jax.block_until_ready(put(array))
    shared.append(found.unsafe_buffer_pointer() == array.ctypes.data)
    array[:] = 2
    print(f"{name}: shares memory {shared[-1]}, after a write {float(found[0])}")
if shared != [True, True, False, False]:
    raise SystemExit("changed: device_put with may_alias=False copies")
PYTHON
