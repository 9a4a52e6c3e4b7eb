#!/usr/bin/env bash
# A text column of a CSV file loses leading zeros in datasets, from row 10,001 on.
#
# Versions: datasets 5.2.0, pandas 3.1.1, PyArrow 26.0.1, NumPy 2.4.6.
#
# Expected: a column has one type. If it holds words, then it is text, and "007" stays "007" wherever it stands.
# Seen: the file is read in pieces of 10,000 rows, and pandas guesses the type of each piece. In a piece without a
#   word, "007" is read as the number 7, and then cast to the text type of the first piece: "7". The same line gives
#   another text one row earlier. Nothing is reported.
#
# Output:
#   type of the column: large_string
#   "007" in row 10,000: '007'
#   "007" in row 10,001: '7'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  'datasets==5.2.0' 'pandas==3.1.1' 'pyarrow==26.0.1' 'numpy==2.4.6'

cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python -I - <<'PYTHON'
from pathlib import Path

import datasets

Path("rows.csv").write_text("\n".join(["text", *["word"] * 9_999, "007", "007", ""]))
rows = datasets.load_dataset("csv", data_files="rows.csv", split="train")
column = rows["text"]
print("type of the column:", rows.features["text"].dtype)
print('"007" in row 10,000:', repr(column[9_999]))
print('"007" in row 10,001:', repr(column[10_000]))

if "string" not in rows.features["text"].dtype or column[9_999] != "007":
    raise SystemExit(f"changed: the column is {rows.features['text']}, row 10,000 is {column[9_999]!r}")
if column[10_000] != "7":
    raise SystemExit(f"changed: row 10,001 is {column[10_000]!r}")
PYTHON
