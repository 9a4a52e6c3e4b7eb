"""Pictures of strings in many fonts, rotated, sheared, blurred and noisy, for models that read images."""

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
"""Fonts that come with matplotlib, so that no font must be installed."""

_MARGIN = 2  # pixels at each edge that no letter touches before the blur


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a picture, written as one line of text by `str(recipe)` and read by `Recipe.parse`.

    >>> recipe = Recipe.parse("k3f|DejaVuSans|18|-2.5|0.1|0.05|0.5|0.8|7|32x128")
    >>> recipe.font, recipe.height, str(recipe)
    ('DejaVuSans', 32, 'k3f|DejaVuSans|18|-2.5|0.1|0.05|0.5|0.8|7|32x128')
    """

    text: str
    """The string in the picture."""
    font: str
    """One of `FONTS`."""
    size: int
    """Font size in pixels; the text is scaled down if it does not fit."""
    angle: float
    """Counter-clockwise rotation of the text in degrees."""
    shear: float
    """Shift to the right in pixels, for each pixel of height."""
    noise: float
    """Standard deviation of the noise of each pixel, where white is 1 and black is 0."""
    blur: float
    """Standard deviation of the Gaussian blur, in pixels."""
    contrast: float
    """Brightness of the paper minus that of the ink, 0 to 1; both are equally far from middle grey."""
    seed: int
    """Decides the place of the text in the picture, and the noise."""
    height: int
    """Height of the picture in pixels."""
    width: int
    """Width of the picture in pixels."""

    def __str__(self) -> str:
        *parts, height, width = dataclasses.astuple(self)
        return "|".join(str(part) for part in (*parts, f"{height}x{width}"))

    @staticmethod
    def parse(recipe: str) -> "Recipe":
        """Parses a line that `str(recipe)` wrote.

        Raises:
            ValueError: the line is not a recipe.
        """
        try:
            text, font, size, *shape, seed, picture = recipe.split("|")
            angle, shear, noise, blur, contrast = map(float, shape)
            letters, number, height, width = map(int, (size, seed, *picture.split("x")))
        except ValueError:
            raise ValueError(f"{recipe!r} is not the recipe of a picture, such as {_EXAMPLE!r}") from None
        return Recipe(text, font, letters, angle, shear, noise, blur, contrast, number, height, width)


_EXAMPLE = str(Recipe("k3f", "DejaVuSans", 18, -2.5, 0.1, 0.05, 0.5, 0.8, 7, 32, 128))


@dataclass(frozen=True)
class RenderedText(DrawnTask):
    """Random strings of letters and digits: "source" is the `Recipe` of a picture, "target" is the string in it.

    All lengths are equally likely. No string occurs twice, in one split or in two. `render` draws the picture of a
    recipe.
    """

    train_examples: int = 20_000
    """number of training examples"""
    min_length: int = 3
    """minimum number of characters of a string"""
    max_length: int = 10
    """maximum number of characters of a string"""
    alphabet: str = ascii_lowercase + digits
    """characters to draw strings from, each once"""
    height: int = 32
    """height of the pictures in pixels"""
    width: int = 128
    """width of the pictures in pixels"""
    distortion: float = 1.0
    """strength of the distortions, 0 to 1; 0 is none, and 1 is at most 5 degrees of rotation, a shear of 0.3, a blur
    of 1 pixel, a noise of 0.1 and a contrast of at least 0.4"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("min_length", self.min_length, 1, self.max_length, maximum_name="max_length")
        if len(set(self.alphabet)) < len(self.alphabet) or not self.alphabet or "|" in self.alphabet:
            raise ValueError(f"alphabet ({self.alphabet!r}) must have at least one character, none twice, and not '|'")
        for two in map("".join, itertools.product(self.alphabet, repeat=2)):
            # Two different strings with one NFC form would be the same text, perhaps in two splits.
            if not unicodedata.is_normalized("NFC", two):
                raise ValueError(f"alphabet ({self.alphabet!r}) must have characters that NFC keeps, but has {two!r}")
        if min(self.height, self.width) <= 2 * _MARGIN:
            raise ValueError(f"height ({self.height}) and width ({self.width}) must be more than {2 * _MARGIN} pixels")
        check_number("distortion", self.distortion, minimum=0, maximum=1)

    def load(self) -> dict[str, Dataset]:
        """Draws the splits; pictures are drawn later, by `render`.

        Raises:
            ValueError: there are fewer strings than examples.

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
    """Draws the picture of a recipe.

    Args:
        recipe: a line that `str(Recipe(...))` wrote.

    Returns:
        The picture, uint8 `[height, width]`, 255 for white. The array is read-only and cached for the whole process.

    Raises:
        ValueError: the text is not a recipe, or its font is not one of `FONTS`.

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
    """Draws the text, white on black, in a picture of its own size."""
    face = _face(font, size)
    left, top, right, bottom = face.getbbox(text)
    written = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(written).text((-left, -top), text, fill=255, font=face)
    return written


def _placed(written: Image.Image, recipe: Recipe, random: Generator) -> Image.Image:
    """Rotates and shears the text, scales it down if it does not fit, and puts it at a random place in the picture."""
    turn = np.deg2rad(recipe.angle)
    # The map from the text to the picture; x points to the right and y down.
    forward = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) @ [[1, -recipe.shear], [0, 1]]
    box, room = np.abs(forward) @ written.size, np.array([recipe.width, recipe.height]) - 2 * _MARGIN
    scale = min(1.0, *(room / box))
    forward, free = scale * forward, room - scale * box
    centre = _MARGIN + scale * box / 2 + free * random.uniform(size=2)
    # Pillow needs the inverse map, from each pixel of the picture to the text.
    back = np.linalg.inv(forward)
    offset = np.array(written.size) / 2 - back @ centre
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    size = (recipe.width, recipe.height)
    return written.transform(size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


@cache
def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    # The basic layout is the only one that needs no further library, so that all machines draw the same pictures.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
