from collections import Counter

import pytest

from train.tasks.code_topics import PACKAGES, CodeTopics


@pytest.fixture
def root(tmp_path):
    for package in ("red", "green", "blue"):
        (tmp_path / package / "deep").mkdir(parents=True)
        for number in range(60):
            text = "".join(f"{package}_{number} = {line}\n" for line in range(7))
            (tmp_path / package / "deep" / f"{number}.py").write_text("\n" * 6 + text)
    (tmp_path / "red.py").write_text("x = 1\n" * 9)
    return tmp_path


def test_pieces_of_so_many_lines_to_their_package(root):
    task = CodeTopics(root, packages=("red", "blue"), lines=3, validation_examples=None, test_examples=None)
    loaded = task.load()
    for rows in loaded.values():
        for source, target in zip(rows["source"], rows["target"], strict=True):
            assert source.startswith(target)
            assert source.count("\n") == 3
    total = sum((Counter(rows["target"]) for rows in loaded.values()), Counter())
    assert total == {"red": 120, "blue": 120}


def test_packages_that_are_not_there_or_no_choice_are_refused(root):
    with pytest.raises(ValueError, match="no training examples for black, white: the folder does not exist"):
        CodeTopics(root, packages=("red", "white", "black"), lines=3).load()
    for packages in ((), ("red",), ("red", "blue", "red")):
        with pytest.raises(ValueError, match="must be two or more different names"):
            CodeTopics(packages=packages)
    with pytest.raises(ValueError, match=r"lines \(0\) must be an integer of at least 1"):
        CodeTopics(lines=0)


def test_every_split_of_the_standard_library_has_every_package():
    for rows in CodeTopics(validation_examples=None, test_examples=None).load().values():
        assert set(rows["target"]) == set(PACKAGES)
