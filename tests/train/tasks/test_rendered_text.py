"""Pictures of strings: no string twice, the same recipe the same picture, and the text really in it."""

import dataclasses
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from train.tasks.rendered_text import FONTS, Recipe, RenderedText, render

SMALL = RenderedText(train_examples=150, validation_examples=20, test_examples=17, min_length=2, max_length=5)
PLAIN = Recipe("k3f", "DejaVuSans", 18, 0.0, 0.0, 0.0, 0.0, 1.0, 7, 31, 67)


def _ink(**changes) -> np.ndarray:
    """How dark each pixel is, from 0 to 1."""
    return 1 - render(str(dataclasses.replace(PLAIN, **changes))) / 255


def test_a_recipe_tells_what_is_written_and_no_string_occurs_twice():
    splits = SMALL.load()
    texts = [text for rows in splits.values() for text in rows["target"]]
    assert len(texts) == len(set(texts)) == 187
    assert {len(text) for text in texts} == {2, 3, 4, 5}
    for rows in splits.values():
        recipes = [Recipe.parse(recipe) for recipe in rows["source"]]
        assert [recipe.text for recipe in recipes] == rows["target"][:]
        assert [str(recipe) for recipe in recipes] == rows["source"][:]


def test_fonts_are_about_equally_likely_and_come_with_matplotlib():
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    assert all((folder / f"{font}.ttf").is_file() for font in FONTS)
    found = Counter(Recipe.parse(recipe).font for recipe in SMALL.load()["train"]["source"])
    assert set(found) == set(FONTS)


def test_a_recipe_is_one_picture():
    recipe = SMALL.load()["test"]["source"][0]
    first = render(recipe)
    assert render(recipe) is first
    render.cache_clear()
    np.testing.assert_array_equal(render(recipe), first)
    assert (first.shape, first.dtype) == ((32, 128), np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1


@pytest.mark.parametrize("font", FONTS)
def test_every_font_writes_every_character_apart(font):
    pictures = {_ink(text=letter, font=font, size=24, seed=0).tobytes() for letter in SMALL.alphabet}
    assert len(pictures) == len(SMALL.alphabet)


def test_the_text_stands_inside_the_picture_also_where_it_must_shrink():
    for changes in ({}, {"text": "wwwwwwwwww"}, {"text": "wwwwwwwwww", "angle": 5.0, "shear": 0.3}, {"size": 60}):
        for seed in range(3):
            ink = _ink(seed=seed, **changes)
            assert ink.sum() > 10
            assert not np.any(np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]]) > 0.02)


def test_a_text_is_turned_against_the_clock_and_leans_to_the_right():
    line = {"text": "------", "size": 14}
    rows, columns = np.nonzero(_ink(**line, angle=10.0) > 0.3)
    assert np.degrees(np.arctan(-np.polyfit(columns, rows, 1)[0])) == pytest.approx(10, abs=2)
    rows, columns = np.nonzero(_ink(text="l", size=24, shear=0.3) > 0.3)
    assert -np.polyfit(rows, columns, 1)[0] == pytest.approx(0.3, abs=0.1)


def test_an_undistorted_text_is_what_pillow_writes():
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    face = ImageFont.truetype(path, PLAIN.size, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = map(int, face.getbbox(PLAIN.text))
    image = Image.new("L", (PLAIN.width, PLAIN.height))
    ImageDraw.Draw(image).text((10, 5), PLAIN.text, fill=255, font=face)
    expected = np.asarray(image)[5 + top : 5 + bottom, 10 + left : 10 + right] / 255
    rows, columns = np.nonzero(_ink() > 0.3)
    assert abs(np.ptp(rows) + 1 - expected.shape[0]) <= 2
    assert abs(np.ptp(columns) + 1 - expected.shape[1]) <= 2
    assert _ink().sum() == pytest.approx(expected.sum(), rel=0.05)


def test_noise_blur_and_contrast_do_what_they_say():
    ink = _ink()
    blank = ink == 0
    assert _ink(noise=0.1, contrast=0.4)[blank].std() == pytest.approx(0.1, rel=0.1)
    pale = _ink(contrast=0.4)
    assert pale.min() == pytest.approx(0.3, abs=0.01)
    assert pale.max() == pytest.approx(0.7, abs=0.05)
    blurred = _ink(blur=1.0)
    assert np.abs(np.diff(blurred, axis=1)).max() < 0.7 * np.abs(np.diff(ink, axis=1)).max()
    assert blurred.sum() == pytest.approx(ink.sum(), rel=0.05)


def test_without_distortion_only_font_size_and_place_differ():
    task = dataclasses.replace(SMALL, distortion=0.0)
    for recipe in map(Recipe.parse, task.load()["test"]["source"]):
        assert (recipe.angle, recipe.shear, recipe.noise, recipe.blur, recipe.contrast) == (0, 0, 0, 0, 1)


def test_a_seed_decides():
    first, same, other = (dataclasses.replace(SMALL, seed=seed).load()["test"]["source"][:] for seed in (3, 3, -3))
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_length": 0}, r"min_length \(0\) must be an integer from 1 to max_length \(5\)"),
        ({"alphabet": "aab"}, "must have at least one character, none twice"),
        ({"alphabet": "a|b"}, r"and not '\|'"),
        ({"alphabet": "ab\u0308"}, r"must have characters that NFC keeps, but has 'a\u0308'"),
        ({"alphabet": "ab\u212b"}, r"must have characters that NFC keeps, but has 'a\u212b'"),
        ({"height": 4}, r"height \(4\) and width \(128\) must be more than 4 pixels"),
        ({"distortion": 1.5}, r"distortion \(1.5\) must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_more_examples_than_strings():
    with pytest.raises(ValueError, match="lengths 1 to 2 give 6 strings, fewer than 187 examples"):
        dataclasses.replace(SMALL, alphabet="ab", min_length=1, max_length=2).load()


def test_what_is_no_recipe_is_refused():
    for text in ("", "k3f", str(PLAIN).replace("x", "-"), str(PLAIN).replace("18", "big")):
        with pytest.raises(ValueError, match="is not the recipe of a picture"):
            render(text)
    with pytest.raises(ValueError, match=r"font \(Comic\) must be one of DejaVuSans, "):
        render(str(dataclasses.replace(PLAIN, font="Comic")))
