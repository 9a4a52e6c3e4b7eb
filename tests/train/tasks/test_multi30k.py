import gzip

import datasets
import pytest

from train.tasks import Multi30k, translation

SPLITS = {"train": ["a dog", "a cat", "a cow"], "val": ["two dogs"], "test_2016_flickr": ["two cats"]}


@pytest.fixture
def data(tmp_path):
    """A folder of the files, those of one language packed."""
    for name, lines in SPLITS.items():
        (tmp_path / f"{name}.en").write_text("".join(f"{line}\n" for line in lines))
        german = "".join(f"{line} auf Deutsch\n" for line in lines)
        (tmp_path / f"{name}.de.gz").write_bytes(gzip.compress(german.encode()))
    return tmp_path


@pytest.mark.parametrize("source", ["en", "de"])
def test_a_folder_of_files_in_either_direction(source, data):
    loaded = Multi30k(data=data, source=source).load()
    for split, lines in zip(("train", "validation", "test"), SPLITS.values(), strict=True):
        english, german = lines, [f"{line} auf Deutsch" for line in lines]
        assert list(loaded[split]["source"]) == (english if source == "en" else german)
        assert list(loaded[split]["target"]) == (german if source == "en" else english)


def test_a_file_that_is_missing_is_named(data):
    (data / "val.de.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"--task.data: .* contains neither val.de.gz nor val.de"):
        Multi30k(data=data).load()


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--task.data: there is no folder .*nowhere"):
        Multi30k(data=tmp_path / "nowhere").load()


@pytest.mark.parametrize("setting", [{"revision": "v1"}, {"name": "other/multi30k"}])
def test_settings_of_the_hub_beside_a_folder_are_refused(setting, data):
    with pytest.raises(ValueError, match=r"--task.data \(.*\) excludes --task.name \(.*\) and --task.revision \(.*\)"):
        Multi30k(data=data, **setting).load()


def test_without_a_folder_it_comes_from_the_hub(tmp_path, monkeypatch):
    for split in translation.SPLITS:
        (tmp_path / f"{split}.jsonl").write_text('{"en": "a dog", "de": "ein Hund"}\n{"en": "2", "de": "zwei"}\n')
    asked, load = [], datasets.load_dataset_builder

    def load_dataset_builder(name, config, revision, cache_dir):
        asked.append((name, config, revision, cache_dir))
        return load(str(tmp_path), cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    loaded = Multi30k(source="de", revision="v1").load()
    assert asked == [("bentrevett/multi30k", None, "v1", None)]  # in the cache of the user
    assert loaded["validation"][0] == {"source": "ein Hund", "target": "a dog"}
    assert loaded["train"][1] == {"source": "zwei", "target": "2"}
