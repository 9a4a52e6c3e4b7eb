"""Every claim about which day a string means is checked against Babel itself, writing every day of two years."""

from collections import defaultdict
from datetime import date, timedelta

import pytest
from babel import Locale

from train.tasks import dates
from train.tasks.dates import LOCALES, STYLES, Dates, Reader, write

FEW = ("de", "es_PA", "hu", "ja", "pt_PT")
SMALL = Dates(years=(2020, 2021), locales=FEW, train_examples=3000, validation_examples=90, test_examples=80)
SIZES = {"train": 3000, "validation": 90, "test": 80}


@pytest.fixture(scope="module")
def meanings():
    """Every string of the small task, and the days that it can mean."""
    days = defaultdict(set)
    for name in FEW:
        for style in STYLES:
            for number in range(366 + 365):
                day = date(2020, 1, 1) + timedelta(number)
                days[write(day, Locale.parse(name), style)].add(day)
    return days


@pytest.fixture(scope="module")
def small():
    return SMALL.load()


def test_at_least_25_languages():
    assert len({Locale.parse(name).language for name in LOCALES}) >= 40


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("3 mai 2021", "2021-05-03"),
        ("Mittwoch, 5. Januar 1994", "1994-01-05"),
        ("Wednesday, January 5, 1994", "1994-01-05"),
        ("5 January 1994", "1994-01-05"),
        ("5. siječnja 1994.", "1994-01-05"),
        ("2026. december 11.", "2026-12-11"),
        ("среда, 5 января 1994 г.", "1994-01-05"),
        ("1994年1月5日水曜日", "1994-01-05"),
    ],
)
def test_written_as_people_write(text, day):
    written = {write(date.fromisoformat(day), Locale.parse(name), style) for name in LOCALES for style in STYLES}
    assert text in written


def test_the_reader_knows_every_meaning_of_every_string(meanings):
    reader = Reader(FEW)
    assert {text: reader.read(text) for text in meanings} == meanings
    assert sum(len(days) > 1 for days in meanings.values()) == 2 * 12 * 11


def test_every_weekday_of_every_day_is_known():
    reader = Reader(["de"])
    for number in range(28 * 365 + 7):  # every kind of year
        day = date(1950, 1, 1) + timedelta(number)
        assert reader.read(write(day, Locale("de"), "full")) == {day}


def test_months_that_one_word_names_in_two_languages():
    # "listopad" is October in Croatian and November in Czech, in other cases and with other points
    reader = Reader(["hr", "cs", "pl"])
    assert reader.read("5. listopada 2021.") == {date(2021, 10, 5)}
    assert reader.read("5. listopadu 2021") == {date(2021, 11, 5)}
    assert reader.read("5 listopada 2021") == {date(2021, 11, 5)}


@pytest.mark.parametrize("text", ["", "tomorrow", "29.02.2021", "Montag, 5. Januar 1994", "1994 1994", "01.01.0000"])
def test_what_nobody_writes_means_no_day(text):
    assert Reader(["de"]).read(text) == set()


def test_examples_mean_the_day_of_their_target_and_no_other(small, meanings):
    for rows in small.values():
        for source, target in zip(rows["source"], rows["target"], strict=True):
            assert meanings[source] == {date.fromisoformat(target)}


def test_numeric_dates_stay_where_both_orders_agree_on_the_day():
    orders = ("es_PA", "pt_PT")
    task = Dates(years=(2021, 2021), locales=orders, train_examples=900, validation_examples=1, test_examples=1)
    numeric = [source.split("/")[:2] for source in task.load()["train"]["source"] if "/" in source]
    assert all(first == second or max(first, second) > "12" for first, second in numeric)
    assert any(first == second for first, second in numeric)
    assert any(first > "12" for first, _ in numeric)
    assert any(second > "12" for _, second in numeric)


def test_no_day_is_in_two_splits(small):
    train, validation, test = (set(small[split]["target"]) for split in SIZES)
    assert len(train | validation | test) == len(train) + len(validation) + len(test)


def test_as_many_examples_as_asked_for_and_none_twice(small):
    assert {split: len(set(rows["source"])) for split, rows in small.items()} == SIZES
    assert {split: len(rows) for split, rows in small.items()} == SIZES


def test_all_styles_and_locales_are_drawn(small, meanings):
    sources = set(small["train"]["source"])
    for name in FEW:
        for style in STYLES:
            assert sources & {write(date(2020, 1, 1) + timedelta(day), Locale.parse(name), style) for day in range(366)}


def test_people_type_plain_spaces():
    day = date(1994, 1, 5)
    spaces = {character for name in LOCALES for style in STYLES for character in write(day, Locale.parse(name), style)}
    assert {character for character in spaces if character.isspace()} == {" "}


def test_a_seed_decides(small):
    def sources(seed):
        task = Dates(
            years=(2020, 2020), locales=("fr",), train_examples=50, validation_examples=1, test_examples=1, seed=seed
        )
        return task.load()["train"]["source"][:]

    assert SMALL.load()["train"][:] == small["train"][:]
    assert sources(-3) == sources(-3)
    assert sources(-3) != sources(3)


def test_more_examples_than_strings():
    task = Dates(years=(2021, 2021), locales=("de",), train_examples=1, validation_examples=1, test_examples=1000)
    with pytest.raises(ValueError, match="18 days give 54 strings of one meaning, fewer than 1000 examples"):
        task.load()


@pytest.mark.parametrize("years", [(2000, 1999), (999, 2000), (2000, 10000)])
def test_years_of_four_digits_in_order(years):
    with pytest.raises(ValueError, match=r"years .* must be two years of four digits"):
        Dates(years=years).load()


@pytest.mark.parametrize("name", ["xx", "not a locale", ""])
def test_an_unknown_locale(name):
    with pytest.raises(ValueError, match="locales must be names that Babel knows"):
        Dates(locales=("de", name)).load()


def test_no_locale():
    with pytest.raises(ValueError, match="at least one locale"):
        Dates(locales=()).load()


def test_a_year_of_two_digits_is_refused(monkeypatch):
    monkeypatch.setattr(dates, "write", lambda day, locale, style: f"{day:%d.%m.%y}")
    with pytest.raises(ValueError, match=r"locale de writes '01.01.00': its year must be the only four digits"):
        Reader(["de"])
