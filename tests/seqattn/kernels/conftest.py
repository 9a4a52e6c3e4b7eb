"""Tiles so small that the few tokens of a test fill several, with an odd rest."""

import pytest

from seqattn.kernels.chunked import schedule as tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Four queries (of one head in a group) and four keys in blocks of two, one lane, several steps."""
    for name, value in {"_VECTOR": 2, "_BLOCK": 2, "_QUERIES": (4, 8), "_KEYS": 4, "_LANES": 1, "_AT_ONCE": 0}.items():
        monkeypatch.setattr(tiles, name, value)
