import keyword

import pytest

from train.tasks.python_tags import LABELS, PythonTags, tag


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("x = 1 # a", "nwowdwrrr"),
        ("for forty in ord: or_ = a.or_", "kkkwnnnnnwkkwbbbowaaawownoaaa".replace("aaawown", "nnnwown")),
        ("def len(self): pass", "kkkwfffonnnnoowkkkk"),
        ("class int(a.b): x: int", "kkkkkwccconoaoownowbbb"),
        ("a \\\n+ b.print(print)", "nwwwowno" + "aaaaa" + "o" + "bbbbb" + "o"),
        ("f'{len(x)} {y:>{w}}'.a", "s" * 20 + "oa"),
        ("rb'a' '''b\nc''' ...", "sssss" + "w" + "ssssssssss"[:9] + "w" + "ooo"),
        (
            "@a.b\nasync def f(): await g",
            "onoa" + "w" + "kkkkk" + "w" + "kkk" + "w" + "f" + "ooo" + "w" + "kkkkk" + "wn",
        ),
        ("\u00e4 = '\U0001f600' # \u00f6", "nwowssswrrr"),
        ("x = 1\n\f\ny = 2", "nwowdwwwnwowd"),
        ("(a.#c\nb)", "onorrwao"),
        ("exit(1j, 0x_f, help)", "nnnnoddowddddownnnno"),
    ],
)
def test_every_character_has_its_label(text, labels):
    found, ends = tag(text)
    assert found == labels
    assert len(found) == len(text)
    assert set(found) <= LABELS.keys()
    assert ends[-1] == len(text)


def test_statements_end_where_no_bracket_or_string_is_open():
    text = "f(1,\n  2)\n# c\n\nx = '''\n'''\nif a:\n    b = 1; c = 2\n"
    pieces = [text[start:end] for start, end in zip([0, *tag(text)[1]], tag(text)[1], strict=False)]
    assert pieces == ["f(1,\n  2)\n", "# c\n", "\n", "x = '''\n'''\n", "if a:\n", "    b = 1; c = 2\n"]


@pytest.fixture
def root(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.py").write_text(
            f"\n\nx_{number} = 1\n# \u00e4\nlong_{number} = 'more than fits'\ny = {number}\nz = '{number:10}'\n"
        )
    (tmp_path / "no_python.py").write_text("x = (")
    return tmp_path


def test_pieces_are_whole_statements_and_labels_as_long(root):
    loaded = PythonTags(root, characters=18, validation_examples=None, test_examples=None).load()
    sources = [source for rows in loaded.values() for source in rows["source"]]
    for rows in loaded.values():
        for source, target in zip(rows["source"], rows["target"], strict=True):
            assert target == tag(source)[0]
    assert sorted(sources) == sorted(
        f"{text}" for n in range(60) for text in (f"x_{n} = 1\n# \u00e4", f"y = {n}", f"z = '{n:10}'")
    )


def test_few_labels_are_some_of_many(root):
    many = PythonTags(root, characters=18).load()["train"]["source"][:]
    few = PythonTags(root, characters=18, train_examples=5).load()["train"]["source"][:]
    assert few == many[:5]


def test_keywords_are_those_of_the_language():
    for word in keyword.kwlist:
        assert tag(f"x {word}\n")[0][2:-1] == "k" * len(word)


def test_what_follows_a_dot_is_an_attribute_but_for_import():
    assert tag("x.real\n")[0] == "noaaaaw"
    assert tag("from . import x\n")[0] == "kkkkwowkkkkkkwnw"
    assert tag("from ..a import x\n")[0] == "kkkkwooawkkkkkkwnw"


def test_no_room_for_a_character():
    with pytest.raises(ValueError, match=r"characters \(0\) must be an integer of at least 1"):
        PythonTags(characters=0)
