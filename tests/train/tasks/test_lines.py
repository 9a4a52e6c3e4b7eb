import gzip

import pytest

from train.tasks.lines import ParallelLines, read_lines


@pytest.fixture
def written(tmp_path):
    def write(data, name="text"):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def test_plain_and_gzip_files_hold_the_same_lines(written):
    data = "ein Haus\nzwei Häuser\n".encode()
    plain, packed = written(data), written(gzip.compress(data), "text.de.gz")
    assert list(read_lines(plain)) == list(read_lines(packed)) == ["ein Haus", "zwei Häuser"]


def test_c2_line_counts_differ_names_the_first_line(written):
    source, target = written("a\nb\nc\nd\n", "s"), written("A\nB\n", "t")
    with pytest.raises(ValueError, match=r"s has 4 lines and .*t has 2: .*s:3 has no partner: 'c'"):
        list(ParallelLines(source, target))
    with pytest.raises(ValueError, match=r"t has 2 lines and .*s has 4: .*s:3 has no partner: 'c'"):
        list(ParallelLines(target, source))


def test_c3_only_a_newline_ends_a_line(written):
    line = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    assert list(read_lines(written(f"{line}\nnext\n"))) == [line, "next"]


def test_c4_carriage_returns_mark_and_missing_newline_are_no_text(written):
    marked = written(b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree")
    assert list(read_lines(marked)) == ["one", "two", "", "three"]


def test_c4_a_byte_order_mark_inside_the_text_stays(written):
    assert list(read_lines(written("a\n\ufeffb\n"))) == ["a", "\ufeffb"]


def test_c4_an_empty_file_has_no_line(written):
    assert list(read_lines(written(b""))) == []
    assert list(read_lines(written(b"\n"))) == [""]


def test_c4_nul_names_file_and_line(written):
    with pytest.raises(ValueError, match=r"text:2: the line contains NUL"):
        list(read_lines(written(b"a\nb\0c\n")))


def test_c5_bytes_that_are_not_utf8_name_file_and_line(written):
    with pytest.raises(ValueError, match=r"latin:3: byte 2 \(0xe4\) is not UTF-8"):
        list(read_lines(written("a\nb\nHäuser\n".encode("latin-1"), "latin")))


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_utf16_with_a_byte_order_mark_is_named(written, codec):
    name = codec.removesuffix("-be").upper()
    with pytest.raises(ValueError, match=rf"wide:1: {name} by its byte order mark, .*iconv -f {name} -t UTF-8"):
        list(read_lines(written(("\ufeff" * codec.endswith("-be") + "a\nb\n").encode(codec), "wide")))


def test_gzip_data_without_the_ending_are_named(written):
    with pytest.raises(ValueError, match=r"packed:1: gzip data, not text: rename the file to end in \.gz"):
        list(read_lines(written(gzip.compress(b"a\nb\n"), "packed")))


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_c5_utf16_without_a_mark_is_found_by_its_nul(written, codec):
    with pytest.raises(ValueError, match="UTF-16"):
        list(read_lines(written("a\nb\n".encode(codec))))


def test_c5_an_encoded_surrogate_is_not_utf8(written):
    with pytest.raises(ValueError, match=r"text:1: byte 1 \(0xed\) is not UTF-8"):
        list(read_lines(written(b"\xed\xa0\x80\n")))


def test_c6_damaged_gzip_names_file_and_line(written):
    packed = gzip.compress("".join(f"{number}\n" for number in range(9999)).encode())
    flipped = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
    for number, data in enumerate((packed[:-30], flipped, b"no gzip", packed[:100] + b"\xff" * 100)):
        with pytest.raises(ValueError, match=rf"{number}.gz:\d+: damaged gzip data"):
            list(read_lines(written(data, f"{number}.gz")))
