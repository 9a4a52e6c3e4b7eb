"""Texts of JSON and CSV come as they stand in the file; a bad row is named by its file and line."""

import csv
import gzip
import io
import json
import logging
import os
import zipfile

import pytest

from tests.pairs_of_texts import FLAT, NESTED, numbered, pairs, write_rows
from train.tasks.translation import HubTranslation


def test_c6_truncated_jsonl_names_the_row(folder):
    (folder / "train.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "c", "tar')
    with pytest.raises(ValueError, match=r"data cannot be read: .* in row 1"):
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
        ("train.jsonl", b'{"source": "a"}\n5\n', "train.jsonl:2: expected an object, got 5, in row 1"),
        ("train.jsonl", b'{"source": "a"}\n{"source": "\xff"}', "train.jsonl:2: byte 0xff is not utf-8"),
        ("train.jsonl", b'{"source": "a"}\n' + b"[" * 100_000, "train.jsonl:2: .* in row 1"),
        (
            "train.jsonl.gz",
            gzip.compress(b'{"source": "a"}\n' * 999, mtime=0)[:-9],
            "train.jsonl.gz:1: damaged gzip data",
        ),
        ("train.csv", b"source,target\na,b\n\nc\n", "train.csv:4: 1 fields, but there are 2 columns"),
        ("train.csv", b"source,target\na,b,c\n", "train.csv:2: 3 fields, but there are 2 columns"),
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
