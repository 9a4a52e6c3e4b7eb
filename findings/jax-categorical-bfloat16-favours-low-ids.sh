#!/usr/bin/env bash
# jax.random.categorical draws mostly the lowest ids if logits are bfloat16, even though all are equal.
#
# Versions: jax and jaxlib 0.10.2, NumPy 2.4.6.
#
# Expected: with 1,000 equal logits, exactly representable in bfloat16, every id is as likely as any other: a mean id
#   near 499.5, and each of the 1,000 ids among 20,000 draws.
# Seen: the mean is near 127 and a quarter of the ids never appear. The Gumbel noise is drawn in the dtype of the
#   logits, from 128 possible values in bfloat16, so that many ids share the largest value, and argmax takes the first
#   of them. A language model that samples from bfloat16 logits therefore prefers low token ids. With mode="high", or
#   after a cast of the logits to float32, draws are uniform.
#
# Output: (20,000 draws)
#   float32:             mean id 502.6, ids seen 1000
#   bfloat16:            mean id 126.6, ids seen 722
#   bfloat16, mode=high: mean id 492.7, ids seen 1000
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


def drawn(dtype, mode):
    """The mean of 20,000 ids drawn from 1,000 equal logits, and how many different ids there are among them."""
    ids = np.asarray(jax.random.categorical(jax.random.key(0), jnp.zeros(1_000, dtype), shape=(20_000,), mode=mode))
    return ids.mean(), len(np.unique(ids))


cases = {
    "float32": drawn(jnp.float32, None),
    "bfloat16": drawn(jnp.bfloat16, None),
    "bfloat16, mode=high": drawn(jnp.bfloat16, "high"),
}
for name, (mean, seen) in cases.items():
    print(f"{name}:".ljust(20), f"mean id {mean:.1f}, ids seen {seen}")

for name in ("float32", "bfloat16, mode=high"):
    mean, seen = cases[name]
    if not (480 < mean < 520 and seen > 990):
        raise SystemExit(f"changed: {name} draws ids with mean {mean}, {seen} of them different")
mean, seen = cases["bfloat16"]
if not (mean < 200 and seen < 800):
    raise SystemExit(f"changed: bfloat16 draws ids with mean {mean}, {seen} of them different")
PYTHON
