"""What tests read from pages is found, and what is false on them is caught."""

import pytest

from tests.pages import dead_links, measured, unsaid, wrong_entries

TREE = """
seqattn/          arrays in, arrays out
  masks.py        who may look: Mask.dense, a.py/b.py
  nn/             flax.nnx modules
    blocks.py  embedding.py   two files
  kernels/        not opened
train/            not opened either
README.md
"""
FILES = {"seqattn/__init__.py", "seqattn/masks.py", "seqattn/nn/blocks.py", "seqattn/nn/embedding.py"}
FILES |= {"seqattn/kernels/reference.py", "train/reports/metrics.py", "README.md"}


def test_a_true_map_is_accepted():
    drawn = (
        TREE.replace("\n  masks", "\n├── masks")
        .replace("\n  nn", "\n├── nn")
        .replace("\n    blocks", "\n│   └── blocks")
    )
    assert not wrong_entries(TREE, FILES)
    assert not wrong_entries(drawn.replace("\n  kernels", "\n└── kernels"), FILES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (FILES | {"seqattn/nn/novelty.py"}, "seqattn/nn/novelty.py is not shown"),
        (FILES | {"seqattn/models/seq2seq.py"}, "seqattn/models is not shown"),
        (FILES | {"benchmarks/attention.py"}, "benchmarks is not shown"),
        (FILES - {"seqattn/masks.py"}, "seqattn/masks.py is not there"),
        (FILES - {"train/reports/metrics.py"}, "train is not there"),
        (FILES - {"README.md"}, "README.md is not there"),
    ],
)
def test_a_false_map_is_caught(files, message):
    assert wrong_entries(TREE, files) == [message]


def test_a_dead_link_is_caught(tmp_path):
    (tmp_path / "there.png").touch()
    text = '![a](there.png) [b](gone.md#part) <img src="lost.svg"> [c](https://jax.dev) [d](#part)'
    assert dead_links(text, tmp_path) == ["gone.md", "lost.svg"]


def test_a_figure_that_was_not_measured_is_caught():
    header = "| system | command | time | result |\n|---|---|---|---|\n"
    first, second = (
        f"| ours | `dates --seed {seed}` | {time} | {share} % of 1,000 |\n"
        for seed, time, share in ((3, "4 min 5 s", "98.9"), (4, "0 min 7 s", "62.3"))
    )

    def wrong(text, said):
        return unsaid([figures for _, figures in measured(header + text)["dates"]], said)

    said = "Time: 4 min\n5 s on 2 CPU cores, and 0 min 7 s.\nResult: 98.94 % of 1,000 dates, and 62.3 % of 1,000."
    assert wrong(first + second, said) == []
    assert wrong(first, said.replace("98.94", "98.84").replace("4 min", "14 min"))[0] == "4 min 5 s"
    assert wrong(first, said.replace("98.94", "98.84").replace("cores", "98.9")) == ["98.9", "1000"]
    assert wrong(second + first, said) == ["4 min 5 s", "98.9", "1000"]
    with pytest.raises(AssertionError, match="no experiment"):
        measured(header + first.replace("`dates", "`date"))
