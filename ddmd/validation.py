"""Checks of one value each, of options and of descriptions: its type, its range, and a message that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

Choice = TypeVar("Choice")


def shown(value: Any) -> str:
    """A value as a message shows it: at most 60 characters, on one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not print integers of thousands of digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # Python's, numpy's


def integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """An integer (numpy's, too) from lowest to highest, as int.

    Raises
    ------
    ValueError
        If it is no integer, or out of range. A flag is no integer.

    Examples
    --------
    >>> integer("steps", 3, 1, 1000)
    3
    """
    try:
        number = None if _is_flag(value) else operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        number = None
    if number is None or not lowest <= number <= highest:
        limits = f"{_limit(lowest)} to {_limit(highest)}"
        raise ValueError(f"{name} is {shown(value)}; allowed are integers from {limits}")
    return number


def _limit(value: int) -> str:
    return {2**63 - 1: "2^63 - 1", -(2**63): "-2^63"}.get(value, str(value))


def real(name: str, value: Any, lowest: float, highest: float, inclusive: bool = True) -> float:
    """A finite number (numpy's, too) from lowest to highest, as float; `inclusive` says whether the ends are allowed.

    Raises
    ------
    ValueError
        If it is no number, not finite, or out of range. Neither a flag nor a text is a number.
    """
    try:
        number = math.nan if _is_flag(value) or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    inside = lowest <= number <= highest if inclusive else lowest < number < highest
    if not inside:
        ends = "" if inclusive else ", both excluded"
        raise ValueError(
            f"{name} is {shown(value)}; allowed are numbers from {lowest:g} to {highest:g}{ends}"
        )
    return number


def flag(name: str, value: Any) -> bool:
    """True or False (numpy's, too), as bool.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if not _is_flag(value):
        raise ValueError(f"{name} is {shown(value)}; allowed are true and false")
    return bool(value)


def choice(name: str, value: Any, allowed: Sequence[Choice]) -> Choice:
    """One of the allowed values.

    Raises
    ------
    ValueError
        If it is another.
    """
    for one in allowed:
        if type(value) is type(one) and value == one:
            return one
    raise ValueError(f"{name} is {shown(value)}; allowed are {', '.join(map(str, allowed))}")


def text(name: str, value: Any, longest: int) -> str:
    """Printable text of 1 to `longest` characters.

    Raises
    ------
    ValueError
        If it is not.
    """
    if not isinstance(value, str) or not 1 <= len(value) <= longest or not value.isprintable():
        raise ValueError(f"{name} is {shown(value)}; allowed is printable text of 1 to {longest} characters")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary; ValueError where a key is there twice. For `object_pairs_hook`."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{shown(name)} is there twice")
        values[name] = value
    return values
