"""Dates as people write them in many languages, to ISO 8601: a small translation task without a download."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from babel import Locale, UnknownLocaleError
from babel.dates import format_date
from datasets import Dataset
from numpy.random import Generator

from train.tasks.task import DrawnTask, Pair, generator, splits

Style = Literal["medium", "long", "full"]
STYLES: tuple[Style, ...] = ("medium", "long", "full")

# The other scripts of CLDR would add 20 to 35 characters to the vocabulary for one or two languages each, and some run
# from right to left, which attention plots do not show well. en_GB, es_PA and pt_PT differ in the order of day and
# month.
LOCALES = tuple(
    "af be bg ca cs da de el en en_GB es es_PA et eu fi fr gl hr hu id is it ja ko lt lv mk nb nl nn pl pt pt_PT "
    "ro ru sk sl sq sr sv tr uk zh".split()
)

HELD_OUT = 20
"""One day in `HELD_OUT` is for validation, and another one for the test."""

_YEAR = re.compile("[0-9]{4}")


@dataclass(frozen=True)
class Dates(DrawnTask):
    """Dates of the Gregorian calendar in many languages, from CLDR through Babel, to ISO 8601.

    An example is "Mittwoch, 5. Januar 1994" to "1994-01-05". Strings that could mean two days are left out. No day is
    in two splits: the test uses days that training never shows in any language.
    """

    train_examples: int = 100_000
    """number of training examples"""
    years: tuple[int, int] = (1950, 2049)
    """first and last year, each of four digits"""
    locales: tuple[str, ...] = LOCALES
    """CLDR names of the languages and regions, such as `de` or `pt_PT`"""

    def load(self) -> dict[str, Dataset]:
        """Draws the splits.

        Raises:
            ValueError: `years` or `locales` cannot be used, or give fewer strings of one meaning than examples.

        >>> sizes = {"train_examples": 100, "validation_examples": 10, "test_examples": 10}
        >>> Dates(years=(2020, 2021), locales=("de", "ja"), **sizes).load()["test"][1]
        {'source': '2021/04/01', 'target': '2021-04-01'}
        """
        first, last = self.years
        if not 1000 <= first <= last <= 9999:
            raise ValueError(f"years ({first}, {last}) must be two years of four digits in ascending order")
        random = generator(self.seed)
        start, end = date(first, 1, 1), date(last, 12, 31)
        days = [start + timedelta(number) for number in random.permutation((end - start).days + 1).tolist()]
        held_out = len(days) // HELD_OUT
        reader = Reader(self.locales)
        return splits(
            test=_draw(reader, days[:held_out], self.test_examples, random),
            validation=_draw(reader, days[held_out : 2 * held_out], self.validation_examples, random),
            train=_draw(reader, days[2 * held_out :], self.train_examples, random),
        )


class Reader:
    """A table from each string that the locales write, in any style, to the days that it can mean.

    A date string depends on the day of the year, the weekday and the year. The year is its only group of four digits
    (this is checked). In seven consecutive leap years every day of the year falls on every weekday. Their strings, with
    the year blanked, are therefore all possible strings, and a lookup replaces a parser.

    Args:
        locales: CLDR names, at least one.

    Raises:
        ValueError: there is no locale, Babel does not know one of them, or one writes other groups of four digits than
            the year.
    """

    def __init__(self, locales: Sequence[str]):
        if not locales:
            raise ValueError("locales must name at least one locale")
        self.forms: list[tuple[Locale, Style]] = [(_locale(name), style) for name in locales for style in STYLES]
        self._days: defaultdict[str, set[tuple[int, int, int]]] = defaultdict(set)
        leap_days = [date(year, 1, 1) + timedelta(day) for year in range(2000, 2028, 4) for day in range(366)]
        meanings = [(day, (day.month, day.day, day.weekday())) for day in leap_days]
        for locale, style in self.forms:
            for day, meaning in meanings:
                text = write(day, locale, style)
                if _YEAR.findall(text) != [str(day.year)]:
                    raise ValueError(f"locale {locale} writes {text!r}: its year must be the only four digits")
                self._days[_blank(text)].add(meaning)

    def read(self, text: str) -> set[date]:
        """Returns every day that some locale writes as `text` in some style; an empty set if there is none.

        >>> reader = Reader(["pt_PT", "es_PA"])
        >>> sorted(map(str, reader.read("03/05/2021")))
        ['2021-03-05', '2021-05-03']
        >>> reader.read("30/05/2021"), reader.read("31/02/2021")
        ({datetime.date(2021, 5, 30)}, set())
        """
        year = _YEAR.search(text)
        if year is None:
            return set()
        days = (_day(int(year[0]), *meaning) for meaning in self._days.get(_blank(text), ()))
        return {day for day in days if day}


def write(day: date, locale: Locale, style: Style) -> str:
    """Writes a day as the locale does, in NFC, with plain spaces in place of CLDR's narrow ones, as people type.

    >>> write(date(1994, 1, 5), Locale("de"), "full"), write(date(1994, 1, 5), Locale("ru"), "medium")
    ('Mittwoch, 5. Januar 1994', '5 янв. 1994 г.')
    """
    return unicodedata.normalize("NFC", " ".join(format_date(day, style, locale=locale).split()))


def _draw(reader: Reader, days: Sequence[date], examples: int, random: Generator) -> list[Pair]:
    """Draws distinct strings that mean exactly one day; all triples (day, locale, style) are equally likely."""
    pairs: dict[str, str] = {}
    for number in random.permutation(len(days) * len(reader.forms)):
        day, (locale, style) = days[number // len(reader.forms)], reader.forms[number % len(reader.forms)]
        text = write(day, locale, style)
        # "03/05/2021" means two days where both orders of day and month are used: no model could know which.
        if len(reader.read(text)) == 1:
            pairs[text] = day.isoformat()
        if len(pairs) == examples:
            return list(pairs.items())
    raise ValueError(f"{len(days)} days give {len(pairs)} strings of one meaning, fewer than {examples} examples")


def _locale(name: str) -> Locale:
    try:
        return Locale.parse(name)
    except (UnknownLocaleError, ValueError) as error:
        raise ValueError(f"locales must be names that Babel knows, such as de or pt_PT: {error}") from error


def _day(year: int, month: int, day: int, weekday: int) -> date | None:
    """Returns the day if it exists in this year and falls on this weekday, else None."""
    try:
        found = date(year, month, day)
    except ValueError:
        return None
    return found if found.weekday() == weekday else None


def _blank(text: str) -> str:
    return _YEAR.sub("0000", text)
