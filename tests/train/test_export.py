"""The command: what it writes, what its model card shows and says, and what it sends to the hub."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx

from seqattn.interop import to_arrays
from seqattn.models import Transformer
from tests.forward_programs import PROGRAMS, deserialize, logits, shapes
from tests.huggingface_folders import tokenizer_of
from tests.parameters import drawn
from train import export, objectives
from train.checkpoints import run
from train.checkpoints.run import Run
from train.data.pretrained_tokenizer import PretrainedTokenizer
from train.data.tokenizer import Characters, SpecialTokens, Tokenizer
from train.export import Arguments
from train.hub import card, exported, stablehlo
from train.hub.exported import FORWARD, SUMS, Exported
from train.inference.completer import Completer
from train.inference.translator import Translator
from train.objectives import Objective

BLOCKS = re.compile(r"```python\n(.*?)```", re.DOTALL)
TOKENS = Tokenizer.train(Characters(), ["abcdefg"])
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
HOW = {"average": 3, "beam_size": 5}
RESULTS = {"split": "test", "examples": 5, "steps": 12, "loss": 2.25, "exact_match": 0.2, "bleu": 3.7, "chrf": 9.123456}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Iterator[Run]:
    """A run of a Transformer that came to its end, and what is read of its folder; none was trained."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(RESULTS | {"sacrebleu": {"bleu": SIGNATURE}, **HOW}))
    config = dataclasses.replace(tiny.model, vocab_size=TOKENS.vocab_size)
    model = drawn(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    found = Run(folder, dataclasses.replace(tiny, model=config, run=folder), TOKENS, (), 12, model, "digest")
    load = run.load

    def loaded(folder, *, average=None):
        return found if folder == found.folder else load(folder, average=average)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load", loaded)
        yield found


@pytest.fixture
def unread(monkeypatch):
    """Where no run may be read."""
    monkeypatch.setattr(run, "load", lambda folder, **options: pytest.fail("a model was loaded"))


@pytest.fixture(scope="module")
def written(trained, unchecked, tmp_path_factory) -> Path:
    """Its export, with its program; not to be written to."""
    folder = tmp_path_factory.mktemp("export") / "reversing"
    export.main(Arguments(trained.folder, folder, license="apache-2.0", stablehlo=True, stablehlo_shape=(8, 80)))
    return folder


def executed(code, monkeypatch):
    """The names that a snippet of a card has made, and what it printed, where nobody has the training program."""
    monkeypatch.setitem(sys.modules, "train", None)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), names)
    return names, printed.getvalue()


def test_the_exported_model_is_the_runs_to_the_bit(trained, written):
    again = exported.load(written)
    for name, x in to_arrays(trained.model).items():
        assert x.tobytes() == to_arrays(again.model)[name].tobytes()
    assert again.model.config == trained.experiment.model
    assert (again.objective, again.step, again.labels) == ("SequenceToSequence", trained.step, ())
    found = Translator(again.model, again.tokenizer, max_length=9)(["ab", "cde"])
    assert found == Translator(trained.model, trained.tokenizer, max_length=9)(["ab", "cde"])


def test_the_folder_holds_what_the_model_needs_and_no_checkpoint(written):
    names = {path.name for path in written.iterdir()}
    assert names == {"README.md", SUMS, "config.json", FORWARD, "model.safetensors", "tokenizer.json"}


def test_a_folder_that_holds_something_is_refused_before_the_run_is_read(written, tmp_path, unread):
    with pytest.raises(FileExistsError, match="is not empty: give a folder that is new or empty"):
        export.main(Arguments(tmp_path, written))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"private": True}, "--private is for a model on the hub: it needs --push-to"),
        ({"stablehlo_shape": (8, 0)}, r"--stablehlo-shape, tokens \(0\) must be an integer of at least 1"),
        ({"push_to": "a/b/c"}, "a/b/c"),
    ],
)
def test_bad_flags_are_refused_before_the_run_is_read(flags, words, tmp_path, unread):
    with pytest.raises(ValueError, match=words):
        export.main(Arguments(tmp_path / "run", tmp_path / "new", **flags))


def test_flags_are_read(tmp_path):
    given = tyro.cli(
        Arguments, args=[str(tmp_path), "x", "--stablehlo", "--stablehlo-shape", "2", "32", "--push-to", "a/b"]
    )
    assert given == Arguments(tmp_path, Path("x"), stablehlo=True, stablehlo_shape=(2, 32), push_to="a/b")


def test_checkpoints_are_averaged_where_that_is_asked_for_and_the_card_says_so(trained, tmp_path, monkeypatch):
    asked = []

    def mean_of(folder, *, average):
        asked.append(average)
        return dataclasses.replace(trained, average=average or 3)

    monkeypatch.setattr(run, "load", mean_of)
    for average in (None, 3, 2):
        export.main(Arguments(trained.folder, tmp_path / str(average), average=average))
        said = (tmp_path / str(average) / "README.md").read_text()
        assert f"12 updates; the parameters are the mean of the latest {average or 3} checkpoints" in said
        assert ("measured with those parameters, not with the ones in this folder" in said) == (average == 2)
    assert asked == [None, 3, 2]


# The model card.


def test_the_card_is_one_for_the_hub(written):
    data = huggingface_hub.ModelCard.load(written / "README.md").data
    assert (data.library_name, data.license, data.model_name) == ("seqattn", "apache-2.0", "reversing")
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    assert figures == {"loss": 2.25, "exact_match": 0.2, "bleu": 3.7, "chrf": 9.1235}


def test_the_card_says_how_it_was_trained_and_measured(written, trained):
    said = (written / "README.md").read_text()
    of = "with the mean of the latest 3 checkpoints, with a beam of 5:"
    assert f"On the test split of 5 examples, after 12 updates, {of}" in said
    assert f"sacrebleu signature of bleu: `{SIGNATURE}`" in said
    assert "- steps: `12`" in said
    assert "- task: `Reverse(train_examples=101" in said
    assert "schedule=Constant(rate=0.01, warmup_steps=3)" in said
    assert str(trained.folder.parent) not in said
    # The results are those of the last checkpoint, not of the mean.
    assert "measured with those parameters, not with the ones in this folder" in said


def test_figures_of_a_run_that_was_stopped_are_those_of_its_latest_evaluation(tmp_path):
    rows = [{"step": 5, "kind": "validation", "loss": 3.5}, {"step": 6, "kind": "train", "loss": 1.5}]
    rows += [{"step": 10, "kind": "validation", "loss": 2.5, "bleu": "NaN"}, {"step": 12, "kind": "train", "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = card._results(tmp_path)
    assert (found.split, found.step, found.numbers["loss"]) == ("validation", 10, 2.5)
    data = huggingface_hub.ModelCard(card._header("x", "y", "z", "Dates", found, None)).data
    assert [result.metric_type for result in data.eval_results] == ["loss"], "JSON has no word for NaN"


@pytest.mark.parametrize("name", ["on", "1.5", "a: b", "- 'x\"", "null", "überß # 5"])
def test_the_header_quotes_names_that_mean_something_in_yaml(name):
    found = card.Results("test", 5, 3, 1, 1, {"loss": 2.5, "bleu": 1.0}, {})
    data = huggingface_hub.ModelCard(card._header(name, "x", name, "Dates", found, "no")).data
    assert (data.model_name, data.tags[-1], data.license) == (name, name, "no")
    assert [result.metric_value for result in data.eval_results] == [2.5, 1.0]
    assert {result.metric_name for result in data.eval_results} == {"loss, test split", "bleu, test split"}


def test_a_card_without_finite_figures_has_none():
    found = card.Results("test", 5, 3, 1, 1, {"loss": float("nan")}, {})
    assert "eval" not in card._header("x", "y", "z", "Dates", found, None)


def test_there_is_a_card_for_every_objective():
    kinds = [kind for kind in vars(objectives).values() if isinstance(kind, type) and issubclass(kind, Objective)]
    for kind in kinds:
        assert kind is Objective or (kind.hub_task and kind.sentence.endswith("."))


def test_without_figures_or_a_license_the_card_has_none(language, tmp_path):
    export.main(Arguments(language.folder, tmp_path / "new"))
    said = (tmp_path / "new" / "README.md").read_text()
    assert "Not measured." in said
    data = huggingface_hub.ModelCard(said).data
    assert (data.license, data.eval_results) == (None, None)
    assert str(language.experiment.task.root) not in said, "folders of whoever trained are told to nobody"


def test_the_cards_snippets_run_without_the_training_program(written, trained, monkeypatch):
    monkeypatch.chdir(written)
    use, program = BLOCKS.findall((written / "README.md").read_text())
    model = trained.model
    names, printed = executed(use, monkeypatch)
    given = {"source": names["source"], "target": jnp.array([[1]])}
    given |= {f"{side}_length": jnp.array([x.shape[1]]) for side, x in given.items()}
    assert names["found"].tokens[0, 0] == jax.jit(logits)(model, given)[0, 0].argmax()
    assert printed.strip() == str(names["found"].tokens[0, : int(names["found"].length[0])])
    assert "seqattn" not in program
    names, printed = executed(program, monkeypatch)
    assert names["logits"].shape[-1] == model.config.vocab_size
    assert printed.strip() == str(names["logits"].shape)


def test_the_card_of_a_language_model_shows_how_it_goes_on(language, tmp_path, monkeypatch):
    export.main(Arguments(language.folder, tmp_path / "new"))
    monkeypatch.chdir(tmp_path / "new")
    said = (tmp_path / "new" / "README.md").read_text()
    names, _ = executed(*BLOCKS.findall(said), monkeypatch)
    ids = names["found"].tokens[0, : int(names["found"].length[0])].tolist()
    text = language.tokenizer.decode([int(names["text"][0, 1])])
    assert language.tokenizer.decode(ids) == Completer(language.model, language.tokenizer, length=20)([text])[0]
    assert "python -m train.complete" in said


@pytest.mark.parametrize("name", ["classifier", "captioner"])
def test_the_card_of_another_model_shows_how_it_is_used(name, trained, tmp_path, monkeypatch):
    kind, config, objective = PROGRAMS[name]
    labels = ("a", "b c", "'") if name == "classifier" else ()
    model = drawn(lambda: kind(config, rngs=nnx.Rngs(0)))
    made = Exported(tmp_path / "new", model, TOKENS, labels, objective, 3)
    said = card.card(made, trained.experiment, tmp_path, image=(4, 9), program=None)
    exported.save(made, {})
    monkeypatch.chdir(made.folder)
    names, _ = executed(*BLOCKS.findall(said), monkeypatch)
    if labels:
        assert names["logits"].shape == (1, 3)
        assert "Labels: 'a', 'b c', \"'\"." in said
    else:
        assert names["image"].shape == (1, 4, 9)
        assert names["found"].tokens.shape[0] == 1


# The forward program.


def test_a_program_of_any_sizes_is_for_every_platform(written, trained):
    program = deserialize(written / FORWARD)
    assert program.platforms == stablehlo.PLATFORMS
    model = trained.model
    assert not isinstance(shapes(program)["source"].shape[0], int), "any batch"
    sizes = {
        name: [x if isinstance(x, int) else 3 + axis for axis, x in enumerate(shape.shape)]
        for name, shape in shapes(program).items()
    }
    given = {name: jnp.full(size, 4, jnp.int32) for name, size in sizes.items()}
    np.testing.assert_allclose(program.call(to_arrays(model), given), jax.jit(logits)(model, given), atol=1e-5)


def test_parameters_are_arguments_of_a_program(written):
    module = deserialize(written / FORWARD).mlir_module()
    table = exported.load(written).model.embedding.table
    assert "x".join(map(str, table.shape)) + "xf32" in module
    assert not re.search(r"stablehlo\.constant dense<\"0x[0-9A-F]{200}", module), "no parameter is written into it"


def test_d22_without_flatbuffers_nothing_is_begun(tmp_path, monkeypatch, unread):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ValueError, match=r"forward\.stablehlo needs the package flatbuffers: pip install flatbuffers"):
        export.main(Arguments(tmp_path, tmp_path / "new", stablehlo=True))


# The hub.


class Hub:
    """Records the calls of huggingface_hub.HfApi."""

    def __init__(self, *, private=False, error=None):
        self.private, self.error, self.calls = private, error, []

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))
        if self.error is not None:
            raise self.error

    def model_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options):
        names = [str(path.relative_to(options["folder_path"])) for path in options["folder_path"].rglob("*")]
        sent = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=options["allow_patterns"])
        self.calls.append(("upload_folder", options["repo_id"], sorted(sent)))


@pytest.fixture
def copy(written, tmp_path):
    """A folder like the exported one, to which somebody added what nobody should see."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "checkpoints").mkdir()
    for name in ("checkpoints/state", "optimizer.pkl", ".env", "metrics.jsonl", "README.md.orig"):
        (folder / name).write_text("secret")
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_the_export_alone_is_sent_to_the_hub(copy, written, monkeypatch, private):
    hub = Hub(private=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert export.push(copy, "me/model", private=private) == "https://huggingface.co/me/model"
    assert hub.calls == [
        ("create_repo", "me/model", {"private": private or None, "exist_ok": True}),
        ("upload_folder", "me/model", sorted(path.name for path in written.iterdir())),
    ]


def test_the_command_sends_it_where_that_is_asked_for(trained, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    export.main(Arguments(trained.folder, tmp_path / "new", push_to="me/model"))
    assert [call[:2] for call in hub.calls] == [("create_repo", "me/model"), ("upload_folder", "me/model")]
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/model\n")
    assert huggingface_hub.ModelCard.load(tmp_path / "new" / "README.md").data.model_name == "model"


def test_without_being_asked_nothing_is_sent(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was called"))
    export.main(Arguments(trained.folder, tmp_path / "new"))


def test_what_should_be_private_is_not_sent_to_a_public_place(copy, monkeypatch):
    hub = Hub(private=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    with pytest.raises(ValueError, match="me/model exists and is public"):
        export.push(copy, "me/model", private=True)
    assert [call[0] for call in hub.calls] == ["create_repo"]


def test_what_was_damaged_is_not_sent(copy, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was called"))
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        export.push(copy, "me/model", private=False)


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.HTTPError("Name or service not known\nmore"),
        huggingface_hub.errors.OfflineModeIsEnabled("offline mode\nmore"),
        huggingface_hub.errors.LocalTokenNotFoundError("Token is required.\nmore"),
        ConnectionError(),
    ],
)
def test_an_error_of_the_hub_is_one_sentence_that_says_what_to_do(copy, monkeypatch, error):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(error=error))
    with pytest.raises(
        ValueError, match=r"is written, but could not be uploaded: \w.*; then: hf upload me/model"
    ) as found:
        export.push(copy, "me/model", private=False)
    assert "\n" not in str(found.value)


def test_the_card_says_how_a_tokenizer_of_transformers_is_used(tmp_path, monkeypatch):
    tokenizer = PretrainedTokenizer(tokenizer_of("bart").to_str(), SpecialTokens((2,), 2, 1))
    tokenizer.save(tmp_path / "tokenizer.json")
    said = card.tokens_and_texts(Exported(tmp_path, None, tokenizer, (), "SequenceToSequence", 3))
    monkeypatch.chdir(tmp_path)
    names = {"text": "one two", "Path": Path}
    for line in re.findall("`((?:from|tokenizer = ).*?)`", said):
        exec(line, names)
    call = re.findall(r"`(tokenizer\.\w+\(\[text\]\)\[0\])`", said)[0]
    assert eval(call, names) == [0, 4, 5, 2]
    assert names["tokenizer"].decode([0, 4, 5, 2]) == "one two"
