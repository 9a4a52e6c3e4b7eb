"""Pictures of strings in many fonts, turned, sheared, blurred and noisy: to be read."""

import dataclasses
import itertools
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_lowercase, digits

import matplotlib
import numpy as np
from datasets import Dataset
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from seqattn.checks import check_integer, check_number
from train.tasks.task import DrawnTask, generator

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
"""Fonts that come with matplotlib."""

_MARGIN = 2  # pixels that no undistorted letter touches


@dataclass(frozen=True)
class Recipe:
    """All that decides a picture, as one line of text: `str(recipe)` and `Recipe.parse`.

    >>> recipe = Recipe.parse("k3f|DejaVuSans|18|-2.5|0.1|0.05|0.5|0.8|7|32x128")
    >>> recipe.font, recipe.height, str(recipe)
    ('DejaVuSans', 32, 'k3f|DejaVuSans|18|-2.5|0.1|0.05|0.5|0.8|7|32x128')
    """

    text: str
    """What is written."""
    font: str
    """One of `FONTS`."""
    size: int
    """Of the letters, in pixels; smaller where the text would not fit."""
    angle: float
    """By which the text is turned, in degrees against the clock."""
    shear: float
    """Pixels by which a line leans to the right for each pixel of height."""
    noise: float
    """Standard deviation of the noise of each pixel; white is 1 and black 0."""
    blur: float
    """Standard deviation of the blur, in pixels."""
    contrast: float
    """Paper less ink, from 0 to 1; both are as far from middle grey."""
    seed: int
    """Decides where in the picture the text stands, and the noise."""
    height: int
    """Of the picture, in pixels."""
    width: int
    """Of the picture, in pixels."""

    def __str__(self) -> str:
        *parts, height, width = dataclasses.astuple(self)
        return "|".join(str(part) for part in (*parts, f"{height}x{width}"))

    @staticmethod
    def parse(recipe: str) -> "Recipe":
        """The recipe of a line; ValueError where it is none."""
        try:
            text, font, size, *shape, seed, picture = recipe.split("|")
            angle, shear, noise, blur, contrast = map(float, shape)
            letters, number, height, width = map(int, (size, seed, *picture.split("x")))
        except ValueError:
            raise ValueError(f"{recipe!r} is no recipe of a picture, such as {_EXAMPLE!r}") from None
        return Recipe(text, font, letters, angle, shear, noise, blur, contrast, number, height, width)


_EXAMPLE = str(Recipe("k3f", "DejaVuSans", 18, -2.5, 0.1, 0.05, 0.5, 0.8, 7, 32, 128))


@dataclass(frozen=True)
class RenderedText(DrawnTask):
    """Random strings of letters and digits: "source" is the `Recipe` of a picture, "target" what is written there.

    Every length is equally likely. No string occurs twice, within a split or between splits. `render` draws a recipe.
    """

    train_examples: int = 20_000
    """examples to train on"""
    min_length: int = 3
    """characters of the shortest strings"""
    max_length: int = 10
    """characters of the longest strings"""
    alphabet: str = ascii_lowercase + digits
    """characters that strings are made of"""
    height: int = 32
    """of the pictures, in pixels"""
    width: int = 128
    """of the pictures, in pixels"""
    distortion: float = 1.0
    """how much pictures are distorted: 0 for not at all, 1 for up to 5 degrees, a shear of 0.3, a blur of a pixel, a
    noise of 0.1 and a contrast of 0.4"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("min_length", self.min_length, 1, self.max_length, maximum_name="max_length")
        if len(set(self.alphabet)) < len(self.alphabet) or not self.alphabet or "|" in self.alphabet:
            raise ValueError(f"alphabet ({self.alphabet!r}) must name characters once each, and not the mark '|'")
        for two in map("".join, itertools.product(self.alphabet, repeat=2)):
            # Two different strings could otherwise be one text in NFC, and be in two splits.
            if not unicodedata.is_normalized("NFC", two):
                raise ValueError(f"alphabet ({self.alphabet!r}) must be of characters that NFC keeps, and not {two!r}")
        if min(self.height, self.width) <= 2 * _MARGIN:
            raise ValueError(f"height ({self.height}) and width ({self.width}) must be more than {2 * _MARGIN} pixels")
        check_number("distortion", self.distortion, minimum=0, maximum=1)

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError where there are fewer strings than examples.

        >>> task = RenderedText(train_examples=10, validation_examples=1, test_examples=1)
        >>> task.load()["test"][0]["target"]
        'wsjlbcag3'
        """
        strings = sum(len(self.alphabet) ** length for length in range(self.min_length, self.max_length + 1))
        if self.examples > strings:
            raise ValueError(
                f"lengths {self.min_length} to {self.max_length} give {strings} strings, "
                f"fewer than {self.examples} examples"
            )
        random = generator(self.seed)
        texts: dict[str, None] = {}
        while len(texts) < self.examples:
            length = random.integers(self.min_length, self.max_length, endpoint=True)
            texts["".join(self.alphabet[index] for index in random.integers(len(self.alphabet), size=length))] = None
        return self.cut([(str(self._recipe(text, random)), text) for text in texts])

    def _recipe(self, text: str, random: Generator) -> Recipe:
        def draw(low: float, high: float) -> float:
            return round(self.distortion * float(random.uniform(low, high)), 3)

        return Recipe(
            text=text,
            font=FONTS[random.integers(len(FONTS))],
            size=int(random.integers(self.height // 2, self.height * 3 // 4, endpoint=True)),
            angle=draw(-5, 5),
            shear=draw(-0.3, 0.3),
            noise=draw(0, 0.1),
            blur=draw(0, 1),
            contrast=round(1 - draw(0, 0.6), 3),
            seed=int(random.integers(2**31)),
            height=self.height,
            width=self.width,
        )


@cache
def render(recipe: str) -> np.ndarray:
    """The picture of a recipe: uint8 `[height, width]`, 255 for white; drawn once in a process, and not to be written.

    Raises:
        ValueError: the text is no recipe, or its font is not one of `FONTS`.

    >>> picture = render("k3f|DejaVuSans|18|-2.5|0.1|0.05|0.5|0.8|7|32x128")
    >>> picture.shape, picture.dtype.name
    ((32, 128), 'uint8')
    """
    wanted = Recipe.parse(recipe)
    if wanted.font not in FONTS:
        raise ValueError(f"font ({wanted.font}) must be one of {', '.join(FONTS)}")
    random = np.random.default_rng(wanted.seed)
    ink = _placed(_written(wanted.text, wanted.font, wanted.size), wanted, random)
    ink = ink.filter(ImageFilter.GaussianBlur(wanted.blur))
    light = 0.5 + wanted.contrast * (0.5 - np.asarray(ink, np.float64) / 255)
    light += wanted.noise * random.standard_normal(light.shape)
    picture = np.rint(255 * light.clip(0, 1)).astype(np.uint8)
    picture.setflags(write=False)
    return picture


def _written(text: str, font: str, size: int) -> Image.Image:
    """The text, white on black, in a picture that it just fills."""
    face = _face(font, size)
    left, top, right, bottom = face.getbbox(text)
    written = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(written).text((-left, -top), text, fill=255, font=face)
    return written


def _placed(written: Image.Image, recipe: Recipe, random: Generator) -> Image.Image:
    """The text turned and sheared, made smaller where it would not fit, and put somewhere in the picture."""
    turn = np.deg2rad(recipe.angle)
    # From the text to the picture, x to the right and y down.
    forward = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) @ [[1, -recipe.shear], [0, 1]]
    box, room = np.abs(forward) @ written.size, np.array([recipe.width, recipe.height]) - 2 * _MARGIN
    scale = min(1.0, *(room / box))
    forward, free = scale * forward, room - scale * box
    centre = _MARGIN + scale * box / 2 + free * random.uniform(size=2)
    # Pillow asks for the way back, from each pixel of the picture to the text.
    back = np.linalg.inv(forward)
    offset = np.array(written.size) / 2 - back @ centre
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    size = (recipe.width, recipe.height)
    return written.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


@cache
def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    # Pillow can do more only where another library is installed; so the letters stand alike everywhere.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
