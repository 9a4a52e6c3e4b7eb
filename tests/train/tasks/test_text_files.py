"""Lines and paragraphs of one's own files, whole or in pieces."""

import dataclasses

import pytest

from seqattn.models import EncoderConfig, LanguageModelConfig, MaskedTokens, RecurrentLanguageModelConfig
from train import objectives
from train.data.tokenizer import Characters, Tokenizer
from train.objectives import Continuation, Masking
from train.tasks import TextFiles


@pytest.fixture
def task(tmp_path):
    """Three files of which one has what a test is about."""
    for name in ("validation", "test"):
        (tmp_path / name).write_text(f"of the {name}\n")
    return TextFiles(*(tmp_path / name for name in ("train", "validation", "test")))


def targets(task, text):
    task.train.write_bytes(text.encode())
    loaded = task.load()
    assert set(loaded["train"]["source"]) == {""}
    return loaded["train"]["target"][:]


def test_each_line_is_an_example(task):
    assert targets(task, "ein Haus\n\n zwei \ndrei") == ["ein Haus", " zwei ", "drei"]


def test_each_paragraph_is_an_example(task):
    task = dataclasses.replace(task, unit="paragraph")
    assert targets(task, "\n\nein\nHaus\n \nzwei\n\n\n") == ["ein\nHaus", "zwei"]


def test_c3_c4_a_line_ends_at_a_line_feed_alone(task):
    assert targets(task, "\ufeffa\u2028b\x0bc\r\nd\re\u0085f") == ["a\u2028b\x0bc", "d\re\u0085f"]


def test_c8_longer_ones_are_cut_and_their_pieces_stay_together(task):
    cut = dataclasses.replace(task, characters=5, unit="paragraph")
    assert targets(cut, "ab\ncd\nefghijk") == ["ab\n", "cd\n", "efghi", "jk"]
    held = dataclasses.replace(task, characters=3, validation=None, test=None, validation_share=0.3, test_share=0.3)
    rows = [f"{number:03d}{number + 100}{number + 200}" for number in range(60)]
    targets(held, "\n".join(rows))
    found = {split: "".join(loaded["target"]) for split, loaded in held.load().items()}
    assert all(sum(row in text for text in found.values()) == 1 for row in rows)


@pytest.mark.parametrize("given", [True, False])
def test_a_piece_that_two_splits_have_leaves_training(task, given, caplog):
    """A licence begins many files."""
    licence = "Permission is hereby granted to whoever reads this,\n"
    texts = [f"{licence}text {number} which is long enough to fill a piece\n\n" for number in range(60)]
    task = dataclasses.replace(task, unit="paragraph", characters=53)
    if given:
        task.validation.write_text(texts.pop() + "  " + licence)
        task.test.write_text(texts.pop())
    else:
        task = dataclasses.replace(task, validation=None, test=None)
    targets(task, "".join(texts))
    found = {split: [piece.strip() for piece in rows["target"]] for split, rows in task.load().items()}
    assert licence.strip() in found["test"]
    for split, others in (("train", ("validation", "test")), ("validation", ("test",))):
        assert not set(found[split]) & {piece for other in others for piece in found[other]}
    assert sum(len(set(pieces)) for pieces in found.values()) == 61
    assert "pieces, which occur in another split" in caplog.text


def test_a_text_that_differs_in_blanks_at_its_ends_leaves_training(task):
    task.test.write_text("    return x\n")
    assert targets(task, "return x\nreturn x \n    return y\n") == ["    return y"]


def test_no_piece_is_left_for_training(task):
    task = dataclasses.replace(task, characters=2)
    task.test.write_text("aabb\n")
    with pytest.raises(ValueError, match=r"nothing to use for train: all its 2 pieces .* --task\.characters \(2\)"):
        targets(task, "bbaa\n")


def test_blank_pieces_are_dropped_after_cutting(task):
    assert targets(dataclasses.replace(task, characters=3), "abc      def \t \n") == ["abc", "def"]


def test_c1_blank_lines_are_skipped_and_counted(task, caplog):
    assert targets(task, "a\n \n\nb\n") == ["a", "b"]
    assert "train: 2 of 4 examples kept, 2 are blank" in caplog.text


def test_c5_bytes_that_are_not_utf8_are_named_by_file_and_line(task):
    task.train.write_bytes(b"a\nb\xff\n")
    with pytest.raises(ValueError, match=r"train:2: byte 2 \(0xff\) is not UTF-8"):
        task.load()


def test_damaged_gzip_is_named(task, tmp_path):
    (tmp_path / "train.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"train\.gz:1: damaged gzip data"):
        dataclasses.replace(task, train=tmp_path / "train.gz").load()


def test_a_piece_has_a_character():
    with pytest.raises(ValueError, match=r"characters \(0\) must be an integer of at least 1"):
        TextFiles(characters=0)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (LanguageModelConfig(11), Continuation),
        (RecurrentLanguageModelConfig(11), Continuation),
        (EncoderConfig(11, head=MaskedTokens()), Masking),
    ],
)
def test_language_models_and_masked_encoders_take_ones_own_text(model, kind, task, tiny):
    targets(task, "abc\nbcd\n")
    experiment = dataclasses.replace(tiny, task=task, model=model, bleu=False)
    assert objectives.kind(experiment) is kind
    objective = objectives.make(experiment, Tokenizer.train(Characters(), ["abcd"]), ())
    assert len(objective.examples(task.load()["train"])) == 2
