"""The pictures of a run, and what they show."""

import numpy as np
import pytest
from flax import nnx

from seqattn.models import Learned, Transformer, TransformerConfig
from seqattn.nn import BlockConfig
from train import plot
from train.checkpoints import run
from train.data.tokenizer import Characters, Tokenizer
from train.objectives import pictures
from train.plot import Arguments


def test_the_command_draws_curves_and_a_map_for_each_text(finished, tmp_path, capsys):
    trained = run.load(finished)
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    copy = run.Run(folder, trained.experiment, trained.tokenizer, (), trained.step, trained.model, trained.data)
    paths = plot.draw(copy, ["abc", "de"])
    names = {path.relative_to(folder).as_posix() for path in paths}
    assert {"curves.png", "curves.svg", "attention/1.png", "attention/2.svg", "attention/1-heads.png"} <= names
    assert all(path.stat().st_size > 1000 for path in paths)


def test_what_is_drawn_are_the_models_weights_over_real_tokens(finished, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "attention_map", lambda *arguments, title: drawn.append((*arguments, title)) or ())
    trained = run.load(finished)
    pictures.draw_attention(trained.model, trained.tokenizer, "abc", "cba", tmp_path / "map")
    (mean, source, target, _, title), (heads, *_) = drawn
    assert source == ["a", "b", "c", "[END]"]
    assert target == ["c", "b", "a", "[END]"]
    assert title == "abc → cba"
    np.testing.assert_allclose(mean, heads.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(heads.sum(axis=-1), 1.0, atol=1e-5)


def test_the_command_names_its_pictures(finished, monkeypatch, capsys):
    monkeypatch.setattr(plot, "draw", lambda trained, texts: [trained.folder / text for text in texts])
    plot.main(Arguments((finished,), ("ab", "c")))
    assert capsys.readouterr().out.split() == [str(finished / "ab"), str(finished / "c")]


def test_an_output_that_fills_the_learned_positions_is_drawn(tmp_path):
    words = Tokenizer.train(Characters(), ["abcd"])
    block = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2)
    model = Transformer(TransformerConfig(words.vocab_size, 1, 1, block, Learned(max_length=4)), rngs=nnx.Rngs(0))
    assert pictures.draw_attention(model, words, "abc", "abcd", tmp_path / "map")
    assert not pictures.draw_attention(model, words, "abc", "[FAILED]", tmp_path / "none")
    assert not pictures.draw_attention(model, words, "", "abc", tmp_path / "none")


def rows(name, *losses):
    return "".join(f'{{"step": {step}, "kind": "{name}", "loss": {loss}}}\n' for step, loss in enumerate(losses, 1))


def test_several_runs_are_drawn_in_one_picture(tmp_path, monkeypatch, capsys):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(rows("train", 3, 2, 1) + rows("validation", 2.5))
    plot.main(Arguments((tmp_path / "first", tmp_path / "second"), to=tmp_path / "both.png"))
    png, svg = capsys.readouterr().out.split()
    assert (png, svg) == (str(tmp_path / "both.png"), str(tmp_path / "both.svg"))
    shown = (tmp_path / "both.svg").read_text()
    for text in ("first", "second", "training loss (nats)", "validation loss (nats)"):
        assert f"<!-- {text} -->" in shown
    assert "BLEU" not in shown


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    for folder in ("a/run", "b/run", "c/empty"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "metrics.jsonl").write_text(rows("train", 1) if folder != "c/empty" else "")
    first, second, empty = (tmp_path / name for name in ("a/run", "b/run", "c/empty"))
    with pytest.raises(ValueError, match="two runs have the same name"):
        plot.main(Arguments((first, second)))
    with pytest.raises(ValueError, match="at least one run folder"):
        plot.main(Arguments(()))
    with pytest.raises(ValueError, match="empty holds no loss"):
        plot.main(Arguments((first, empty)))
    with pytest.raises(ValueError, match=r"nowhere holds no metrics.jsonl; train: "):
        plot.main(Arguments((first, tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="--text needs exactly one run, got 2"):
        plot.main(Arguments((first, empty), text=("a",)))
