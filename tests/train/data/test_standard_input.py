"""Lines of standard input: when they come, and what they are."""

import io
import os

import pytest

from train.data import standard_input
from train.tasks.lines import read_lines


def test_lines_that_are_there_do_not_wait_for_later_ones(monkeypatch):
    monkeypatch.setattr(standard_input, "_PATIENCE", 0)
    reading, writing = os.pipe()
    with open(reading, "rb") as stream:
        chunks = standard_input.lines_as_they_come(stream, 100)
        for sent, expected in ((b"a\nb\nun", ["a", "b"]), (b"finished\r\n\n", ["unfinished", ""])):
            os.write(writing, sent)
            assert next(chunks) == expected
        os.write(writing, b"end")
        os.close(writing)
        assert list(chunks) == [["end"]]


def test_a_long_input_comes_in_bounded_chunks(monkeypatch):
    monkeypatch.setattr(standard_input, "_BYTES_READ", 10)
    content = io.BytesIO(b"".join(b"%d\n" % number for number in range(100)))
    chunks = list(standard_input.lines_as_they_come(content, 7))
    assert [line for chunk in chunks for line in chunk] == [str(number) for number in range(100)]
    assert max(map(len, chunks)) <= 7 + 10 // 2
    assert len(chunks) > 8


def test_a_line_that_is_no_utf_8_is_named():
    with pytest.raises(ValueError, match=r"line 3 of standard input: byte 1 \(0xff\) is not UTF-8"):
        list(standard_input.lines_as_they_come(io.BytesIO(b"a\nb\n\xff\n"), 100))


@pytest.mark.parametrize("size", [1, 2, 1000], ids=lambda size: f"{size}_bytes_at_a_time")
@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfein Haus\nzwei",
        b"\xef\xbb\xbf\n\xef\xbb\xbfa\n",
        b"\xef\xbb\xbf",
        b"a\r\r\nb\rc\n\n",
        "a\u2028b\x85c\nd".encode(),
        b"",
    ],
)
def test_a_byte_order_mark_and_ends_of_lines_are_as_in_files(content, size, tmp_path, monkeypatch):
    monkeypatch.setattr(standard_input, "_BYTES_READ", size)
    (tmp_path / "text").write_bytes(content)
    lines = [line for chunk in standard_input.lines_as_they_come(io.BytesIO(content), 1) for line in chunk]
    assert lines == list(read_lines(tmp_path / "text"))


def test_a_nul_is_refused_as_in_files():
    with pytest.raises(ValueError, match=r"line 2 of standard input: the line contains NUL"):
        list(standard_input.lines_as_they_come(io.BytesIO(b"a\nb\0\n"), 100))
