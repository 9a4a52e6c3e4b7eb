"""JSON files of others: whatever is no object is refused by the name of the file."""

import pytest

from train.data import json_files
from train.data.json_files import read_object


def test_an_object_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"ä": [1]}', "utf-8")
    assert read_object(path) == {"ä": [1]}
    with pytest.raises(FileNotFoundError, match=r"b\.json"):
        read_object(tmp_path / "b.json")


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_anything_else_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json(: | must hold a JSON object, got a (list|int|NoneType))"):
        read_object(path)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{} ", "utf-8")
    monkeypatch.setattr(json_files, "LARGEST", 2)
    with pytest.raises(ValueError, match=r"a\.json must have at most 2 bytes, got 3"):
        read_object(path)
