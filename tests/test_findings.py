"""The findings keep the form that their README states. They are not run here: they install packages."""

import os
import re
import subprocess
from pathlib import Path

import pytest

FINDINGS = Path(__file__).parents[1] / "findings"
SCRIPTS = sorted(FINDINGS.glob("*.sh"))
LISTED = re.findall(r"^\| \[([^]]+)\]\(\1\) \|", (FINDINGS / "README.md").read_text("utf-8"), re.MULTILINE)

_INSTALL = re.compile(r" -m pip install((?:[^\n]*\\\n)*[^\n]*)\n")
_PIN = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*")
_FOREIGN = re.compile(r"https?:|/work\b|/tmp\b|/home\b|/root\b|\bseqattn\b")


def faults(text: str) -> list[str]:
    """What in the text of a script is not of the form."""
    head = text[: text.find("\nset -euo pipefail\n")].splitlines() if "\nset -euo pipefail\n" in text else []
    found = [] if head[:1] == ["#!/usr/bin/env bash"] else ["must start with #!/usr/bin/env bash and set -euo pipefail"]
    if not all(line.startswith("#") for line in head):
        found.append("must hold only comments above set -euo pipefail")
    parts = ("Versions:", "Expected:", "Seen:", "Output:")
    found += [f"must state {part}" for part in parts if not any(line.startswith(f"# {part}") for line in head)]
    for needed in ("$(mktemp -d)", "trap 'rm -rf \"$folder\"' EXIT", "-m venv", 'SystemExit(f"changed: '):
        if needed not in text.replace('SystemExit("', 'SystemExit(f"'):
            found.append(f"must hold {needed}")
    installed = [word for words in _INSTALL.findall(text) for word in re.findall(r"'([^']*)'", words)]
    found += [] if installed else ["must install quoted packages"]
    found += [f"must pin {word} with ==" for word in installed if not _PIN.fullmatch(word)]
    return found + [f"must not hold {word}" for word in _FOREIGN.findall(text)]


def test_the_table_lists_every_script():
    assert [script.name for script in SCRIPTS] == LISTED


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_has_the_form(script):
    assert not faults(script.read_text("utf-8"))
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


GOOD = """#!/usr/bin/env bash
# Versions: a 1.
# Expected: one.
# Seen: two.
# Output: 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \\
  'a==1.0' 'b==2'
"$folder/venv/bin/python" -c 'raise SystemExit(f"changed: {1}")'
"""


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("set -euo pipefail", "set -e", "must start with #!/usr/bin/env bash and set -euo pipefail"),
        ("# Seen: two.\n", "", "must state Seen:"),
        ("'b==2'", "'b>=2'", "must pin b>=2 with =="),
        ("# Output: 2", "# Output: https://a", "must not hold https:"),
        ("$(mktemp -d)", "/tmp/a", "must not hold /tmp"),
        ("# Output: 2", "# Output: 2\nset +x", "must hold only comments above set -euo pipefail"),
    ],
)
def test_another_form_is_caught(right, wrong, message):
    assert not faults(GOOD)
    assert message in faults(GOOD.replace(right, wrong))
