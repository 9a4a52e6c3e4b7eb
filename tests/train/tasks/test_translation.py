import csv
import gzip
import io
import json
import logging
import os
import pickle
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from train.tasks.translation import HubTranslation, ParallelFiles

FLAT = {"source_column": "source", "target_column": "target", "validation_examples": 1, "test_examples": 1}
NESTED = {"source_language": "de", "target_language": "en", "validation_examples": 2, "test_examples": 3}


@pytest.fixture
def files(tmp_path):
    """Writes lines to a file and returns the file's path."""

    def write(name, lines):
        data = "".join(f"{line}\n" for line in lines).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A local data set, and a cache of its own for what `datasets` makes of it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    path = tmp_path / "data"
    path.mkdir()
    yield path
    datasets.enable_progress_bars()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs(rows):
    return list(zip(rows["source"], rows["target"], strict=True))


def numbered(count):
    return [(f"s{number}", f"t{number}") for number in range(count)]


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


def test_c6_truncated_jsonl_names_the_row(folder):
    (folder / "train.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "c", "tar')
    with pytest.raises(ValueError, match=r"data cannot be read: .* in row 1"):
        HubTranslation(name=str(folder), **FLAT).load()


def test_c6_missing_column_lists_the_columns(folder):
    write_rows(folder / "train.jsonl", [{"source": "a", "text": "b"}])
    with pytest.raises(ValueError, match=r"split 'train', has no column 'target', it has \['source', 'text'\]"):
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


def read_column(texts, file):
    """The sources that a file of one format gives where these are all of its sources."""
    rows = [{"source": text, "target": f"t{number}", "id": number} for number, text in enumerate(texts)]
    if file.name.startswith("train.json"):
        lines = [json.dumps(row) for row in rows]
        content = f"[{', '.join(lines)}]" if file.name == "train.json" else "\n".join(lines)
    else:
        with io.StringIO(newline="") as text:
            writer = csv.DictWriter(text, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
            content = text.getvalue()
    packed = file.suffix == ".gz"
    file.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    task = HubTranslation(name=str(file.parent), **FLAT)
    found = [pair for split in task.load().values() for pair in pairs(split)]
    return [source for source, _ in sorted(found, key=lambda pair: int(pair[1][1:]))]


LITERAL = {
    "dates": ["2024-01-05", "1994-12-31", "2021-02-28", "0001-01-01"],
    "times": ["2024-01-05T10:00:00Z", "2024-01-05 10:00", "2024-01-05", "10:00"],
    "digits": ["05", "5", "5.0", "1e3", "-0"],
    "digits_that_exceed_64_bits": ["12345678901234567890123", "007", "1_000"],
    "missing": ["None", "NA", "null", "nan", "NaN", "N/A", "<NA>"],
    "booleans": ["true", "False", "TRUE"],
    "lines": ['a "b", c', "d\ne", "f\u2028g\x85h", " i "],
}


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.json", "train.jsonl.gz", "train.csv", "train.tsv", "train.csv.gz"]
)
@pytest.mark.parametrize("kind", LITERAL)
def test_texts_of_json_and_csv_come_as_they_stand_in_the_file(kind, name, folder):
    assert read_column(LITERAL[kind], folder / name) == LITERAL[kind]


def test_dates_in_a_dictionary_of_languages_come_as_they_stand(folder):
    dates = [{"de": f"0{day}.01.2024", "en": f"2024-01-0{day}"} for day in range(1, 8)]
    write_rows(folder / "train.jsonl", [{"translation": row} for row in dates])
    loaded = HubTranslation(name=str(folder), **NESTED).load()
    found = sorted(pair for split in loaded.values() for pair in pairs(split))
    assert found == [(row["de"], row["en"]) for row in dates]


def test_dates_of_one_split_come_as_they_stand_beside_words_of_another(folder):
    """`datasets` takes the types of the first file, and casts what it inferred of the others to them."""
    write_rows(folder / "train.jsonl", [{"source": text, "target": "t"} for text in ("a", "b", "c")])
    write_rows(folder / "test.jsonl", [{"source": "2024-01-05", "target": "t"}])
    assert HubTranslation(name=str(folder), **FLAT).load()["test"]["source"][:] == ["2024-01-05"]


@pytest.mark.parametrize("value", [5, 5.0, True, None, ["a"], {"a": "b"}, 2**70], ids=repr)
@pytest.mark.parametrize("others", ["05", 7], ids=repr)
def test_c6_values_of_json_that_are_no_strings_are_no_text(others, value, folder):
    write_rows(folder / "train.jsonl", [{"source": text, "target": "t"} for text in ("a", value, others)])
    with pytest.raises(ValueError, match=rf"row 1, column 'source': no text in .* \({folder}/train.jsonl:2\)"):
        HubTranslation(name=str(folder), **FLAT).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"source": "a", "target": "b"}\n\n{"source": "c", "tar', r"train.jsonl:3: .* in row 1"),
        ("train.jsonl", b'{"source": "a"}\n5\n', "train.jsonl:2: no object, but 5, in row 1"),
        ("train.jsonl", b'{"source": "a"}\n{"source": "\xff"}', "train.jsonl:2: byte 0xff is not utf-8"),
        ("train.jsonl", b'{"source": "a"}\n' + b"[" * 100_000, "train.jsonl:2: .* in row 1"),
        ("train.jsonl.gz", gzip.compress(b'{"source": "a"}\n' * 999)[:-9], "train.jsonl.gz:1: damaged gzip data"),
        ("train.csv", b"source,target\na,b\n\nc\n", "train.csv:4: 1 fields, and there are 2 columns"),
        ("train.csv", b"source,target\na,b,c\n", "train.csv:2: 3 fields, and there are 2 columns"),
        ("train.csv", b'source,target\na,b\n"c,d\n', "train.csv:3: unexpected end of data"),
        ("train.csv", b"source,target\na,b\n\xe4,d\n", "train.csv:3: byte 0xe4 is not utf-8"),
        ("train.csv", b"source,source\na,b\n", "train.csv:1: two columns have the same name: source, source"),
    ],
)
def test_c6_a_bad_row_names_file_and_line(name, content, message, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data cannot be read: {folder}/{message}"):
        HubTranslation(name=str(folder), **FLAT).load()


def test_c4_half_a_character_is_no_text(folder):
    rows = [{"source": text, "target": "t"} for text in ("\N{GRINNING FACE}", "a", "b\ud83d")]
    write_rows(folder / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 2, column 'source': no text in 'b\\ud83d' \(.*train.jsonl:3\)"):
        HubTranslation(name=str(folder), **FLAT).load()


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_c4_a_byte_order_mark_is_no_part_of_a_table(name, folder):
    lines = [f's{number},"t{number}"' for number in range(3)]
    rows = [json.dumps({"source": f"s{number}", "target": f"t{number}"}) for number in range(3)]
    content = "\n".join(rows if name == "train.jsonl" else ["source,target", *lines])
    (folder / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    loaded = HubTranslation(name=str(folder), **FLAT).load()
    assert sorted(pair for rows in loaded.values() for pair in pairs(rows)) == numbered(3)


def test_a_blank_field_of_csv_skips_both_sides_and_is_counted(folder, caplog):
    (folder / "train.csv").write_text("source,target\na,A\n,B\nc,C\nd,D\n")
    with caplog.at_level(logging.INFO):
        loaded = HubTranslation(name=str(folder), **FLAT).load()
    assert sorted(pair for rows in loaded.values() for pair in pairs(rows)) == [("a", "A"), ("c", "C"), ("d", "D")]
    assert "train: 3 of 4 pairs kept, 1 have a blank side" in caplog.text


@pytest.mark.parametrize("settings", ["sep: ;\n  header: 0\n", "sep: ;\n  column_names: [source, target]\n"])
def test_a_configuration_of_csv_is_followed(settings, folder):
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  {settings}---\n")
    head = "source;target\n" if "header" in settings else ""
    (folder / "a.csv").write_text(head + "s0;t0\n's1';t1\n05;NA\n")
    loaded = HubTranslation(name=str(folder), **FLAT).load()
    assert sorted(pair for rows in loaded.values() for pair in pairs(rows)) == [
        ("'s1'", "t1"),
        ("05", "NA"),
        ("s0", "t0"),
    ]


@pytest.mark.parametrize("setting", ["skiprows: 1", "comment: '#'", "nrows: 2", "header: 3"])
def test_a_configuration_of_csv_that_is_not_served_is_refused(setting, folder):
    name, _, value = setting.partition(": ")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  {setting}\n---\n")
    (folder / "a.csv").write_text("source,target\ns0,t0\n")
    shown = value.strip("'")
    with pytest.raises(ValueError, match=rf"a.csv:1: .*{name} \({shown}\)"):
        HubTranslation(name=str(folder), **FLAT).load()


def test_json_in_one_field_and_in_an_archive(folder):
    rows = [{"source": f"s{number}", "target": f"t{number}"} for number in range(3)]
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.json\n  field: rows\n---\n"
    )
    (folder / "a.json").write_text(json.dumps({"version": 1, "rows": rows}, indent=1))
    loaded = HubTranslation(name=str(folder), **FLAT).load()
    assert sorted(pair for split in loaded.values() for pair in pairs(split)) == numbered(3)
    (folder / "README.md").unlink()
    (folder / "a.json").unlink()
    with zipfile.ZipFile(folder / "train.zip", "w") as archive:
        for number, row in enumerate(rows):
            archive.writestr(f"{number}.jsonl", json.dumps(row))
    loaded = HubTranslation(name=str(folder), **FLAT).load()
    assert sorted(pair for split in loaded.values() for pair in pairs(split)) == numbered(3)


@pytest.mark.parametrize("same_time", [False, True], ids=["later", "at_the_same_time"])
def test_c13_a_file_that_changed_is_read_anew(same_time, folder):
    """`datasets` keeps what it has read, and tells by the time of a file whether it is another one."""
    file, task = folder / "train.jsonl", HubTranslation(name=str(folder), **FLAT)
    for letter in "ab":
        write_rows(file, [{"source": f"{letter}{number}", "target": "t"} for number in range(5)])
        os.utime(file, (1e9, 1e9 if same_time or letter == "a" else 2e9))
        texts = sorted(text for rows in task.load().values() for text in rows["source"])
        assert texts == [f"{letter}{number}" for number in range(5)]


def test_c13_nothing_of_a_folder_is_kept(folder, tmp_path):
    write_rows(folder / "train.jsonl", [{"source": f"s{number}", "target": "t"} for number in range(5)])
    HubTranslation(name=str(folder), **FLAT).load()
    assert not list((tmp_path / "cache").rglob("*.arrow"))


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
    with pytest.raises(ValueError, match=r"has no split 'train', it has \['test'\]"):
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
