"""Folders of transformers. Beside transformers itself where it is installed, by the extra `bench`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

from seqattn.interop import to_arrays
from seqattn.interop.huggingface import from_huggingface
from tests.huggingface_models import CONFIGS, arrays_of, head_of, logits_of, peer_logits, peer_of
from train.devices.parallel import Sharded
from train.hub.pretrained import load_pretrained, save_pretrained
from train.update.step import TrainState

LLAMA = CONFIGS["llama"]


def written(folder: Path, fields=LLAMA, arrays=None) -> Path:
    """The folder, with a config and one file of arrays."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    arrays = arrays_of(fields) if arrays is None else arrays
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_shards(folder: Path, number: int = 3) -> Path:
    """The folder, with arrays in several files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    arrays = arrays_of(LLAMA)
    names = {name: f"model-{i % number + 1:05}-of-{number:05}.safetensors" for i, name in enumerate(arrays)}
    for file in set(names.values()):
        held = {name: x for name, x in arrays.items() if names[name] == file}
        safetensors.numpy.save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}), "utf-8")
    return folder


def equal(a: nnx.Module, b: nnx.Module) -> bool:
    a, b = to_arrays(a), to_arrays(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("write", [written, in_shards])
def test_a_folder_is_its_config_and_its_arrays(tmp_path, write):
    model = load_pretrained(write(tmp_path / "model"))
    assert equal(model, from_huggingface(LLAMA, arrays_of(LLAMA)))


def test_half_precision_is_read_in_the_dtype_that_the_caller_wants(tmp_path):
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays_of(LLAMA).items()}
    folder = written(tmp_path / "model", arrays=arrays)
    wide, half = load_pretrained(folder), load_pretrained(folder, param_dtype=jnp.bfloat16)
    for name, x in to_arrays(half).items():
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x.astype(np.float32), to_arrays(wide)[name])


@pytest.mark.parametrize("write", [written, in_shards])
def test_over_a_mesh_the_parameters_are_split_as_in_training(tmp_path, write):
    folder, parallel = write(tmp_path / "model"), Sharded(fsdp=2, tensor=3)
    mesh = parallel.mesh(jax.devices()[:6])
    whole, model = load_pretrained(folder), load_pretrained(folder, mesh=mesh)
    assert equal(model, whole)
    state = TrainState(jnp.zeros((), int), nnx.state(whole), ())
    wanted = parallel.spread(lambda *_: None, jax.devices()[:6], model=whole).shardings(state).params
    found = jax.tree.map(lambda x: x.sharding, nnx.state(model))
    assert jax.tree.leaves(found) == jax.tree.leaves(wanted)
    kernel = model.stack.blocks[0].attention.query.kernel[...]
    assert [shard.data.size for shard in kernel.addressable_shards] == [kernel.size // 6] * 6


def test_a_mesh_that_does_not_fit_is_refused_by_its_rule(tmp_path):
    folder = written(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: mesh must have the axes data, fsdp, .*, got x$"):
        load_pretrained(folder, mesh=Mesh(np.array(jax.devices()), ("x",)))
    with pytest.raises(ValueError, match=r"model: parallel.tensor \(8\) must divide num_heads"):
        load_pretrained(folder, mesh=Sharded(tensor=8).mesh())


@pytest.mark.parametrize("name", ["t5 1.1", "gpt2", "bart"])
def test_saved_and_loaded_is_the_same_model_with_its_tokenizer(tmp_path, name):
    fields = CONFIGS[name]
    first = written(tmp_path / "first", fields)
    without_effect = {"eos_token_id": 9, "task_specific_params": {"a": 1}, "torch_dtype": "float16"}
    (first / "config.json").write_text(json.dumps(fields | without_effect), "utf-8")
    for tokenizer in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        (first / tokenizer).write_text("{}", "utf-8")
    (first / "pytorch_model.bin").write_bytes(b"")
    model = load_pretrained(first)
    save_pretrained(model, fields["model_type"], tmp_path / "second", like=first)
    again = load_pretrained(tmp_path / "second")
    assert equal(model, again)
    assert model.config == again.config
    held = {path.name for path in (tmp_path / "second").iterdir()}
    assert held == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    saved = json.loads((tmp_path / "second" / "config.json").read_text("utf-8"))
    assert (saved["eos_token_id"], saved["task_specific_params"]) == (9, {"a": 1})
    assert ("torch_dtype" in saved, saved["dtype"]) == (False, "float32")


def test_labels_of_another_model_are_not_taken(tmp_path):
    fields = CONFIGS["bert, texts"]
    like = written(tmp_path / "like", fields | {"id2label": {"0": "no", "1": "yes"}}, {})
    model = from_huggingface(fields, arrays_of(fields))
    with pytest.raises(
        ValueError, match=r"like/config\.json has numbers of tokens or labels that do not fit the model"
    ):
        save_pretrained(model, "bert", tmp_path / "saved", like=like)
    assert not (tmp_path / "saved").exists()


def test_a_model_that_cannot_be_saved_leaves_nothing(tmp_path):
    model = load_pretrained(written(tmp_path / "model"))
    with pytest.raises(ValueError, match="t5 has no such LanguageModel"):
        save_pretrained(model, "t5", tmp_path / "other")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_pretrained(model, "llama", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"config\.json must hold a JSON object, got a list"),
        ("{", r"config\.json: Expecting property name"),
        ('{"model_type": "mamba"}', "model: model_type must be one of .*, got 'mamba'"),
    ],
)
def test_a_config_that_is_none_is_refused_by_its_path(tmp_path, text, message):
    folder = written(tmp_path / "model")
    (folder / "config.json").write_text(text, "utf-8")
    with pytest.raises((NotImplementedError, ValueError), match=message):
        load_pretrained(folder)


def test_a_pickle_is_not_opened_and_the_sentence_says_how_to_convert_it(tmp_path):
    folder = written(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, .*\.save_pretrained\(\"NEW_FOLDER\"\)"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing, and model\.safetensors\.index\.json"):
        load_pretrained(folder)


@pytest.mark.parametrize("kept", [4, 100, -5])
def test_a_truncated_file_is_refused_by_its_path(tmp_path, kept):
    path = written(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or no safetensors file"):
        load_pretrained(path.parent)


def test_a_missing_shard_and_a_wrong_one_are_named_with_an_array(tmp_path):
    folder = in_shards(tmp_path / "model")
    first, second, third = sorted(folder.glob("model-*"))
    third.replace(second)
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00003\.safetensors is missing: it holds "):
        load_pretrained(folder)
    second.rename(third)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors must hold .*, as model\.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "shard.bin", 3, ""])
def test_an_index_names_files_of_its_folder(tmp_path, file):
    folder = in_shards(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}), "utf-8")
    with pytest.raises(ValueError, match="the file of x must be the name of a safetensors file"):
        load_pretrained(folder)


def test_a_wrong_shape_names_the_array(tmp_path):
    arrays = arrays_of(LLAMA)
    arrays["model.norm.weight"] = np.ones(13, np.float32)
    with pytest.raises(ValueError, match=r"model: model\.norm\.weight must have the shape \[12\], got \[13\]"):
        load_pretrained(written(tmp_path / "model", arrays=arrays))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_we_read_and_what_we_write_it_reads(tmp_path, name):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    fields = CONFIGS[name]
    peer = peer_of(fields, arrays_of(fields))
    peer.save_pretrained(tmp_path / "theirs")
    expected = peer_logits(name, peer)
    model = load_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(logits_of(name, model), expected, atol=1e-4 * np.abs(expected).max())
    save_pretrained(model, fields["model_type"], tmp_path / "ours")
    again = head_of(fields).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_array_equal(peer_logits(name, again), expected)
