#!/usr/bin/env bash
# jax.nn.dot_product_attention: a query with -inf in it attends to the keys that the causal mask hides.
#
# Versions: jax 0.10.2, jaxlib 0.10.2.
#
# Expected: the scores of a query that holds -inf are not finite, so its output is NaN, as with NaN or +inf in its place;
#   whatever it is, no value behind the causal mask reaches it.
# Seen: where all visible scores are -inf, the hidden ones, which the mask sets to -0.7 times the largest float32, are
#   the largest of the row: the output is the mean of the hidden values, finite and without a warning.
#
# Output:
#   NaN in the query: nan
#   inf in the query: nan
#   -inf in the query: 100.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'jax==0.10.2' 'jaxlib==0.10.2'

"$folder/venv/bin/python" -I - <<'PYTHON'
import jax
import jax.numpy as jnp

LENGTH, PLACE = 8, 3
key = jnp.ones((1, LENGTH, 1, 4))
# Up to the query's place every value is 0, and behind it, where the mask hides them, 100.
value = jnp.where(jnp.arange(LENGTH) > PLACE, 100.0, 0.0)[None, :, None, None] * jnp.ones((1, 1, 1, 4))


def seen(entry):
    query = jnp.zeros((1, LENGTH, 1, 4)).at[0, PLACE, 0, 0].set(entry)
    return float(jax.nn.dot_product_attention(query, key, value, is_causal=True)[0, PLACE, 0, 0])


for name, entry in (("NaN", jnp.nan), ("inf", jnp.inf), ("-inf", -jnp.inf)):
    print(f"{name} in the query:", seen(entry))

if seen(0.0) != 0:
    raise SystemExit(f"changed: a finite query now gives {seen(0.0)}")
if seen(-jnp.inf) != 100:
    raise SystemExit(f"changed: a query of -inf now gives {seen(-jnp.inf)}")
PYTHON
