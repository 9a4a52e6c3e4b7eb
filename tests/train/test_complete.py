"""Continuations: the same as by one step after the other, each text for itself."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn import Coordinates
from seqattn.decoding import Sample, Temperature, TopK, TopP
from seqattn.models import (
    LanguageModel,
    LanguageModelConfig,
    Learned,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    Rotary,
)
from seqattn.nn import BlockConfig
from tests.huggingface_folders import write
from train import complete, evaluate, export, plot, translate
from train.checkpoints import run
from train.complete import Arguments
from train.data.tokenizer import Characters, Tokenizer
from train.experiments import catalogue
from train.hub import hf_folder, loading
from train.inference.completer import Completer
from train.inference.decoding import Decoding

MINE = """from train.experiments.reverse import REVERSE
import dataclasses
MINE = dataclasses.replace(REVERSE, steps=3)
"""
LETTERS = Tokenizer.train(Characters(), ["abcdefg"])
BLOCK = BlockConfig(model_dim=8, hidden_dim=7, num_heads=2)
TEXTS = ["abc", "", "fedcbagfedcbagfedcbaa", "g"]
LENGTH, MOST = 11, 37


def sharp(model):
    """One whose outputs differ."""
    nnx.update(model, jax.tree.map(lambda leaf: 2 * leaf, nnx.state(model)))
    return model


def transformer(positions):
    config = LanguageModelConfig(LETTERS.vocab_size, num_layers=2, block=BLOCK, positions=positions)
    return sharp(LanguageModel(config, rngs=nnx.Rngs(3)))


@pytest.fixture(scope="module")
def models():
    config = RecurrentLanguageModelConfig(LETTERS.vocab_size, embedding_dim=5, hidden_dim=6)
    recurrent = RecurrentLanguageModel(config, rngs=nnx.Rngs(0))
    return {"transformer": transformer(Rotary()), "recurrent": sharp(recurrent)}


def by_steps(model, text, length):
    """Ids, from the start token on: the text is fed token by token, then what is most probable."""
    step = jax.jit(type(model).step)
    nothing = jnp.zeros((1, 0), jnp.int32)
    state = model.start(model.encode(nothing, Coordinates(nothing, nothing)), MOST)
    given, said = [LETTERS.start_id, *LETTERS.encode(text)], []
    while len(said) < length and LETTERS.end_id not in said:
        logits, state = step(model, jnp.array([given[0]]), state)
        given = given[1:]
        if not given:
            given = [int(jnp.argmax(logits[0]))]
            said += given
    return said


@pytest.mark.parametrize("name", ["transformer", "recurrent"])
def test_texts_go_on_as_by_steps_and_as_by_the_whole_whatever_is_beside_them(models, name):
    model = models[name]
    found = Completer(model, LETTERS, length=LENGTH)(TEXTS)
    said = [by_steps(model, text, LENGTH) for text in TEXTS]
    assert found == [LETTERS.decode(ids) for ids in said]
    assert len(set(found)) > 2
    nothing = jnp.zeros((1, 0), jnp.int32)

    @jax.jit
    def whole(tokens, length):
        memory = model.encode(nothing, Coordinates(nothing, nothing))
        return jnp.argmax(model.decode(tokens, Coordinates.from_lengths(length, MOST), memory), axis=-1)

    for text, ids in zip(TEXTS, said, strict=True):
        given = [LETTERS.start_id, *LETTERS.encode(text)]
        row = np.zeros((1, MOST), np.int32)
        row[0, : len(given) + len(ids)] = [*given, *ids]
        best = whole(row, np.array([len(given) + len(ids)]))[0]
        assert best[len(given) - 1 :][: len(ids)].tolist() == ids


def test_learned_positions_limit_each_text_for_itself():
    model = transformer(Learned(9))
    # "[END]" is never the most probable token, so that only the limit ends a text.
    model.embedding.table[...] = model.embedding.table[...].at[LETTERS.end_id].set(0.0)
    texts = ["abc", "abcdefga", ""]
    found = Completer(model, LETTERS, length=LENGTH)(texts)
    rooms = [6, 1, 9]
    assert found == [LETTERS.decode(by_steps(model, text, room)) for text, room in zip(texts, rooms, strict=True)]
    assert Completer(model, LETTERS, length=2)(texts)[0] == LETTERS.decode(by_steps(model, "abc", 2))
    with pytest.raises(ValueError, match="a text of 10 tokens fills the 9 learned positions of the model"):
        Completer(model, LETTERS)(["a", "abcdefgab"])


def test_samples_depend_on_seed_and_index(models):
    def sample(texts, seed):
        search = Sample((Temperature(2.0),))
        return Completer(models["recurrent"], LETTERS, length=LENGTH, sampling=search, seed=seed)(texts)

    first = sample(["abc", "abc", "g"], 5)
    assert first == sample(["abc", "abc", "g"], 5)
    assert first != sample(["abc", "abc", "g"], 6)
    assert first[0] != first[1]
    assert sample(["g", "abc", "g"], 5)[1:] == first[1:]


def test_no_texts_and_no_room(models):
    assert Completer(models["recurrent"], LETTERS)([]) == []
    with pytest.raises(ValueError, match=r"length \(0\) must be an integer of at least 1"):
        Completer(models["recurrent"], LETTERS, length=0)


def test_the_command_prints_each_text_with_its_continuation(language, capsys):
    texts = ("x = 1", "# ")
    complete.main(Arguments(language.folder, texts, length=7, temperature=0))
    greedy = Completer(language.model, language.tokenizer, length=7)(texts)
    assert capsys.readouterr().out == "".join(text + rest + "\n" for text, rest in zip(texts, greedy, strict=True))


def test_without_texts_the_command_reads_standard_input_and_a_byte_order_mark_is_no_text(language, capsys, monkeypatch):
    complete.main(Arguments(language.folder, ("x = 1", "# "), length=7))
    expected = capsys.readouterr().out
    for content in (b"x = 1\n# \n", b"\xef\xbb\xbfx = 1\r\n# "):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        complete.main(Arguments(language.folder, length=7))
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("command", [complete, translate, export, plot, evaluate], ids=lambda module: module.__name__)
def test_the_experiment_of_another_task_of_the_same_name_is_refused_by_every_command(
    command, language, finished, tmp_path, monkeypatch
):
    """Types are known by their names, and tasks by their source or by what they load: here others than in training."""
    trained = run.load(finished) if command is translate else language
    other = dataclasses.replace(trained, data="0" * 64, source="0" * 64)
    monkeypatch.setattr(run, "load", lambda folder, *, average=None: other)
    (file := tmp_path / "mine.py").write_text(MINE)
    given = {
        complete: {"text": ("x",)},
        translate: {"text": ("x",)},
        export: {"folder": tmp_path / "exported"},
        plot: {"run": (other.folder,), "text": ("x",)},
    }.get(command, {})
    with pytest.raises(ValueError, match=r"the data changed since .* the --experiment that it was trained with"):
        command.main(command.Arguments(**{"run": other.folder, "experiment": file} | given))
    assert not (tmp_path / "exported").exists()


OWN = """import dataclasses
from pathlib import Path
from train.experiments.reverse import REVERSE
from train.tasks import Task
@dataclasses.dataclass(frozen=True)
class Own(Task):
    file: Path
    def load(self):
        return self.file.read_text()
MINE = dataclasses.replace(REVERSE, task=Own(Path("missing")))
"""


def test_an_experiment_with_the_source_of_the_training_needs_no_data(language, tmp_path):
    (file := tmp_path / "mine.py").write_text(OWN)
    experiment = catalogue.from_file(file)
    trained = dataclasses.replace(language, experiment=experiment, source=run.task_source(experiment.task))
    loading.check_task(trained, file)
    loading.check_task(trained, None)
    for source in ("", "0" * 64):
        with pytest.raises(FileNotFoundError, match="missing"):
            loading.check_task(dataclasses.replace(trained, source=source), file)
    file.write_text(OWN + "# of another task\n")
    with pytest.raises(FileNotFoundError, match="missing"):
        loading.check_task(trained, file)


def test_a_run_knows_the_source_of_its_task(language):
    assert language.source == run.task_source(language.experiment.task) != ""
    own = dataclasses.make_dataclass("Own", [], bases=(type(language.experiment.task),), frozen=True)
    own.__module__ = "a notebook"
    assert run.task_source(own()) == ""


def test_a_folder_of_transformers_samples_as_it_says(tmp_path, capsys):
    sampled = {"do_sample": True, "temperature": 0.5, "top_k": 3, "eos_token_id": [2, 4]}
    folder = write(tmp_path / "llama", "llama", generation=sampled)
    complete.main(Arguments(Path(f"hf:{folder}"), ("one two",), length=4))
    trained = hf_folder.load(f"hf:{folder}")
    sampling = Sample((Temperature(0.5), TopK(3)))
    completer = Completer(trained.model, trained.tokenizer, length=4, sampling=sampling)
    assert capsys.readouterr().out == "one two" + completer(["one two"])[0] + "\n"
    ours = Arguments(Path("run"))
    assert complete._sampling(ours, Decoding()) == Sample((Temperature(0.8), TopP(0.95)))
    flags = dataclasses.replace(ours, temperature=0.25)
    assert complete._sampling(flags, trained.decoding) == Sample((Temperature(0.25), TopK(3)))
    assert complete._sampling(flags, Decoding()) == Sample((Temperature(0.25), TopP(0.95)))
