"""The allowed values of numbers, as types: `Annotated[float, Range(0, 1)]`.

The fields of the config dataclasses, the options of the commands and the arguments of Python functions have these
types, and all are checked by the functions below, so that a value is refused everywhere with the same sentence.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from vultus.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
SHOWN = 60  # characters of a refused value in a message
WORDS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, both included unless `above` or `below` is set. NaN and infinity are in no range.

    Attributes:
        above: `least` itself is not allowed.
        below: `most` itself is not allowed.
        power_of_two: only powers of two are allowed.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False
    power_of_two: bool = False

    def __contains__(self, value: int | float) -> bool:
        if not self.least <= value <= self.most:  # so compared, NaN is nowhere
            return False
        if (self.above and value == self.least) or (self.below and value == self.most):
            return False
        return not self.power_of_two or int(value).bit_count() == 1

    def describe(self, kind: type) -> str:
        """The numbers in words, for messages and help."""
        if self.power_of_two:
            sides = [str(2**n) for n in range(round(math.log2(self.least)), round(math.log2(self.most)) + 1)]
            return f"one of {', '.join(sides)}"
        noun = "a whole number" if kind is int else "a number"
        if self.most == MAX_SEED:
            return f"{noun} from 0 to 2^64 - 1"
        lower = f"above {self.least:g} up to" if self.above else f"from {self.least:g} to"
        return f"{noun} {lower} {'below ' if self.below else ''}{_short(self.most)}"


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e+0", "e").replace("e+", "e") if number >= 1e9 else f"{number:.0f}"


MAX_SEED = 2**64 - 1  # the noise has a key of 64 bits
Seed = Annotated[int, Range(0, MAX_SEED)]
Count = Annotated[int, Range(1, 1e9)]  # faces, photos, images of a batch
Images = Annotated[int, Range(1, 1e12)]  # images seen by a training, and intervals of them
ImagesOrNone = Annotated[int, Range(0, 1e12)]  # the same where 0 switches something off
Limit = Annotated[int, Range(2, 1e12)]  # photos of an evaluation, which compares people
Steps = Annotated[int, Range(2, 240)]  # frames of an interpolation
STRENGTHS = Range(0, 4)  # training has 1; far above, a face is no function of the embedding any more
NoiseStrength = Annotated[float, STRENGTHS]
Angle = Annotated[float, Range(0, 180)]  # in degrees
Score = Annotated[float, Range(-1000, 1000)]  # of a judge
FacesOfPerson = Annotated[int, Range(1, 1000)]
Port = Annotated[int, Range(0, 65_535)]
Amount = Annotated[float, Range(0, 1e6, above=True)]
Hours = Annotated[float, Range(0, 1e5, above=True)]
Seconds = Annotated[float, Range(0, 1e6, above=True)]
Epochs = Annotated[float, Range(0, 1e6, above=True)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
Weight = Annotated[float, Range(0, 1e9)]
SIDES = Range(32, 1024, power_of_two=True)
CropSide = Annotated[int, Range(16, 1024)]  # of the photos in a prepared data set
PictureSide = Annotated[int, Range(16, 4096)]  # of the files of generated faces, in pixels
Quality = Annotated[int, Range(1, 100)]  # of a JPEG or WebP file
ImageFormat = Literal["png", "jpg", "webp"]  # of the files of generated faces
Side = Annotated[int, SIDES]  # of the images of the networks, in pixels


def parts(hint: Any) -> tuple[Any, Range | None, bool]:
    """(type without None and range, its range or None, whether None is allowed) of a type hint."""
    optional = False
    if get_origin(hint) in (Union, UnionType):
        others = [each for each in get_args(hint) if each is not NoneType]
        if len(others) != 1:
            raise TypeError(f"{hint}: only one type beside None can be checked")
        hint, optional = others[0], len(get_args(hint)) > 1
    if get_origin(hint) is Annotated:
        kind, *annotations = get_args(hint)
        return kind, next((each for each in annotations if isinstance(each, Range)), None), optional
    return hint, None, optional


def allowed(hint: Any) -> str:
    """The values of a type in words: "a whole number from 1 to 1000000"."""
    kind, numbers, _ = parts(hint)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if numbers is not None:
        return numbers.describe(kind)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def is_allowed(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint` and in its range. A whole number is also a float; True is no number."""
    kind, numbers, optional = parts(hint)
    if value is None:
        return optional
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind in (int, float):
        right = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return right and (math.isfinite(value) if numbers is None else value in numbers)
    return isinstance(value, kind)


def checked(value: Any, hint: Any, name: str) -> Any:
    """`value` if it is allowed. Raises UserError "<name> must be ..., not ..." if not."""
    if not is_allowed(value, hint):
        raise refusal(value, hint, name)
    kind = parts(hint)[0]
    return kind(value) if kind in (int, float) and value is not None else value  # of numpy's and whole numbers


def from_text(text: str, hint: Any, name: str) -> Any:
    """The value that `text` stands for, as an option of a command has it. Raises UserError as checked()."""
    kind, _, optional = parts(hint)
    if optional and text == "null":
        return None
    try:
        if kind is bool:
            value: Any = WORDS[text.lower()]
        elif kind is int and (power := re.fullmatch(r"(\d+)[eE]\+?(\d\d?)", text)):
            value = int(power[1]) * 10 ** int(power[2])  # as the limits are written: 1e6
        else:
            value = kind(text) if kind in (int, float) else text
    except (ValueError, KeyError):
        raise refusal(text, hint, name) from None
    if not is_allowed(value, hint):
        raise refusal(text, hint, name)
    return value


def refusal(value: Any, hint: Any, name: str) -> UserError:
    """The error for a value that is not of the type `hint`."""
    try:
        shown = " ".join((value if isinstance(value, str) and value.strip() else repr(value)).split())
    except ValueError:  # Python prints no number of more than 4300 digits
        shown = "a number of thousands of digits"
    if len(shown) > SHOWN:
        shown = shown[:SHOWN] + "..."
    return UserError(f"{name} must be {allowed(hint)}, not {shown}")


def checks_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: every argument whose annotation has a Range is checked before the function runs."""
    signature = inspect.signature(function)

    @functools.cache
    def ranges() -> dict[str, Any]:
        hints = get_type_hints(function, include_extras=True)
        return {name: hint for name, hint in hints.items() if _has_range(hint)}

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> T:
        given = signature.bind(*arguments, **keywords).arguments
        for name, hint in ranges().items():
            if name in given:
                checked(given[name], hint, name)
        return function(*arguments, **keywords)

    return call


def _has_range(hint: Any) -> bool:
    return any(get_origin(each) is Annotated for each in (hint, *get_args(hint)))
