"""Tiles so small that the few tokens of a test fill several, with an odd rest."""

import pytest

from tests import contract


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The tiles of `contract.small_tiles`."""
    contract.small_tiles(monkeypatch)
