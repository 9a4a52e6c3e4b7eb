"""What annotations say about values, beyond what the configs of models and experiments need."""

import abc
import dataclasses
import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from seqattn.interop.codec import SubclassesOf, UnknownType, from_json, to_json


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.Enum):
    EASY = 1
    HARD = 2


class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self):
        """How large it is."""


@dataclasses.dataclass(frozen=True)
class Square(Shape):
    side: float = 1.0

    def area(self):
        return self.side**2


@dataclasses.dataclass(frozen=True)
class Other:
    side: float = 1.0


@dataclasses.dataclass(frozen=True)
class Everything:
    shape: Annotated[Other, SubclassesOf(Shape)]
    colours: tuple[Colour, ...] = ()
    pair: tuple[int, str] = (1, "a")
    names: Sequence[str] = ()
    numbers: list[int] = dataclasses.field(default_factory=list)
    mode: Literal["x", 3] | None = None
    path: Path | None = None
    ratio: float = 0.5
    level: Level = Level.EASY


FULL = Everything(Square(2.0), (Colour.BLUE, Colour.RED), (3, "b"), ("c",), [5], 3, Path("a/b"), 2.0, Level.HARD)


@pytest.mark.parametrize("value", [Everything(Other()), FULL])
def test_a_value_comes_back_equal_and_of_the_same_types(value):
    again = from_json(json.loads(json.dumps(to_json(value, Everything))), Everything)
    assert again == value
    assert repr(again) == repr(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": {"type": "Circle"}}, "config.shape must be an object of type Other or Square, got .* 'Circle'"),
        ({"pair": [1]}, "config.pair must have 2 items, got 1"),
        ({"pair": [1, 2]}, r"config.pair\[1\] must be a string, got 2"),
        ({"mode": "y"}, "config.mode must be 'x' or 3 or null, got 'y'"),
        ({"colours": [{"type": "Colour", "value": "green"}]}, r"config.colours\[0\] must .* one of red, blue"),
        ({"level": {"type": "Level", "value": True}}, "config.level must .* one of 1, 2"),
        ({"level": {"type": "Level", "value": "1"}}, "config.level must .* one of 1, 2"),
        ({"numbers": [True]}, r"config.numbers\[0\] must be an integer, got True"),
        ({"ratio": 2**60}, "config.ratio must be a number, got a huge integer"),
    ],
)
def test_what_an_annotation_does_not_say_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        from_json(to_json(FULL, Everything) | change, Everything)


def test_a_check_is_asked_of_every_number_and_list():
    asked = []
    from_json(to_json(FULL, Everything), Everything, check=lambda path, value: asked.append(path))
    assert asked == [
        *("config.shape.side", "config.colours", "config.pair", "config.pair[0]", "config.names"),
        *("config.numbers", "config.numbers[0]", "config.mode", "config.ratio"),
    ]


def test_an_unknown_type_is_told_apart():
    with pytest.raises(UnknownType):
        from_json({"type": "Shape"}, Everything)


def test_a_class_of_another_name_or_another_class_of_a_name_is_not_written():
    with pytest.raises(TypeError, match=r"config\.shape cannot be a Everything: it must be Other or Square"):
        to_json(dataclasses.replace(FULL, shape=FULL), Everything)
    twin = dataclasses.make_dataclass("Other", ["side"], frozen=True)
    with pytest.raises(TypeError, match=r"config\.shape: types are known by their names, and Other is both"):
        to_json(dataclasses.replace(FULL, shape=twin(1.0)), Everything)


@pytest.mark.parametrize("pair", [(), (1,), (1, "a", 2)])
def test_a_tuple_of_another_length_is_not_written(pair):
    with pytest.raises(TypeError, match=rf"config\.pair must have 2 items, got {len(pair)}"):
        to_json(dataclasses.replace(FULL, pair=pair), Everything)


def test_a_class_with_a_field_named_type_is_not_written():
    kind = dataclasses.make_dataclass("Typed", [("type", str)], frozen=True)
    with pytest.raises(TypeError, match=r"config: Typed has a field named type, .* rename the field"):
        to_json(kind("x"), kind)


@pytest.mark.parametrize("annotation", [Any, tuple, list, Any | None], ids=str)
@pytest.mark.parametrize("value", [(1, 2), 3, Other()], ids=str)
def test_an_annotation_that_gives_no_types_is_refused_by_its_name(annotation, value):
    kind = dataclasses.make_dataclass("Vague", [("field", annotation)], frozen=True)
    words = r"config\.field is annotated as (Any|tuple|list), which does not give the types of its values"
    with pytest.raises(TypeError, match=words):
        to_json(kind(value), kind)
    written = to_json(value, Other) if isinstance(value, Other) else value
    with pytest.raises(ValueError, match=words):
        from_json({"type": "Vague", "field": written}, kind)
