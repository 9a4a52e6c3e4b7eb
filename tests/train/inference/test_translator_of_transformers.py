"""Texts to texts as transformers translates them, with its tokenizer and its defaults of decoding.

transformers and PyTorch are no part of the `test` extra: `make test-hf` runs this file.
"""

import json

import pytest

from tests.huggingface_folders import write
from train import translate
from train.hub import hf_folder
from train.inference.translator import Translator

pytestmark = pytest.mark.slow

TEXTS = ["one two three", "five", "four four five one two", "three"]
DEFAULTS = {
    "greedy": {},
    "beams": {"num_beams": 4, "length_penalty": 0.6},
    "summaries": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_length": 5, "early_stopping": True},
    "first token": {"num_beams": 2, "forced_bos_token_id": 0, "bad_words_ids": [[8]]},
    "repetition": {"repetition_penalty": 1.7},
}
BART = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "max_length": 9}


@pytest.mark.parametrize("defaults", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("name", ["bart", "mbart"])
def test_texts_are_those_of_transformers(tmp_path, name, defaults):
    pytest.importorskip("torch", reason="PyTorch is not installed: see above how to run this")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: see above")
    folder = write(tmp_path / name, name, generation=BART | defaults)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), "utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    peer = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    given = theirs(TEXTS, padding=True, return_tensors="pt")
    given.pop("token_type_ids", None)
    expected = theirs.batch_decode(peer.generate(**given), skip_special_tokens=True)

    trained = hf_folder.load(f"hf:{folder}")
    assert trained.tokenizer.sources(TEXTS) == theirs(TEXTS)["input_ids"]
    arguments = translate.Arguments(folder)
    translator = Translator(
        *(trained.model, trained.tokenizer),
        search=translate.search_of(arguments, trained.decoding),
        processors=translate.processors_of(arguments, trained.tokenizer.end_id, trained.decoding),
        max_length=trained.decoding.max_length,
    )
    assert translator(TEXTS) == expected
