"""The command: what it reads, prints, draws and refuses."""

import dataclasses
import io
import os
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import matplotlib.image
import pytest
import tyro

from seqattn.decoding import (
    GNMT,
    AverageLength,
    Banned,
    Greedy,
    NoPenalty,
    NoRepeatNgram,
    Sample,
    Stopping,
    Temperature,
    TopK,
)
from seqattn.models import Seq2SeqConfig
from tests.huggingface_folders import write
from train import translate
from train.checkpoints import run
from train.hub import hf_folder
from train.inference.translator import Beam, Output, Translator
from train.objectives import pictures
from train.translate import Arguments

TEXTS = ("ab", "cde")


def standard_input(content):
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def test_the_command_prints_a_line_for_each_text(finished, capsys):
    assert translate.main(Arguments(finished, TEXTS)) == 0
    printed = capsys.readouterr()
    trained = run.load(finished)
    assert printed.out.splitlines() == Translator(trained.model, trained.tokenizer)(TEXTS)
    assert printed.err == ""


def test_the_mean_of_checkpoints_needs_so_many(finished):
    with pytest.raises(ValueError, match=r"average \(2\) must be at most 1, .*--keep-checkpoints"):
        translate.main(Arguments(finished, TEXTS, average=2))


def test_without_texts_the_command_reads_standard_input(finished, capsys, monkeypatch):
    translate.main(Arguments(finished, TEXTS))
    first, second = capsys.readouterr().out.splitlines()
    monkeypatch.setattr("sys.stdin", standard_input(b"ab\r\n\ncde"))
    translate.main(Arguments(finished))
    assert capsys.readouterr().out == f"{first}\n\n{second}\n"


def test_a_byte_order_mark_of_standard_input_is_no_part_of_the_first_text(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", standard_input(b"\xef\xbb\xbfab\ncde\n"))
    assert list(translate._chunks(Arguments(tmp_path))) == [["ab", "cde"]]


def test_n_best_prints_score_tab_text_as_many_lines_for_each_text(finished, capsys):
    translate.main(Arguments(finished, (*TEXTS, ""), beam_size=3, n_best=2, length_penalty=GNMT(0.6)))
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    trained = run.load(finished)
    search = Beam(3, n_best=2, length_penalty=GNMT(0.6))
    found = Translator(trained.model, trained.tokenizer, search=search).stream([[*TEXTS, ""]])
    assert lines == [[f"{output.score:.4f}", output.text] for outputs in found for output in outputs]
    assert lines[-2:] == [["0.0000", ""], ["-inf", ""]]
    assert float(lines[0][0]) >= float(lines[1][0]) > float("-inf")


def test_a_translation_stays_on_its_line(capsys):
    translate._print([Output("a\r\nb\nc\rd", -1.0)])
    translate._print([Output("a\nb", -1.0), Output("", float("-inf"))])
    assert capsys.readouterr().out == "a b c d\n-1.0000\ta b\n-inf\t\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"beam_size": 0}, r"beam_size \(0\) must be an integer of at least 1"),
        ({"beam_size": 2, "n_best": 3}, r"n_best \(3\) must be an integer from 1 to beam_size \(2\)"),
        ({"n_best": 2, "top_k": 5}, r"n_best \(2\) must be an integer from 1 to beam_size \(1\)"),
        ({"beam_size": 2, "seed": 1}, r"--seed: sampling keeps one hypothesis, so beam_size \(2\) must be 1"),
        ({"beam_size": 2, "top_k": 1, "top_p": 0.5}, r"--top_k, --top_p: sampling keeps one hypothesis"),
        ({"length_penalty": GNMT(0.6)}, r"--length_penalty is for beam search, .* it would have no effect"),
        ({"stopping": Stopping.LIKELY, "top_k": 5}, r"--stopping is for beam search, .* it would have no effect"),
        ({"temperature": -1.0}, r"--temperature: temperature \(-1\) must be at least 0 and finite"),
        ({"top_k": 0}, r"--top_k: count \(0\) must be an integer of at least 1"),
        ({"top_p": 1.5}, r"--top_p: .* \(1.5\) must be in \[0, 1\]"),
        ({"min_p": -0.5}, r"--min_p: .* \(-0.5\) must be in \[0, 1\]"),
        ({"seed": -1}, r"seed \(-1\) must be an integer from 0 to 4294967295"),
        ({"repetition_penalty": 0.0}, r"--repetition_penalty: penalty \(0\) must be positive and finite"),
        ({"no_repeat_ngram": 0}, r"--no_repeat_ngram: size \(0\) must be an integer of at least 1"),
        ({"min_length": -1}, r"--min_length: length \(-1\) must be"),
        ({"max_length": 0}, r"max_length \(0\) must be an integer of at least 1"),
        ({"min_length": 5, "max_length": 4}, r"min_length \(5\) must be at most max_length \(4\)"),
        ({"average": 0}, r"average \(0\) must be an integer of at least 1"),
        ({"batch_size": 0}, r"batch_size \(0\) must be an integer of at least 1"),
        ({"plot": "map.png", "text": ()}, "--plot needs texts on the command line"),
        ({"plot": "."}, r"--plot \(\.\) must name a file"),
    ],
)
def test_bad_values_are_refused_before_a_model_is_loaded(flags, words, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    if "plot" in flags:
        flags = flags | {"plot": translate.Path(flags["plot"])}
    with pytest.raises(ValueError, match=words):
        translate.main(Arguments(**{"run": tmp_path, "text": TEXTS} | flags))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of transformers with many languages."""
    fields = {"num_beams": 2, "max_length": 8, "no_repeat_ngram_size": 2, "suppress_tokens": [3]}
    special = {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    return write(tmp_path_factory.mktemp("folders") / "mbart", "mbart", generation=fields | special)


def test_a_folder_of_transformers_has_its_own_defaults(folder, capsys, monkeypatch):
    made = []
    monkeypatch.setattr(
        translate, "Translator", lambda *given, **named: made.append(named) or Translator(*given, **named)
    )
    path = translate.Path(f"hf:{folder}")
    translate.main(Arguments(path, ("one two", "five")))
    translate.main(Arguments(path, ("one two",), beam_size=3, n_best=2, max_length=5, no_repeat_ngram=1))
    translate.main(Arguments(path, ("one two",), top_k=3))
    assert [named["search"] for named in made] == [
        Beam(2, stopping=Stopping.LIKELY),
        Beam(3, 2, stopping=Stopping.LIKELY),
        Sample((TopK(3),)),
    ]
    assert [named["processors"][0] for named in made] == [NoRepeatNgram(2), NoRepeatNgram(1), NoRepeatNgram(2)]
    assert all(named["processors"][-1] == Banned((3,)) for named in made)
    assert [named["max_length"] for named in made] == [7, 5, 7]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + 1


def test_languages_are_chosen_by_their_tokens(folder, capsys):
    path = translate.Path(f"hf:{folder}")
    translate.main(Arguments(path, ("one two",), source_language="de_DE", target_language="en_XX"))
    trained = hf_folder.load(f"hf:{folder}")
    tokenizer = trained.tokenizer.for_languages("de_DE", "en_XX")
    search, processors = Beam(2, stopping=Stopping.LIKELY), (NoRepeatNgram(2), Banned((3,)))
    expected = Translator(trained.model, tokenizer, search=search, processors=processors, max_length=7)(["one two"])
    assert capsys.readouterr().out.splitlines() == expected


def test_languages_of_our_own_models_are_refused(finished):
    with pytest.raises(ValueError, match="--source-language and --target-language are for models of transformers"):
        translate.main(Arguments(finished, TEXTS, target_language="de_DE"))


def test_flags_become_choices(tmp_path):
    def read(*flags):
        return tyro.cli(Arguments, args=[str(tmp_path), "a", *flags], config=(tyro.conf.EnumChoicesFromValues,))

    assert translate.search_of(read()) == Greedy()
    assert translate.search_of(read("--beam_size", "4")) == Beam(4, 1, AverageLength(1.0), Stopping.EXACT)
    flags = ("--beam-size", "5", "--n-best", "2", "--length_penalty", "gnmt:0.7", "--stopping", "likely")
    assert translate.search_of(read(*flags)) == Beam(5, 2, GNMT(0.7), Stopping.LIKELY)
    assert translate.search_of(read("--seed", "7")) == Sample(())
    assert translate.search_of(read("--top_k", "3", "--temperature", "0.5")) == Sample((Temperature(0.5), TopK(3)))
    assert len(translate.processors_of(read("--repetition_penalty", "2", "--no_repeat_ngram", "3"))) == 2
    assert read("--average", "10").average == 10
    assert read("--length_penalty", "none").length_penalty == NoPenalty()


@pytest.mark.parametrize("text", ["gnmt:", "gnmt:x", "gnmt:nan", "none:1", "", "median:1"])
def test_a_length_penalty_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"length_penalty \(.*\) must be average:NUMBER, gnmt:NUMBER or none"):
        translate.penalty_of(text)


def test_the_reader_may_leave(finished, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert translate.main(Arguments(finished, TEXTS)) == 141
        print("what is left goes nowhere", flush=True)


def test_plot_draws_the_texts(finished, tmp_path, capsys):
    folder = tmp_path / "new"
    translate.main(Arguments(finished, ("ab", ""), plot=folder / "map.svg"))
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    names = {f"map-1{heads}.{kind}" for heads in ("", "-heads") for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == names
    assert all(name in printed.err for name in names)
    assert "'': nothing to draw" in printed.err
    assert matplotlib.image.imread(folder / "map-1.png").std() > 0.01
    assert ElementTree.parse(folder / "map-1.svg").getroot().tag.endswith("svg")


def test_one_text_is_drawn_under_the_name_itself(finished, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_attention", lambda model, words, *arguments: drawn.append(arguments) or [])
    for name, stem in (("map.png", "map"), ("v1.2", "v1.2")):
        translate._draw(run.load(finished), ["ab"], ["ba"], tmp_path / name)
        assert drawn.pop() == ("ab", "ba", tmp_path / stem)


def test_a_model_without_attention_has_no_map(finished, tmp_path, monkeypatch, capsys):
    trained = run.load(finished)
    blind = SimpleNamespace(config=Seq2SeqConfig(9, attention=None, input_feeding=False))
    monkeypatch.setattr(run, "load", lambda *_, **__: dataclasses.replace(trained, model=blind))
    with pytest.raises(ValueError, match=r"has no attention to draw"):
        translate.main(Arguments(finished, TEXTS, plot=tmp_path / "map"))
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_shown_on_a_terminal_where_the_number_of_lines_is_known(tmp_path, monkeypatch, capsys):
    (tmp_path / "lines").write_text("skipped\na\nb\nc")
    monkeypatch.setattr("sys.stderr", Terminal())
    with open(tmp_path / "lines", encoding="utf-8") as stream:
        stream.buffer.readline()
        monkeypatch.setattr("sys.stdin", stream)
        with translate._progress(()) as progress:
            progress.update(1)
        assert stream.buffer.read() == b"a\nb\nc"
    assert "1/3" in translate.sys.stderr.getvalue()
    with open(os.devnull, encoding="utf-8") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        with translate._progress(()) as progress:
            assert progress is None
    monkeypatch.setattr("sys.stdout", Terminal())
    with translate._progress(TEXTS) as progress:
        assert progress is None


def test_a_folder_without_a_checkpoint_says_how_to_train(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m train EXPERIMENT --run"):
        run.load(tmp_path)
    assert list(tmp_path.iterdir()) == []
