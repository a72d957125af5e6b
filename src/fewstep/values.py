"""Values of settings, checked against the type and the range that they are declared with, wherever they come from.

A setting is declared once, as a field of a settings class: `rank: Annotated[int, Ge(1), Le(65536), "Help."] = 16`. The
same declaration is read for a value from Python (`check_fields`, when the class is built), from an option, and from
a YAML file (`fitted`). No bool counts as a number, no fraction as an integer, and every number is finite.
"""

import difflib
import functools
import operator
import reprlib
from collections.abc import Hashable, Mapping
from dataclasses import fields
from functools import cache
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from fewstep.errors import FewstepError

MOST_TOKENS = 1 << 24
"""More than any text or network has, yet small enough that a list of this length can be made before the limit is
checked.
"""

MOST_INTEGER = (1 << 31) - 1
"""What every integer of ours fits in."""

Count = Annotated[int, Ge(1), Le(MOST_TOKENS)]
"""Of tokens, rows, passes and the like; at least one."""

Seed = Annotated[int, Ge(-(1 << 63)), Le((1 << 63) - 1)]
"""Of torch's generators."""

Share = Annotated[float, Ge(0), Le(1)]

Weight = Annotated[float, Ge(0), Le(1e6)]
"""Of a loss, beside others."""

Temperature = Annotated[float, Ge(0), Le(1e6)]
"""Far above it all tokens are equally probable, and float32 ends at 3e38."""


class MisfitError(FewstepError):
    """A value of another type, or outside its range."""


def check_fields(settings: Any, owner: str | None = None) -> None:
    """FewstepError naming the first field of a dataclass instance whose value is not of its declared type and range.

    `owner`: what the sentence says that the field is of, where its name alone would not do.

    Fields are set to plain values of their type: a NumPy integer becomes an int, a list a tuple, a text a Path.
    """
    for name, declared in _declared(cast(Hashable, type(settings))).items():
        value = getattr(settings, name)
        fit = fitted(value, declared, name if owner is None else f"the {name} of {owner}")
        if fit is not value:
            object.__setattr__(settings, name, fit)


@cache
def _declared(group: Hashable) -> Mapping[str, Any]:
    hints = get_type_hints(group, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cast(type, group)) if field.init}


def fitted(value: Any, declared: Any, what: str) -> Any:
    """`value` as a plain value of the declared type; FewstepError saying what `what` must be otherwise.

    Types that are no values (a policy, a network) are taken as they are.
    """
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        fit = fitted(value, arguments[0], what)
        for bound in arguments[1:]:
            _check_bound(fit, bound, what)
        return fit
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        first, *others = [argument for argument in arguments if argument is not NoneType]
        for choice in others:
            try:
                return fitted(value, choice, what)
            except MisfitError:
                continue
        return fitted(value, first, what)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            *others, last = map(str, arguments)
            close = difflib.get_close_matches(value, map(str, arguments), n=1) if isinstance(value, str) else []
            hint = f"did you mean {close[0]!r}?" if close else f"choose {', '.join(others)} or {last}"
            raise MisfitError(f"unknown {what} {shown(value)}; {hint}")
        return value
    if origin is tuple:
        return _fitted_tuple(value, arguments, declared, what)
    return _fitted_plain(value, declared, what)


def _fitted_tuple(value: Any, arguments: tuple[Any, ...], declared: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise _misfit(value, declared, what)
    of_items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(of_items) != len(value):
        raise MisfitError(f"{what} must be {len(of_items)} values, got {shown(value)}")
    return tuple(fitted(item, of_item, f"every value of {what}") for item, of_item in zip(value, of_items, strict=True))


def _fitted_plain(value: Any, declared: Any, what: str) -> Any:
    if isinstance(value, bool):
        if declared in (int, float):
            raise _misfit(value, declared, what)
    elif declared is int and isinstance(value, Integral):
        return int(value)
    elif declared is float and isinstance(value, Real):
        return _finite(value, what)
    if declared is Path and isinstance(value, str):
        return Path(value)
    if declared not in (int, float, bool, str, Path) or (isinstance(value, declared) and declared not in (int, float)):
        return value
    raise _misfit(value, declared, what)


def _finite(value: Any, what: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if not isfinite(number):
        raise MisfitError(f"{what} must be a finite number, got {shown(value)}")
    return number if not isinstance(value, int | float) else value


def _check_bound(value: Any, bound: Any, what: str) -> None:
    """Texts beside the type are its help, and None has no size."""
    if isinstance(bound, Interval):
        for part in bound:
            _check_bound(value, part, what)
    if value is None or not isinstance(bound, Ge | Gt | Le | Lt):
        return
    limit: Any
    match bound:
        case Ge(limit):
            holds, words = value >= limit, "at least"
        case Gt(limit):
            holds, words = value > limit, "above"
        case Le(limit):
            holds, words = value <= limit, "at most"
        case Lt(limit):
            holds, words = value < limit, "below"
    if not holds:
        raise MisfitError(f"{what} must be {words} {limit}, got {shown(value)}")


def _misfit(value: Any, declared: Any, what: str) -> MisfitError:
    name = described(declared)
    kind = {"integer": "an integer", "number": "a number", "text": "text", "path": "a path"}.get(name, name)
    return MisfitError(f"{what} must be {kind}, got {shown(value)}")


def described(declared: Any) -> str:
    """A type as a person reads it: 'number', 'a|b', 'list of number'."""
    names = {int: "integer", float: "number", str: "text", Path: "path", bool: "true|false", NoneType: "none"}
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return described(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, UnionType):
        return "|".join(described(argument) for argument in arguments if argument is not NoneType)
    if origin is tuple:
        return f"list of {described(arguments[0])}"
    return names.get(declared, getattr(declared, "__name__", str(declared)))


def plain_type(declared: Any) -> Any:
    """The type without what is said beside it: `int | None` for `Annotated[Count | None, "Help."]`."""
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Annotated:
        return plain_type(arguments[0])
    if origin in (Union, UnionType):
        return functools.reduce(operator.or_, map(plain_type, arguments))
    return declared


def parts_of(wanted: Any) -> set[Any]:
    """The plain types that a plain type is made of."""
    arguments = get_args(wanted)
    return {wanted} if not arguments else {part for argument in arguments for part in parts_of(argument)}


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """A value in a sentence, shortened; Python refuses to print integers of more than 4,300 digits."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        return "a number of thousands of digits"
