"""The pictures that are kept show the lines that are kept."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.attention.chart import speeds
from benchmarks.bench.record import read
from benchmarks.decoding.chart import rates as decoding_rates
from benchmarks.training.chart import rates as training_rates

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def texts(svg: Path) -> list[str]:
    """What an SVG says: matplotlib draws letters as shapes and leaves the text beside them as a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return [element.text for element in ElementTree.parse(svg, parser).iter() if element.tag is ElementTree.Comment]


@pytest.mark.parametrize(
    ("name", "chart"), [("cpu", speeds), ("decoding-cpu", decoding_rates), ("training-cpu", training_rates)]
)
def test_pictures_are_redrawn_from_their_lines(name, chart, tmp_path):
    _, svg = chart(read(RESULTS / f"{name}.jsonl"), tmp_path / name)
    assert texts(svg) == texts(RESULTS / f"{name}.svg")
