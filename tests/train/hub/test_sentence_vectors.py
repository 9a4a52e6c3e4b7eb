"""Settings of sentence-transformers, and those that we lack."""

import json

import pytest

from seqattn.models import Pooling
from train.hub.sentence_vectors import Settings, settings_of

KINDS = ["Transformer", "Pooling", "Normalize"]


def written(folder, kinds=KINDS, pooling=None, length=None, path="1_Pooling"):
    modules = [
        {"idx": index, "name": str(index), "path": path if kind == "Pooling" else "", "type": f"a.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    fields = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False} if pooling is None else pooling
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 6} | fields), "utf-8")
    if length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}), "utf-8")
    return folder


def test_a_folder_without_modules_has_the_defaults(tmp_path):
    assert settings_of(tmp_path) == Settings(Pooling.MEAN, True, None)


def test_each_setting_is_read(tmp_path):
    assert settings_of(written(tmp_path)) == Settings(Pooling.MEAN, True, None)
    first = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    assert settings_of(written(tmp_path, KINDS[:2], first, 7)) == Settings(Pooling.FIRST, False, 7)
    assert settings_of(written(tmp_path, pooling={"pooling_mode": "cls"})).pooling is Pooling.FIRST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": [*KINDS, "Dense"]}, r"modules\.json: modules must be .*Normalize, Dense"),
        ({"kinds": []}, r"modules\.json: modules must be"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, r"1_Pooling/config\.json: .*got pooling_mode_max_tokens"),
        ({"pooling": {}}, r"config\.json: .*alone must be true, got none"),
        (
            {"pooling": {"pooling_mode": "lasttoken"}},
            r"config\.json: pooling_mode must be mean or cls, got .*lasttoken",
        ),
        ({"length": 0}, r"sentence_bert_config\.json: max_seq_length"),
        ({"path": "../other"}, r"modules\.json: the folder of Pooling must be inside"),
    ],
)
def test_other_settings_are_refused_with_file_and_value(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings_of(written(tmp_path, **change))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "modules.json").write_text("[", "utf-8")
    with pytest.raises(ValueError, match=r"modules\.json: "):
        settings_of(tmp_path)
    (tmp_path / "modules.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r"modules\.json must hold a JSON list"):
        settings_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True, "max_seq_length": 7}),
        ("config_sentence_transformers.json", {"default_prompt_name": "query", "prompts": {"query": "query: "}}),
    ],
)
def test_what_changes_texts_is_refused(tmp_path, name, fields):
    (written(tmp_path) / name).write_text(json.dumps(fields), "utf-8")
    with pytest.raises(ValueError, match=rf"{name}: .* is one that we lack"):
        settings_of(tmp_path)
    neutral = dict.fromkeys(fields, None) | {"do_lower_case": False}
    (tmp_path / name).write_text(json.dumps(neutral), "utf-8")
    assert settings_of(tmp_path) == Settings(Pooling.MEAN, True, None)


def test_a_transformer_in_a_folder_of_its_own_is_refused(tmp_path):
    modules = json.loads((written(tmp_path) / "modules.json").read_text("utf-8"))
    modules[0]["path"] = "0_BERT"
    (tmp_path / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(ValueError, match=r"modules\.json: the path of Transformer must be empty, got '?\"?0_BERT"):
        settings_of(tmp_path)


def test_a_pooling_that_is_no_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pooling_mode must be mean or cls, got"):
        settings_of(written(tmp_path, pooling={"pooling_mode": ["mean"]}))
