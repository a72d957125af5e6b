"""Values as they are typed or stand in a run file, in the types that they are declared with."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fewstep.errors import FewstepError
from fewstep.values import fitted, parts_of, plain_type

_SPELLINGS = {False: ("no", "off", "false"), True: ("yes", "on", "true")}
"""What YAML 1.1 reads as a boolean."""


def spelt_in(text: Any, declared: Any, option: str) -> Any:
    """What the text of an option spells, in its declared type; FewstepError naming the option if it spells none."""
    return in_type(_parse(text, plain_type(declared), option), declared, option)


def in_type(value: Any, declared: Any, where: str) -> Any:
    """A YAML value in the declared type; FewstepError naming `where` if it is none, or outside its range."""
    wanted = plain_type(declared)
    return fitted(_number(_spelt(value, wanted), wanted), declared, where)


def _number(value: Any, wanted: Any) -> Any:
    """Texts that spell a number as that number, where one is wanted: YAML 1.1 takes `1e-3` for a text."""
    if str in parts_of(wanted) or float not in parts_of(wanted):
        return value
    return [_as_float(item) for item in value] if isinstance(value, list) else _as_float(value)


def _as_float(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _spelt(value: Any, wanted: Any) -> Any:
    """A run file's value; a boolean as the choice that YAML took for it, such as `no`, where a choice is wanted."""
    if not isinstance(value, bool):
        return value
    choices = _choices(wanted)
    return next((text for text in _SPELLINGS[value] if text in choices), value)


def _choices(wanted: Any) -> list[str]:
    """The texts to choose from in a Literal, or in one that may be None."""
    literals = [one for one in (wanted, *get_args(wanted)) if get_origin(one) is Literal]
    return [choice for literal in literals for choice in get_args(literal) if isinstance(choice, str)]


def _parse(value: Any, wanted: Any, option: str) -> Any:
    """Text of an option as the value it spells; text stays text where text or a choice is wanted."""
    if not isinstance(value, str) or {str, Path} & parts_of(wanted):
        return value
    if value in _choices(wanted) or get_origin(wanted) is Literal:
        return value  # YAML reads the choice `no` as False
    return read_yaml(value, option)


def read_yaml(text: str, where: str) -> Any:
    """What the text holds. FewstepError if it is not valid YAML."""
    import yaml

    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through what int(), float(), datetime() and deep recursion raise
        reason = (
            _fault(error) if isinstance(error, yaml.YAMLError) else f"it holds a value that cannot be read ({error})"
        )
        raise FewstepError(f"{where} is not valid YAML: {reason}") from None


def _fault(error: Any) -> str:
    """What an error of PyYAML says, without the lines around it."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{error.problem} at line {mark.line + 1} column {mark.column + 1}"
    return str(getattr(error, "reason", error))
