"""Pictures that are drawn without a warning, whatever the tokens, and that show what they should."""

import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.image import imread

from train.reports import plots
from train.reports.plots import attention_map, learning_curves

RUN = [{"kind": "train", "step": step, "loss": 3.0 / step, "learning_rate": 1e-3} for step in range(1, 200)]
RUN += [{"kind": "validation", "step": step, "loss": 0.1, "exact_match": step / 200} for step in (50, 100, 150)]


def texts(svg):
    """What an SVG says: matplotlib draws letters as shapes and leaves the text beside them as a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    elements = ElementTree.parse(svg, parser).iter()
    return [element.text.strip() for element in elements if element.tag is ElementTree.Comment]


def test_curves_are_a_png_and_an_svg_with_units_and_a_legend(tmp_path):
    png, svg = learning_curves(RUN, tmp_path / "curves.v1")
    assert (png.name, svg.name) == ("curves.v1.png", "curves.v1.svg")
    assert imread(png).std() > 0
    shown = [
        "loss (nats per token)",
        "training, running mean",
        "validation",
        "exact match (%)",
        "learning rate",
        "step",
    ]
    assert set(shown) <= set(texts(svg))
    assert "BLEU" not in texts(svg)


def test_curves_show_bleu_when_there_is_one(tmp_path):
    _, svg = learning_curves([*RUN, {"kind": "validation", "step": 150, "bleu": 31.5}], tmp_path / "curves")
    assert {"BLEU", "exact match (%)"} <= set(texts(svg))


@pytest.mark.parametrize(
    "rows",
    [
        RUN[:1],
        RUN[-1:],
        [{"kind": "train", "step": 1, "loss": float("nan"), "learning_rate": 0.0}],
        [{"kind": "train", "step": step, "loss": 1 - step} for step in range(3)],
        [{**RUN[0], "loss": float("inf")}, *RUN[1:], {"kind": "validation", "step": 9, "loss": float("nan")}],
        [{"kind": "validation", "step": 1, "bleu": 0.0}],
    ],
    ids=["one step", "one validation", "only NaN", "losses of 0 and below", "infinity and NaN", "a score alone"],
)
def test_any_run_can_be_drawn(tmp_path, rows):
    png, _ = learning_curves(rows, tmp_path / "curves")
    assert imread(png).std() > 0


def test_a_run_without_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of 1 rows of metrics"):
        learning_curves([{"step": 1, "kind": "note"}], tmp_path / "curves")


def test_smoothing_is_the_mean_of_what_is_finite():
    values = np.full(500, 2.0)
    values[[100, 101]] = np.nan
    np.testing.assert_allclose(plots._smooth(values), 2.0)
    assert np.isnan(plots._smooth(np.full(3, np.nan))).all()
    ramp = np.arange(500.0)
    np.testing.assert_allclose(plots._smooth(ramp)[20:-20], ramp[20:-20])


def test_the_same_picture_gives_the_same_files(tmp_path):
    first, second = (learning_curves(RUN, tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_map_names_its_tokens(tmp_path):
    weights = jnp.eye(3, 5, dtype=jnp.bfloat16)
    _, svg = attention_map(weights, ["5", " ", "mai", r"$\a$", "ß"], ["1", "9", "[END]"], tmp_path / "m", title="5 mai")
    assert {"5", "␣", "mai", r"$\a$", "ß", "1", "9", "[END]", "source", "target", "5 mai"} <= set(texts(svg))
    assert "head 0" not in texts(svg)


@pytest.mark.parametrize("heads", [1, 2, 5, 8])
def test_a_map_has_a_panel_for_each_head_and_names_tokens_at_the_edges_only(tmp_path, heads):
    _, svg = attention_map(np.ones((heads, 2, 3)), ["a", "b", "c"], ["x", "y"], tmp_path / "map")
    shown = texts(svg)
    assert sum(text.startswith("head ") for text in shown) == (heads if heads > 1 else 0)
    columns, rows = {1: (1, 1), 2: (2, 1), 5: (3, 2), 8: (3, 3)}[heads]
    assert (shown.count("b"), shown.count("y")) == (columns, rows)


def test_a_map_has_sources_from_left_to_right_and_targets_from_top_to_bottom_even_beside_nan(tmp_path):
    def middle_of_blue(target, source):
        weights = np.zeros((2, 2))
        weights[target, source], weights[source, target] = 1, np.nan
        picture = imread(attention_map(weights, ["a", "b"], ["x", "y"], tmp_path / "map")[0])
        beside_the_scale = picture[:, : picture.shape[1] * 3 // 4]
        return np.argwhere(beside_the_scale[..., 2] - beside_the_scale[..., 0] > 0.3).mean(axis=0)

    (top, right), (bottom, left) = middle_of_blue(target=0, source=1), middle_of_blue(target=1, source=0)
    assert top < bottom
    assert left < right


def test_long_tokens_are_cut_and_labels_of_long_lists_thinned(tmp_path):
    source, target = [f"{number:03d}" for number in range(300)], ["internationalisation"] * 2
    _, svg = attention_map(np.ones((2, 300)), source, target, tmp_path / "map")
    shown = texts(svg)
    assert "internationali…" not in shown
    assert shown.count("internationa…") + shown.count("international…") == 2
    assert 30 < len(set(source) & set(shown)) < 110


@pytest.fixture
def only_own_font(monkeypatch):
    """A machine with no fonts but matplotlib's own."""
    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


@pytest.mark.usefixtures("only_own_font")
def test_letters_that_no_font_has_are_written_as_code_points(tmp_path):
    _, svg = attention_map(np.ones((1, 4)), ["日", "я", "\n", "😀日"], ["年"], tmp_path / "map", title="日付")
    assert {"U+65E5", "я", "\\n", "U+5E74", "U+65E5U+4ED8"} <= set(texts(svg))


def test_any_script_is_drawn_without_a_warning(tmp_path):
    tokens = ["日", "한", "ไ", "ह", "א", "م", "ქ", "😀", "\t", "\ufffd", "\x00"]
    png, _ = attention_map(np.eye(11), tokens, tokens, tmp_path / "map", title="".join(tokens[:8]))
    assert imread(png).std() > 0


@pytest.mark.parametrize("weight", [0, np.nan, np.inf])
def test_weights_and_tokens_of_nothing_are_drawn(tmp_path, weight):
    png, _ = attention_map(np.full((2, 1), weight), [""], ["", ""], tmp_path / "map")
    assert imread(png).std() > 0


@pytest.mark.parametrize("shape", [(3, 2), (2,), (1, 1, 2, 3), (0, 2, 3)])
def test_weights_that_do_not_fit_the_tokens_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"must be \[T, S\] or \[N, T, S\] with T, S = \(2, 3\)"):
        attention_map(np.ones(shape), ["a", "b", "c"], ["x", "y"], tmp_path / "map")
    assert not list(tmp_path.iterdir())


def test_a_long_title_takes_several_lines(tmp_path):
    title = " ".join(["a man in an orange hat"] * 6)
    _, svg = attention_map(np.eye(11), "abcdefghijk", "lmnopqrstuv", tmp_path / "map", title=title)
    lines = [text for text in texts(svg) if "orange" in text or "man" in text]
    assert " ".join(lines) == title
    assert len(lines) > 1
    assert max(map(len, lines)) < 60
