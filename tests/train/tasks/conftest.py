"""A folder for data sets of a test."""

import datasets
import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A local data set, and a cache of its own for what `datasets` makes of it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    path = tmp_path / "data"
    path.mkdir()
    yield path
    datasets.enable_progress_bars()
