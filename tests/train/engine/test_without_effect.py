"""Settings that would do nothing are refused before anything is compiled or written."""

import dataclasses
import json

import jax
import optax
import pytest
from flax import nnx

from seqattn.models import Captioner, CaptionerConfig, Convolutional, EncoderConfig, MaskedTokens, Seq2SeqConfig
from seqattn.nn import OverBatch
from train.checkpoints import run
from train.config import decode
from train.data.tokenizer import ByteLevelBPE, Characters, SavedTokenizer, Tokenizer
from train.engine import loop, without_effect
from train.experiments import catalogue
from train.hub.origin import Origin
from train.tasks import LabelledFiles
from train.update.adapters import LowRank
from train.update.optimizer import AdamW, Momentum, Muon, Optimizer
from train.update.schedules import Constant, InverseSquareRoot, InverseTime, Noam
from train.update.step import start_shapes

STEPS = 12  # of the tiny experiment, which is evaluated after 5 and 10
EVALUATIONS = r"evaluations of the run \({}\), from steps \(12\) and evaluate_every \({}\)"


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch):
    """Expects that the tiny experiment with these settings is refused by these words, and nothing is done before."""

    def check(words, **settings):
        monkeypatch.setattr("train.engine.start.fresh", lambda *_: pytest.fail("a model was drawn"))
        with pytest.raises(ValueError, match=words):
            loop.train(dataclasses.replace(tiny, run=tmp_path / "new", **settings))
        assert not (tmp_path / "new").exists()

    return check


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (rf"patience \(2\) would never end: it must be below the {EVALUATIONS.format(2, 5)}", {"patience": 2}),
        (
            rf"patience \(1\) would never end: it must be below the {EVALUATIONS.format(0, 13)}",
            {"patience": 1, "evaluate_every": 13},
        ),
        (
            rf"keep_best \(1\) would keep nothing: it must be at most the {EVALUATIONS.format(0, 13)}",
            {"keep_best": 1, "evaluate_every": 13},
        ),
        (r"profile \(1:1\) would trace nothing: the first update compiles and is left out", {"profile": "1:1"}),
    ],
)
def test_a_setting_that_no_evaluation_or_update_uses_is_refused(words, settings, refused):
    refused(words, keep_checkpoints=3, **settings)


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [
        (r"rate \(0.0\) would train nothing", {"schedule": Constant(rate=0.0)}),
        (r"rate \(0.0\) would train nothing", {"schedule": InverseTime(rate=0.0, every=3)}),
        (r"peak \(0.0\) would train nothing", {"schedule": InverseSquareRoot(peak=0.0, warmup_steps=3)}),
        (r"factor \(0.0\) would train nothing", {"schedule": Noam(warmup_steps=3, factor=0.0)}),
        (r"clip_norm \(inf\) would clip nothing", {"clip_norm": float("inf")}),
        (r"nesterov \(True\) looks ahead .* momentum is 0.0", {"algorithm": Momentum(0.0, nesterov=True)}),
        (r"pattern '\*tabel' matches no parameter; the nearest are ", {"algorithm": Muon(adam=("*tabel",))}),
        (r"Muon would orthogonalize no matrix: its adam \(\*\) ", {"algorithm": Muon(adam=("*",))}),
    ],
)
def test_a_setting_of_the_optimizer_that_does_nothing_is_refused(words, optimizer, refused, tiny):
    refused(words, optimizer=dataclasses.replace(tiny.optimizer, **optimizer))


def test_a_share_of_a_split_with_a_file_is_refused(refused, tmp_path):
    task = LabelledFiles(train=tmp_path / "train", test=tmp_path / "test", test_share=0.2)
    refused(r"--task\.test-share \(0\.2\) has no effect with --task\.test:", task=task)


@pytest.mark.parametrize("frozen", [("*",), ("embedding/*", "*coder/*", "*")])
def test_freezing_everything_is_refused(frozen, refused):
    refused(r"frozen \(.*\*\) matches every parameter: nothing would be trained", frozen=frozen)


def test_a_frozen_pattern_that_matches_nothing_is_refused(refused):
    refused(r"pattern 'encode/\*' matches no parameter; the nearest are ", frozen=("encode/*",))


def test_frozen_running_statistics_are_refused(tiny):
    image = Convolutional((3,), norm=OverBatch())
    config = CaptionerConfig(7, image, Seq2SeqConfig(0, embedding_dim=4, hidden_dim=6))
    _, state = start_shapes(nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0))), optax.sgd(0.1))
    words = r"frozen \(image/\*\) matches running statistics.*: image/norms/0/mean, image/norms/0/variance; freeze the"
    with pytest.raises(ValueError, match=words):
        without_effect.check_parameters(dataclasses.replace(tiny, frozen=("image/*",)), state)
    without_effect.check_parameters(dataclasses.replace(tiny, frozen=("image/*/kernel", "image/*/scale")), state)


def test_muon_beside_frozen_matrices_needs_one_that_learns(refused, tiny):
    muon = dataclasses.replace(tiny.optimizer, algorithm=Muon())
    refused(r"Muon would orthogonalize no matrix: .* and frozen \(\*coder/\*\) ", optimizer=muon, frozen=("*coder/*",))


def test_pieces_that_a_batch_has_no_rows_for_are_refused(tiny, tmp_path):
    rows = 100 * jax.local_device_count()
    with pytest.raises(ValueError, match=rf"tokens \(256\) has no room for {rows} rows .* each of the --pieces"):
        loop.train(dataclasses.replace(tiny, run=tmp_path / "new", pieces=100))
    assert not (tmp_path / "new").exists()


def test_word_vectors_of_no_token_are_refused(refused, tiny, tmp_path):
    file = tmp_path / "vectors.txt"
    file.write_text("word" + " 1.5" * tiny.model.block.model_dim)
    refused(r"--word-vectors: .*vectors.txt has a vector for none of the \d+ tokens", word_vectors=file)


def test_a_tokenizer_beside_that_of_the_model_to_start_from_is_told_or_refused(tiny, tmp_path, caplog):
    own, other = (Tokenizer.train(Characters(), [text]) for text in ("abc", "abd"))
    for name, tokenizer in (("own", own), ("other", other)):
        tokenizer.save(tmp_path / name)
    begun = Origin("runs/there", tiny.model, own, ByteLevelBPE(), (), lambda _: None)

    def check(given, begun=begun):
        without_effect.check_tokenizer(dataclasses.replace(tiny, tokenizer=given), begun)

    for given in (Characters(), ByteLevelBPE(), SavedTokenizer(tmp_path / "own")):
        check(given)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"other has another vocabulary than runs/there: leave it out, since --start"):
        check(SavedTokenizer(tmp_path / "other"))
    check(ByteLevelBPE(300))
    assert "the tokenizer is that of runs/there, not ByteLevelBPE(vocab_size=300)" in caplog.text


def test_adapters_without_a_model_or_beside_frozen_parameters_are_refused(refused, tmp_path):
    refused(r"adapters need the parameters of a trained model: give --start-from", adapters=LowRank())
    given = {"adapters": LowRank(train=("head/*",)), "start_from": tmp_path, "frozen": ("embedding/*",)}
    refused(r"frozen \(embedding/\*\) would change nothing beside adapters: .* but those", **given)


def test_settings_that_just_do_something_are_taken(tiny):
    least = {"keep_checkpoints": 3, "patience": 1, "keep_best": 7, "profile": "1:2"}
    without_effect.check_settings(dataclasses.replace(tiny, **least))
    algorithms = (Momentum(0.0), Momentum(0.1, nesterov=True), AdamW(weight_decay=0.0), Muon())
    schedules = (Constant(1e-9, STEPS), Noam(), InverseTime(every=9 * STEPS))
    for algorithm, schedule in [(algorithm, schedules[0]) for algorithm in algorithms] + [
        (algorithms[0], schedule) for schedule in schedules
    ]:
        optimizer = Optimizer(algorithm, schedule, clip_norm=None)
        without_effect.check_settings(dataclasses.replace(tiny, optimizer=optimizer))


@pytest.mark.parametrize("name", catalogue.names())
def test_every_experiment_uses_its_settings(name):
    without_effect.check_settings(catalogue.named(name))


def test_muon_of_one_pattern_more_and_of_a_pattern_that_is_frozen_too_is_taken(tiny):
    model = EncoderConfig(11, num_layers=1, block=tiny.model.block, head=MaskedTokens())
    _, state = start_shapes(nnx.eval_shape(lambda: run.build(model, seed=0)), optax.sgd(0.1))
    muon = Muon(adam=(*Muon().adam, "embedding/*"))
    experiment = dataclasses.replace(tiny, optimizer=Optimizer(muon), frozen=("embedding/*",))
    without_effect.check_parameters(experiment, state)


def test_a_run_that_was_trained_with_such_settings_can_still_be_used(tiny, finished, monkeypatch):
    found = decode(json.loads((finished / "config.json").read_text()))
    idle = {"optimizer": Optimizer(schedule=Noam()), "patience": 2, "keep_checkpoints": 3}
    monkeypatch.setattr(run, "decode", lambda _: dataclasses.replace(found, **idle))
    with pytest.raises(ValueError, match="patience"):
        without_effect.check_settings(dataclasses.replace(found, **idle))
    assert run.load(finished).step == STEPS
