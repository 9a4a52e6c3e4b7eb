#!/usr/bin/env bash
# Adam of optax never forgets a large gradient if the parameters are bfloat16.
#
# Versions: optax 0.2.8, jax and jaxlib 0.10.2, NumPy 2.4.6.
#
# Expected: the second moment is a decaying average (b2=0.999), so that ten large gradients are forgotten after some
#   thousand updates, in any dtype up to rounding.
# Seen: the second moment has the dtype of the parameters, and b2 is rounded to it: 0.999 is exactly 1 in bfloat16. The
#   average becomes a sum that can only grow. After ten gradients of 1, steps for gradients of 0.01 stay ten times too
#   small for good; in float32 they are back at the learning rate. The argument mu_dtype changes the first moment only.
#
# Output: (after 10 gradients of 1.0 and 10,000 of 0.01, learning rate 0.001)
#   float32:  second moment 0.00010045, step -0.001
#   bfloat16: second moment 0.0099487, step -9.9e-05
#   bfloat16, mu_dtype=float32: second moment 0.0099487, step -0.0001
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


def after(dtype, **arguments):
    """The second moment and the last step, after 10 gradients of 1 and 10,000 gradients of 0.01."""
    adam = optax.adam(1e-3, b2=0.999, **arguments)
    parameter = jnp.zeros((), dtype)

    def update(state, gradient):
        step, state = adam.update(gradient, state, parameter)
        return state, step

    gradients = jnp.where(jnp.arange(10_010) < 10, 1.0, 0.01).astype(dtype)
    state, steps = jax.lax.scan(update, adam.init(parameter), gradients)
    return float(state[0].nu), float(steps[-1])


cases = {
    "float32": after(jnp.float32),
    "bfloat16": after(jnp.bfloat16),
    "bfloat16, mu_dtype=float32": after(jnp.bfloat16, mu_dtype=jnp.float32),
}
for name, (moment, step) in cases.items():
    print(f"{name}: second moment {moment:.5g}, step {step:.2g}")

(moment, step), *low = cases.values()
if not (moment < 2e-4 and -1.1e-3 < step < -0.9e-3):
    raise SystemExit(f"changed: in float32 the second moment is {moment} and the step {step}")
for moment, step in low:
    if not (moment > 9e-3 and -2e-4 < step < 0):
        raise SystemExit(f"changed: in bfloat16 the second moment is {moment} and the step {step}")
PYTHON
