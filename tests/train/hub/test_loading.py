"""A run, an export and a folder of transformers are read alike."""

import dataclasses
from pathlib import Path

import pytest

from tests.huggingface_folders import write
from train.checkpoints import run
from train.hub import exported, loading
from train.hub.exported import Exported


@pytest.fixture
def trained(language) -> Exported:
    return Exported(Path(), language.model, language.tokenizer, (), "Continuation", language.step)


def test_the_folder_decides_what_is_read(trained, language, tmp_path):
    folder = tmp_path / "exported"
    exported.save(dataclasses.replace(trained, folder=folder), {exported.CARD: b"# A model\n"})
    assert isinstance(loading.load_trained(folder), Exported)
    assert isinstance(loading.load_trained(language.folder), run.Run)
    theirs = loading.load_trained(Path(f"hf:{write(tmp_path / 'gpt2', 'gpt2')}"))
    assert isinstance(theirs, Exported)
    assert theirs.objective == "Continuation"
    with pytest.raises(ValueError, match="is no run and has no checkpoints to average"):
        loading.load_trained(folder, average=2)
