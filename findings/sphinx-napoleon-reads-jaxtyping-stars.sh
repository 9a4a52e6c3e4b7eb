#!/usr/bin/env bash
# Sphinx reads the star in jaxtyping's shapes, Float[Array, "*batch T"], as the start of emphasis: a warning for each.
#
# Versions: Sphinx 9.0.4, jaxtyping 0.3.11, NumPy 2.4.6.
#
# Expected: napoleon adds the annotation of an attribute to its entry as a type. An annotation is Python, so it is shown
#   as it is written.
# Seen: it is pasted into the text as reStructuredText. A shape with any number of leading dims, which jaxtyping writes
#   with a star, is an emphasis that nothing ends, so a build with warnings as errors fails. Without the star, and with
#   napoleon_attr_annotations = False, nothing is reported.
#
# Output:
#   "T": 0 warnings
#   "*batch T": 1 warnings: Inline emphasis start-string without end-string. [docutils]
#   "*batch T", without annotations: 0 warnings
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'Sphinx==9.0.4' 'jaxtyping==0.3.11' 'numpy==2.4.6'

"$folder/venv/bin/python" -I - "$folder" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

MODULE = '''import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass
class Batch:
    """A batch.

    Attributes:
        values: the numbers.
    """

    values: Float[np.ndarray, "SHAPE"]
'''


def warnings(name, shape, settings):
    source = Path(sys.argv[1], name)
    source.mkdir()
    (source / "module.py").write_text(MODULE.replace("SHAPE", shape))
    (source / "index.rst").write_text("Batch\n=====\n\n.. autoclass:: module.Batch\n")
    extensions = "extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon']\nimport sys\nsys.path.insert(0, '.')\n"
    (source / "conf.py").write_text(extensions + "napoleon_use_ivar = True\n" + settings)
    build = [sys.executable, "-m", "sphinx", "-q", "-b", "html", ".", "built"]
    said = subprocess.run(build, cwd=source, capture_output=True, text=True, check=True).stderr
    return [line.split("WARNING: ")[1] for line in said.splitlines() if "WARNING: " in line]


plain = warnings("plain", "T", "")
starred = warnings("starred", "*batch T", "")
without = warnings("without", "*batch T", "napoleon_attr_annotations = False\n")
print(f'"T": {len(plain)} warnings')
print(f'"*batch T": {len(starred)} warnings:', *starred)
print(f'"*batch T", without annotations: {len(without)} warnings')

if plain or without:
    raise SystemExit(f"changed: warnings without a star or without annotations: {plain + without}")
if not any("Inline emphasis" in warning for warning in starred):
    raise SystemExit("changed: the star is now shown as it is")
PYTHON
