"""Pairs from text files and from data sets: what is held out, what is left out, and what is refused."""

import gzip
import io
import logging
import pickle
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from tests.pairs_of_texts import FLAT, NESTED, numbered, pairs, write_rows
from train.tasks.translation import HubTranslation, ParallelFiles


@pytest.fixture
def files(tmp_path):
    """Writes lines to a file and returns the file's path."""

    def write(name, lines):
        data = "".join(f"{line}\n" for line in lines).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def test_files_plain_and_gzip(files):
    task = ParallelFiles(
        source=files("train.de.gz", ["ein Haus", "zwei"]),
        target=files("train.en", ["a house", "two"]),
        validation_source=files("valid.de", ["drei"]),
        validation_target=files("valid.en", ["three"]),
        test_source=files("test.de", ["vier"]),
        test_target=files("test.en", ["four"]),
    )
    assert {split: pairs(rows) for split, rows in task.load().items()} == {
        "train": [("ein Haus", "a house"), ("zwei", "two")],
        "validation": [("drei", "three")],
        "test": [("vier", "four")],
    }


@pytest.mark.parametrize("seed", [0, -7, 2**65])
def test_what_is_not_given_is_held_out(files, seed):
    sources, targets = zip(*numbered(40), strict=True)
    task = ParallelFiles(
        source=files("s", sources), target=files("t", targets), validation_examples=4, test_examples=6, seed=seed
    )
    loaded = {split: pairs(rows) for split, rows in task.load().items()}
    assert {split: len(found) for split, found in loaded.items()} == {"train": 30, "validation": 4, "test": 6}
    assert sorted(pair for found in loaded.values() for pair in found) == sorted(numbered(40))
    assert loaded == {split: pairs(rows) for split, rows in task.load().items()}


def test_seeds_hold_out_different_examples(files):
    source, target = files("s", range(40)), files("t", range(40))
    tasks = [
        ParallelFiles(source=source, target=target, validation_examples=1, test_examples=5, seed=seed)
        for seed in (1, -1)
    ]
    first, second = (task.load()["test"]["source"][:] for task in tasks)
    assert first != second


def test_a_source_that_is_held_out_leaves_training_with_all_its_targets(files):
    source, target = files("s", [number % 10 for number in range(30)]), files("t", range(30))
    loaded = ParallelFiles(source=source, target=target, validation_examples=2, test_examples=3).load()
    train, validation, test = ({*loaded[split]["source"]} for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (5, 2, 3)
    assert len(train | validation | test) == 10
    assert [len(loaded[split]) for split in ("train", "validation", "test")] == [15, 2, 3]


def in_two_forms(count):
    """Pairs whose sources are the same sentences twice, with the umlauts of NFC and of NFD, and other targets."""
    sentences = [f"{number} Häuser für Jürgen" for number in range(count)]
    forms = [[unicodedata.normalize(form, text) for text in sentences] for form in ("NFC", "NFD")]
    return [(text, f"{form} {number}") for form, texts in enumerate(forms) for number, text in enumerate(texts)]


def read_from_files(found, files, folder, **settings):
    sources, targets = zip(*found, strict=True)
    return ParallelFiles(source=files("s", sources), target=files("t", targets), **settings).load()


def read_from_hub(found, files, folder, **settings):
    write_rows(folder / "train.jsonl", [dict(zip(("source", "target"), pair, strict=True)) for pair in found])
    return HubTranslation(name=str(folder), **FLAT | settings).load()


@pytest.mark.parametrize("read", [read_from_files, read_from_hub])
def test_no_held_out_source_stays_in_training_in_another_unicode_form(read, files, folder):
    loaded = read(in_two_forms(30), files, folder, validation_examples=5, test_examples=7)
    train, validation, test = ({*loaded[split]["source"]} for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (18, 5, 7)
    assert len(train | validation | test) == 30
    assert [len(loaded[split]) for split in ("train", "validation", "test")] == [36, 5, 7]


@pytest.mark.parametrize("read", [read_from_files, read_from_hub])
def test_sources_to_hold_out_are_counted_after_normalisation(read, files, folder):
    with pytest.raises(ValueError, match=r"test_examples \(5\) must be .* fewer than the 5 different sources"):
        read(in_two_forms(5), files, folder, validation_examples=1, test_examples=5)


@pytest.mark.parametrize("read", [read_from_files, read_from_hub])
def test_max_characters_counts_after_normalisation(read, files, folder, caplog):
    found = [(unicodedata.normalize("NFD", text), text) for text in ("äöü", "ßäö", "öäü", "äöüß")]
    with caplog.at_level(logging.INFO):
        loaded = read(found, files, folder, max_characters=3, validation_examples=1, test_examples=1)
    assert sorted(text for rows in loaded.values() for text in rows["source"]) == ["ßäö", "äöü", "öäü"]
    assert "3 of 4 pairs kept, 0 have a blank side, 1 are longer" in caplog.text


def test_c1_blank_lines_skip_both_sides_and_are_counted(files, caplog):
    source = files("s", ["a", "", "c", "\u3000 \t", "e", "f"])
    target = files("t", ["A", "B", " ", "D", "E", "F"])
    with caplog.at_level(logging.INFO):
        loaded = ParallelFiles(source=source, target=target, validation_examples=1, test_examples=1).load()
    assert sorted(pair for rows in loaded.values() for pair in pairs(rows)) == [("a", "A"), ("e", "E"), ("f", "F")]
    assert "train: 3 of 6 pairs kept, 3 have a blank side, 0 are longer" in caplog.text


def test_long_pairs_leave_training_only(files, caplog):
    source, target = files("s", ["a", "bbb", "c", "d"]), files("t", ["A", "B", "CCCC", "DD"])
    task = ParallelFiles(
        source=source, target=target, test_source=source, test_target=target, max_characters=2, validation_examples=1
    )
    with caplog.at_level(logging.INFO):
        loaded = task.load()
    assert len(loaded["test"]) == 4
    assert len(loaded["train"]) + len(loaded["validation"]) == 2
    assert "train: 2 of 4 pairs kept, 0 have a blank side, 2 are longer than max_characters (2)" in caplog.text


def test_c7_everything_filtered_names_the_counts(files):
    source, target = files("s", ["", "bbb", "ccc"]), files("t", ["A", "B", "C"])
    counts = r"0 of 3 pairs kept, 1 have a blank side, 2 are longer than max_characters \(2\)"
    with pytest.raises(ValueError, match=f"nothing to use for train: {counts}"):
        ParallelFiles(source=source, target=target, max_characters=2).load()


def test_c7_empty_files(files):
    with pytest.raises(ValueError, match="nothing to use for train: 0 of 0 pairs"):
        ParallelFiles(source=files("s", []), target=files("t", [])).load()


@pytest.mark.parametrize("examples", [0, 5, 1000])
def test_c7_too_few_sources_to_hold_out(files, examples):
    source, target = files("s", "aabcde"), files("t", "abcdef")
    with pytest.raises(ValueError, match=rf"test_examples \({examples}\) must be .* fewer than the 5 "):
        ParallelFiles(source=source, target=target, validation_examples=1, test_examples=examples).load()


def test_no_file_given_names_the_flag(files):
    with pytest.raises(ValueError, match=r"set --task.source to a text file"):
        ParallelFiles().load()
    with pytest.raises(ValueError, match=r"set --task.target to a text file"):
        ParallelFiles(source=files("s", "a")).load()
    both = {"source": files("s", "a"), "target": files("t", "a")}
    with pytest.raises(ValueError, match=r"set --task.validation-target to a text file"):
        ParallelFiles(**both, validation_source=files("v", "a")).load()
    with pytest.raises(ValueError, match=r"set --task.test-source to a text file"):
        ParallelFiles(**both, test_target=files("v", "a")).load()


def test_a_missing_file_names_the_flag(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--task.target: there is no file .*missing"):
        ParallelFiles(source=files("s", "a"), target=tmp_path / "missing").load()


def test_hub_dictionaries_of_languages(folder):
    rows = [{"de": source, "en": target} for source, target in numbered(9)]
    features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    Dataset.from_dict({"translation": rows}, features=features).to_parquet(folder / "train.parquet")
    loaded = HubTranslation(name=str(folder), **NESTED).load()
    assert {split: len(found) for split, found in loaded.items()} == {"train": 4, "validation": 2, "test": 3}
    assert sorted(pair for found in loaded.values() for pair in pairs(found)) == numbered(9)


def test_hub_columns_and_splits(folder):
    for number, split in enumerate(("train", "validation", "test")):
        write_rows(folder / f"{split}.jsonl", [{"id": 1, "source": f"s{number}", "target": f"t{number}"}])
    loaded = HubTranslation(name=str(folder), **FLAT).load()
    assert [pairs(loaded[split]) for split in ("train", "validation", "test")] == [[pair] for pair in numbered(3)]


def test_c6_missing_column_lists_the_columns(folder):
    write_rows(folder / "train.jsonl", [{"source": "a", "text": "b"}])
    with pytest.raises(ValueError, match=r"split 'train', has no column 'target'; it has \['source', 'text'\]"):
        HubTranslation(name=str(folder), **FLAT).load()
    with pytest.raises(ValueError, match="split 'train', has no column 'translation'"):
        HubTranslation(name=str(folder), **NESTED).load()


def test_c6_a_column_missing_in_one_row_is_null_and_named(folder):
    write_rows(folder / "train.jsonl", [{"source": "a", "target": "b"}, {"source": "c"}])
    with pytest.raises(ValueError, match="split 'train', row 1, column 'target': no text in None"):
        HubTranslation(name=str(folder), **FLAT).load()


def test_c6_null_text_names_split_and_row(folder):
    rows = [{"translation": {"de": "a", "en": text}} for text in ("b", "c", None)]
    write_rows(folder / "train.jsonl", rows[:2])
    write_rows(folder / "test.jsonl", rows)
    with pytest.raises(ValueError, match=r"split 'test', row 2, column 'translation': no text for 'en' in .*None"):
        HubTranslation(name=str(folder), **NESTED).load()


def test_c6_mixed_types_are_no_text(folder):
    write_rows(folder / "train.jsonl", [{"source": "a", "target": "b"}, {"source": 3, "target": "d"}])
    with pytest.raises(ValueError, match="split 'train', row 1, column 'source': no text in 3"):
        HubTranslation(name=str(folder), **FLAT).load()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """A pickle that leaves the file `run` behind when it is read."""
    content = pickle.dumps(Trap(tmp_path / "run"))
    pickle.loads(content)
    (tmp_path / "run").unlink()
    return content


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside_data"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_c20_a_loading_script_is_refused_and_not_run(given, beside, folder, tmp_path):
    script = folder / "data.py"
    script.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'run')!r}).touch()\n")
    if beside:
        write_rows(folder / "train.jsonl", [{"source": f"s{number}", "target": "t"} for number in range(5)])
    with pytest.raises(ValueError, match=r"data(\.py)? cannot be used: Dataset scripts are no longer supported"):
        HubTranslation(name=str(folder if given == "folder" else script), **FLAT).load()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train.pkl", "train.pickle", "train.npy", "train.npz", "train.pt"])
@pytest.mark.parametrize("asked", [False, True], ids=["found", "asked_for"])
def test_c20_a_pickle_is_refused_and_not_opened(asked, name, trap, folder, tmp_path):
    (folder / name).write_bytes(trap)
    if asked:
        settings = f"configs:\n- config_name: default\n  data_files: {name}\n  builder_name: pandas\n"
        (folder / "README.md").write_text(f"---\n{settings}---\n")
    with pytest.raises(FileNotFoundError, match="supported"):
        HubTranslation(name=str(folder), **FLAT).load()
    assert not (tmp_path / "run").exists()


def test_c20_a_pickle_in_an_archive_is_not_opened(trap, folder, tmp_path):
    write_tar(folder / "train.tar", {"0.source.pickle": trap, "0.target.pyd": trap})
    with pytest.raises(ValueError, match="no column 'source'"):
        HubTranslation(name=str(folder), **FLAT).load()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train.zip", "train.tar", "train.tar.gz"])
def test_c20_nothing_of_an_archive_is_written_elsewhere(name, folder, tmp_path):
    files = {"../" * 5 + "found.txt": b"a", "../found.txt": b"a", str(tmp_path / "found.txt"): b"a", "in.txt": b"a"}
    if name.endswith(".zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
    else:
        write_tar(folder / name, files)
    with pytest.raises((ValueError, FileNotFoundError)):
        HubTranslation(name=str(folder), **FLAT).load()
    assert not list(tmp_path.rglob("found.txt"))


def write_tar(path, files):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_hub_language_that_is_not_there(folder):
    write_rows(folder / "train.jsonl", [{"translation": {"de": "a", "fr": "b"}}])
    with pytest.raises(ValueError, match=r"row 0, column 'translation': no text for 'en' in .*'fr': 'b'"):
        HubTranslation(name=str(folder), **NESTED).load()


def test_hub_column_of_another_kind(folder):
    write_rows(folder / "train.jsonl", [{"translation": "a"}])
    with pytest.raises(ValueError, match="row 0, column 'translation': no text for 'de' in 'a'"):
        HubTranslation(name=str(folder), **NESTED).load()


def test_hub_without_a_training_split(folder):
    write_rows(folder / "test.jsonl", [{"source": "a", "target": "b"}])
    with pytest.raises(ValueError, match=r"has no split 'train'; it has \['test'\]"):
        HubTranslation(name=str(folder), **FLAT).load()


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({}, "--task.name"),
        ({"name": "x"}, "--task.source-language or --task.source-column"),
        ({"name": "x", "source_column": "a"}, "--task.target-language or --task.target-column"),
    ],
)
def test_hub_settings_that_are_missing_name_their_flags(settings, flag):
    with pytest.raises(ValueError, match=f"set {flag}"):
        HubTranslation(**settings).load()


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_column_and_a_language_of_one_side_exclude_each_other(side, folder):
    write_rows(folder / "train.jsonl", [{"source": "a", "target": "b"}])
    with pytest.raises(ValueError, match=rf"--task.{side}-column \({side}\) and --task.{side}-language \(de\) exclude"):
        HubTranslation(name=str(folder), **FLAT, **{f"{side}_language": "de"}).load()


def test_hub_folder_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        HubTranslation(name=str(folder / "nowhere"), **FLAT).load()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"validation_examples": 7}, r"--task\.validation-examples \(7\) .* --task\.validation-source:"),
        ({"seed": 3}, r"--task\.seed \(3\) .* --task\.validation-source and --task\.test-source:"),
    ],
)
def test_settings_of_held_out_pairs_beside_files_are_refused(given, words, tmp_path):
    files = {f"{split}_{side}": tmp_path for split in ("validation", "test") for side in ("source", "target")}
    with pytest.raises(ValueError, match=words):
        ParallelFiles(**files, **given).check_effect()
    ParallelFiles(**files).check_effect()
    ParallelFiles(**given).check_effect()
