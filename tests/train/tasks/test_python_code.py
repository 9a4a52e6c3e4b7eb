import pytest

from train.tasks.python_code import PythonCode, pieces

TEXT = "import a\n\r\n\fclass B:\n    x = 1\n" + "y = '" + "\u00e4" * 40 + "'\nz\u2028\nlast"


@pytest.mark.parametrize("characters", [1, 2, 7, 10, 11, 45, 46, 47, 48, 1000])
def test_pieces_are_the_text_and_end_with_lines(characters):
    found = list(pieces(TEXT, characters))
    assert "".join(found) == TEXT
    assert all(1 <= len(piece) <= characters for piece in found)
    longest = max(map(len, TEXT.split("\n"))) + 1
    assert characters < longest or all(piece.endswith("\n") for piece in found[:-1])


def test_a_piece_takes_as_many_lines_as_fit():
    found = list(pieces("".join(f"{number}\n" for number in range(10)), 7))
    assert found == ["0\n1\n2\n", "3\n4\n5\n", "6\n7\n8\n", "9\n"]


def test_no_text_no_piece():
    assert list(pieces("", 3)) == []


def test_sources_are_empty_and_every_piece_of_a_file_counts(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.py").write_text(f"same = 1\nsame = 1\nother = {number}\n")
    loaded = PythonCode(tmp_path, characters=9, validation_examples=None, test_examples=None).load()
    assert {source for rows in loaded.values() for source in rows["source"]} == {""}
    assert sum(rows["target"][:].count("same = 1\n") for rows in loaded.values()) == 120


def test_no_room_for_a_character():
    with pytest.raises(ValueError, match=r"characters \(0\) must be an integer of at least 1"):
        PythonCode(characters=0)
