"""Pairs of texts: settings of a task that reads them, rows of JSON lines, and lists to compare."""

import json

FLAT = {"source_column": "source", "target_column": "target", "validation_examples": 1, "test_examples": 1}
NESTED = {"source_language": "de", "target_language": "en", "validation_examples": 2, "test_examples": 3}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs(rows):
    return list(zip(rows["source"], rows["target"], strict=True))


def numbered(count):
    return [(f"s{number}", f"t{number}") for number in range(count)]
