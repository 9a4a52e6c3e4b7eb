"""The exported folder: written whole, read back to the bit, and refused with its reason where anything is wrong."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from seqattn.interop import to_arrays
from seqattn.models import (
    Captioner,
    CaptionerConfig,
    Encoder,
    EncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    MaskedTokens,
    Patches,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    Seq2Seq,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import BlockConfig
from tests.parameters import drawn
from train import objectives
from train.data.tokenizer import Characters, Tokenizer
from train.hub import exported
from train.hub.exported import CONFIG, PARAMETERS, SUMS, TOKENIZER, Exported
from train.objectives import Objective

TOKENS = Tokenizer.train(Characters(), ["abcdefg"])
BLOCK = BlockConfig(model_dim=12, hidden_dim=7, num_heads=2)
MADE = {
    "transformer": (Transformer, TransformerConfig(11, 1, 1, BLOCK), "SequenceToSequence", ()),
    "seq2seq": (Seq2Seq, Seq2SeqConfig(11, 5, 6), "SequenceToSequence", ()),
    "language model": (LanguageModel, LanguageModelConfig(11, 1, BLOCK), "Continuation", ()),
    "recurrent": (RecurrentLanguageModel, RecurrentLanguageModelConfig(11, 5, 6), "Continuation", ()),
    "tagger": (Encoder, EncoderConfig(11, 1, BLOCK, head=TokenLabels(3)), "Tagging", ("x", "é", " ")),
    "classifier": (Encoder, EncoderConfig(11, 1, BLOCK, head=TextLabels(2)), "Classification", ("no", "yes")),
    "masked": (Encoder, EncoderConfig(11, 1, BLOCK, head=MaskedTokens()), "Masking", ()),
    "captioner": (Captioner, CaptionerConfig(11, Patches((2, 3)), Seq2SeqConfig(0, 8, 6)), "Reading", ()),
}


def made(folder: Path, name: str = "seq2seq") -> Exported:
    kind, config, objective, labels = MADE[name]
    return Exported(folder, drawn(lambda: kind(config, rngs=nnx.Rngs(0))), TOKENS, labels, objective, 7)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """An exported folder; not to be written to."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    exported.save(made(folder), {exported.CARD: b"# A model\n"})
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def sign(folder: Path) -> None:
    """Digests of the files as they are, as who broke them on purpose would write them."""
    lines = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES)
    (folder / SUMS).write_text("".join(lines))


FILES = (CONFIG, PARAMETERS, TOKENIZER)


@pytest.mark.parametrize("name", MADE)
def test_a_model_comes_back_to_the_bit(name, tmp_path):
    before = made(tmp_path / "deep" / "model", name)
    exported.save(before, {})
    after = exported.load(before.folder)
    assert after.model.config == before.model.config
    assert jax.tree.structure(after.model) == jax.tree.structure(before.model)
    for x, y in zip(jax.tree.leaves(before.model), jax.tree.leaves(after.model), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert after.tokenizer.to_json() == TOKENS.to_json()
    assert (after.labels, after.objective, after.step) == (before.labels, before.objective, before.step)


def test_every_objective_is_known_here():
    kinds = {
        kind.__name__ for kind in vars(objectives).values() if isinstance(kind, type) and issubclass(kind, Objective)
    }
    assert kinds - {"Objective"} == {objective for _, _, objective, _ in MADE.values()}


def test_the_folder_holds_these_files_and_no_other(written):
    assert sorted(path.name for path in written.iterdir()) == ["README.md", SUMS, CONFIG, PARAMETERS, TOKENIZER]
    assert [path.name for path in written.parent.iterdir()] == ["model"], "nothing is left beside it"
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1, "who may read one may read all"


def test_sha256sum_checks_the_folder(folder):
    assert subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True).returncode == 0
    (folder / TOKENIZER).write_text("{}")
    assert subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True).returncode == 1


def test_the_same_model_gives_the_same_digests(written, tmp_path):
    exported.save(made(tmp_path / "again"), {})
    assert (tmp_path / "again" / SUMS).read_text() == (written / SUMS).read_text()


def test_an_empty_folder_is_filled_and_another_one_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    exported.save(made(tmp_path / "empty"), {})
    assert exported.is_exported(tmp_path / "empty")
    before = (tmp_path / "empty" / SUMS).read_bytes()
    with pytest.raises(FileExistsError, match="empty is not empty: give a folder that is new or empty"):
        exported.save(made(tmp_path / "empty"), {})
    monkeypatch.setattr(exported, "check_free", lambda folder: None)  # somebody wrote there meanwhile
    with pytest.raises(OSError, match="not empty"):
        exported.save(made(tmp_path / "empty"), {})
    assert (tmp_path / "empty" / SUMS).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file"):
        exported.save(made(tmp_path / "file"), {})


def test_d18_arrays_that_are_not_contiguous_are_written_rightly(tmp_path):
    x = np.arange(15, dtype=np.float32).reshape(3, 5)
    arrays = {
        "fortran": np.asfortranarray(x),
        "transposed": x.T,
        "strided": x[:, ::2],
        "zero": np.float32(3)[None][0:1],
    }
    arrays["scalar"] = np.array(2.5, np.float32)
    exported.write_arrays(tmp_path / "x", arrays)
    for name, array in safetensors.numpy.load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)


def test_d18_what_the_disk_did_not_keep_is_noticed_and_nothing_stays(tmp_path, monkeypatch):
    write = exported.write_arrays

    def lose_a_bit(path, arrays):
        write(path, arrays)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(exported, "write_arrays", lose_a_bit)
    with pytest.raises(ValueError, match="read back differ from those written"):
        exported.save(made(tmp_path / "model"), {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(path, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exported, "write_arrays", full)
    with pytest.raises(OSError, match="No space left"):
        exported.save(made(tmp_path / "model"), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*FILES, SUMS])
@pytest.mark.parametrize("place", [0, 0.2, 0.5, 0.8, 1])
def test_d19_a_flipped_bit_anywhere_is_noticed(folder, name, place):
    content = bytearray((folder / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 4
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match="SHA256SUMS"):
        exported.load(folder)


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_d19_a_missing_or_truncated_file_is_noticed(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="SHA256SUMS"):
        exported.load(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        exported.load(folder)


def safetensors_file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(name, begin, end, shape):
    return {name: {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


def overlapping(content: bytes) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    first, second = sorted((x["data_offsets"], name) for name, x in header.items())[:2]
    length = second[0][1] - second[0][0]
    header[second[1]]["data_offsets"] = [first[0][0], first[0][0] + length]
    return safetensors_file(json.dumps(header).encode(), content[8 + size :])


D19 = {
    "truncated": lambda content: content[:-4],
    "truncated header": lambda content: content[:50],
    "empty": lambda content: b"",
    "huge header": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "header of 100 MB": lambda content: safetensors_file(b" " * 100_000_001, b""),
    "overlap": overlapping,
    "trailing bytes": lambda content: content + b"\0" * 4,
    "no JSON": lambda content: safetensors_file(b"{" * 64, content[-64:]),
    "JSON nested without end": lambda content: safetensors_file(b'{"a":' * 90_000, b""),
    "a shape beyond 64 bits": lambda content: safetensors_file(
        json.dumps(entry("embedding.table", 0, 4, [2**63, 2**63])).encode(), b"\0" * 4
    ),
    "a negative offset": lambda content: safetensors_file(json.dumps(entry("x", -4, 0, [1])).encode(), b"\0" * 4),
    "another array": lambda content: safetensors_file(json.dumps(entry("x", 0, 4, [1])).encode(), b"\0" * 4),
    "a dtype of its own": lambda content: content.replace(b'"F32"', b'"I32"', 1),
}


@pytest.mark.parametrize("change", D19.values(), ids=D19)
def test_d19_a_file_of_parameters_that_was_broken_on_purpose_is_refused(folder, change):
    path = folder / PARAMETERS
    path.write_bytes(change(path.read_bytes()))
    sign(folder)
    with pytest.raises(ValueError, match=PARAMETERS):
        exported.load(folder)


class Exploit:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["model.pkl", "pytorch_model.bin", "x.pt", "x.PICKLE", "x.npy", "training_args.bin"])
def test_d20_a_pickle_in_the_folder_does_nothing(folder, tmp_path, name):
    mark = tmp_path / "ran"
    content = pickle.dumps(Exploit(mark))
    pickle.loads(content)
    assert mark.is_dir(), "the exploit works"
    mark.rmdir()
    (folder / name).write_bytes(content)
    (folder / name).chmod(0)
    with pytest.warns(UserWarning, match=f"{name} may hold a pickle, which can run code: it is not opened"):
        exported.load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("name", FILES)
def test_d20_a_pickle_in_place_of_a_file_does_nothing(folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
    sign(folder)
    with pytest.raises(ValueError, match=name):
        exported.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link that leaves the folder"):
        exported.load(folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "beside")
    (folder / name).symlink_to("beside")
    assert exported.load(folder).step == 7


def test_a_pipe_is_no_file(folder):
    (folder / TOKENIZER).unlink()
    os.mkfifo(folder / TOKENIZER)
    with pytest.raises(ValueError, match=f"{TOKENIZER} must be a file"):
        exported.load(folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x", "line 4, must be a digest, two spaces and the name of a file"),
        (f"{'0' * 64}  ../model/config.json", "line 4, must be a digest"),
        (f"{'0' * 64}  /etc/passwd", "line 4, must be a digest"),
        (f"{'0' * 64}  config.json", "config.json is damaged or was changed"),
    ],
)
def test_a_list_of_digests_names_files_of_the_folder_alone(folder, line, words):
    with (folder / SUMS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=words):
        exported.load(folder)


def test_a_file_without_a_digest_is_not_read(folder):
    (folder / SUMS).write_text((folder / SUMS).read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"SHA256SUMS must have a digest of model.safetensors"):
        exported.load(folder)


def config(**fields):
    return lambda header: {**header, **fields}


D21 = {
    "unknown key": (config(x=1), "it must have the fields format, .* and no others"),
    "missing key": (lambda header: {k: x for k, x in header.items() if k != "step"}, "it must have the fields"),
    "another format": (config(format="other"), "its format must be seqattn"),
    "no object": (lambda header: [header], "its format must be seqattn"),
    "a later version": (config(version=2), "its version must be 1: another version of seqattn wrote it"),
    "a wrong type": (config(step=True), "step must be of type int"),
    "a negative step": (config(step=-1), "step must be of type int, and not negative"),
    "NaN": (config(step=float("nan")), "step must be of type int"),
    "a huge size": (lambda h: config(model=h["model"] | {"vocab_size": 10**9})(h), "max_parameters is 1,000,000,000"),
    "another size": (lambda h: config(model=h["model"] | {"hidden_dim": 8})(h), "arrays must match the model"),
    "an unknown field": (lambda h: config(model=h["model"] | {"x": 8})(h), "config has the unknown field 'x'"),
    "a count that is another": (config(parameters=3), "parameters, but config.json says 3"),
    "labels of a model without": (config(labels=["a"]), "labels must be 0 different strings"),
    "an objective of another model": (config(objective="Tagging"), "the objective of a Seq2SeqConfig must be Sequence"),
    "a small vocabulary": (
        lambda h: config(model=h["model"] | {"vocab_size": 10})(h),
        "it has 11 tokens, but the model has only 10",
    ),
}


@pytest.mark.parametrize(("change", "words"), D21.values(), ids=D21)
def test_d21_a_config_that_is_none_is_refused(folder, change, words):
    path = folder / CONFIG
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    sign(folder)
    with pytest.raises(ValueError, match=words):
        exported.load(folder)


def test_d21_the_cap_can_be_raised_and_lowered_and_does_not_stop_who_saves(written):
    count = json.loads((written / CONFIG).read_text())["parameters"]
    assert exported.load(written, max_parameters=count).step == 7
    with pytest.raises(ValueError, match=f"max_parameters is {count - 1}"):
        exported.load(written, max_parameters=count - 1)


def test_d21_labels_are_as_many_texts_as_the_model_has(tmp_path):
    exported.save(made(tmp_path / "model", "tagger"), {})
    path = tmp_path / "model" / CONFIG
    header = json.loads(path.read_text())
    for labels in (["x", "y"], ["x", "x", "y"], ["x", "y", 3]):
        path.write_text(json.dumps(header | {"labels": labels}))
        sign(tmp_path / "model")
        with pytest.raises(ValueError, match="labels must be 3 different strings"):
            exported.load(tmp_path / "model")


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER])
def test_d21_json_nested_without_end_is_refused(folder, name):
    (folder / name).write_text("[" * 200_000 + "]" * 200_000)
    sign(folder)
    with pytest.raises(ValueError, match=f"{name}: its content is nested too deeply"):
        exported.load(folder)


def test_d21_a_huge_file_is_not_parsed(folder):
    with (folder / CONFIG).open("ab") as file:
        file.truncate(2**24 + 1)
    sign(folder)
    with pytest.raises(ValueError, match=r"config\.json must have at most 16,777,216 bytes, got 16,777,217"):
        exported.load(folder)


def test_what_is_no_folder_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        exported.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing: the folder does not contain a complete model"):
        exported.load(tmp_path)


def test_a_model_that_cannot_be_read_back_is_not_written(tmp_path):
    wrong = dataclasses.replace(made(tmp_path / "model"), labels=("a",))
    with pytest.raises(ValueError, match="labels must be 0 different strings"):
        exported.save(wrong, {})
    assert not list(tmp_path.iterdir())


def test_a_sound_folder_gives_no_warning(written):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported.load(written)


def test_d23_a_tied_embedding_is_written_once(tmp_path):
    exported.save(made(tmp_path / "model", "transformer"), {})
    arrays = safetensors.numpy.load_file(tmp_path / "model" / PARAMETERS)
    assert [name for name, x in arrays.items() if x.shape == (11, 12)] == ["embedding.table"]
    assert to_arrays(exported.load(tmp_path / "model").model).keys() == arrays.keys()
