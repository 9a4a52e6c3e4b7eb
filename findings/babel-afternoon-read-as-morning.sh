#!/usr/bin/env bash
# Babel reads the afternoon times that it wrote itself as morning times, in languages with their own word for "PM".
#
# Versions: Babel 2.19.0.
#
# Expected: parse_time(format_time(t, locale=l), locale=l) is t, or an error, for every locale and predefined format.
# Seen: parse_time looks for the English letters "pm" only. Where the locale's format has another marker, the marker is
#   ignored and 13:30 comes back as 01:30 without an error: Korean, Arabic, Greek, Malay, Amharic and others.
#
# Output:
#   en 1:30:00 PM -> 13:30:00
#   ko 오후 1:30:00 -> 01:30:00
#   ar 1:30:00 م -> 01:30:00
#   el 1:30:00 μ.μ. -> 01:30:00
#   languages with 13:30 read as 01:30: 37
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'Babel==2.19.0'

"$folder/venv/bin/python" -I -X utf8 - <<'PYTHON'
from datetime import time

from babel.dates import format_time, parse_time
from babel.localedata import locale_identifiers

AFTERNOON, MORNING = time(13, 30), time(1, 30)


def read_back(locale):
    return parse_time(format_time(AFTERNOON, locale=locale), locale=locale)


for locale in ("en", "ko", "ar", "el"):
    written = format_time(AFTERNOON, locale=locale).replace("\u202f", " ")
    print(locale, written, "->", read_back(locale))
wrong = sorted(locale for locale in locale_identifiers() if "_" not in locale and read_back(locale) == MORNING)
print("languages with 13:30 read as 01:30:", len(wrong))

if read_back("en") != AFTERNOON:
    raise SystemExit(f"changed: in English, 13:30 is now read back as {read_back('en')}")
if not {"ko", "ar", "el"} <= set(wrong):
    raise SystemExit(f"changed: 13:30 is now read as 01:30 in these languages only: {wrong}")
PYTHON
