#!/usr/bin/env bash
# Every module of flax.nnx has the signature (*args, **kwargs): what help(), editors and Sphinx show of its constructor.
#
# Versions: flax 0.12.8, jax 0.10.2, jaxlib 0.10.2.
#
# Expected: inspect.signature(Module) gives the parameters of __init__, as for other classes, so that a wrong keyword can
#   be found before the call and documentation lists the arguments.
# Seen: the metaclass of nnx.Module defines __call__(*args, **kwargs), which inspect prefers to __init__. The library's
#   own layers have the same: nnx.Linear shows no in_features.
#
# Output:
#   plain class: (size: int, *, rngs)
#   nnx.Module: (*args, **kwargs)
#   nnx.Linear: (*args, **kwargs)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2'

JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'PYTHON'
import inspect

from flax import nnx


class Plain:
    def __init__(self, size: int, *, rngs):
        self.size = size


class Module(nnx.Module):
    def __init__(self, size: int, *, rngs):
        self.size = size


def shown(kind):
    signature = inspect.signature(kind)
    if any(parameter.annotation == "Any" for parameter in signature.parameters.values()):
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
        signature = inspect.Signature(bare)
    return str(signature)


for name, kind in (("plain class", Plain), ("nnx.Module", Module), ("nnx.Linear", nnx.Linear)):
    print(f"{name}: {shown(kind)}")

if shown(Plain) != "(size: int, *, rngs)":
    raise SystemExit(f"changed: a plain class shows {shown(Plain)}")
if {shown(Module), shown(nnx.Linear)} != {"(*args, **kwargs)"}:
    raise SystemExit(f"changed: modules now show {shown(Module)} and {shown(nnx.Linear)}")
PYTHON
