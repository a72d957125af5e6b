"""A hash of what a function or an object does: its code and all values that it can reach.

Two functions of one name (two lambdas, or one that was edited between two runs) have different hashes if their code,
constants, defaults, closures, attributes or the globals that they name differ. Functions and classes of installed
libraries are told by name. Nothing depends on addresses, files or line numbers, but another version of Python may
compile the same text to other code.
"""

import functools
import hashlib
import inspect
import pickle
import sysconfig
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.errors import FewstepError

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def code_hash(value: Any) -> str:
    """The hash, of 16 hexadecimal digits. FewstepError if the value holds something that has no hash."""
    return _digest(value, ())[:16]


def is_of_fewstep(rule: Any) -> bool:
    """Whether this function, or the class of this object, is one of this package."""
    named = rule if isinstance(rule, types.FunctionType | type) else type(rule)
    return str(named.__module__).partition(".")[0] == "fewstep"


def _digest(value: Any, inside: tuple[int, ...]) -> str:
    """`inside`: the ids of what holds the value, so that a function which calls itself has a hash."""
    if id(value) in inside:
        return f"its holder {inside[::-1].index(id(value))}"
    return _hash(type(value).__qualname__, *_parts(value, (*inside, id(value))))


def _parts(value: Any, inside: tuple[int, ...]) -> Iterable[str]:
    """Texts and hashes that together tell the value."""

    def told(*values: Any) -> list[str]:
        return [_digest(one, inside) for one in values]

    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | types.EllipsisType():
            return [repr(value)]
        case torch.Tensor():
            numbers = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            return [str(value.dtype), str(tuple(value.shape)), *told(numbers)]
        case types.ModuleType():
            return [value.__name__]
        case types.BuiltinFunctionType() | types.MethodDescriptorType() | types.WrapperDescriptorType():
            return [value.__qualname__]
        case Mapping():
            return sorted(_hash(*told(key, one)) for key, one in value.items())
        case set() | frozenset():
            return sorted(told(*value))
        case tuple() | list():
            return told(*value)
        case types.CodeType():
            names = (value.co_names, value.co_varnames, value.co_freevars, value.co_argcount, value.co_kwonlyargcount)
            return [value.co_code.hex(), *told(*names, value.co_consts, value.co_flags, value.co_exceptiontable)]
        case functools.partial():
            return told(value.func, value.args, value.keywords)
        case types.MethodType():
            return told(value.__func__, value.__self__)
        case property():
            return told(value.fget)
        case functools.cached_property():
            return told(value.func)
        case staticmethod() | classmethod():
            return told(value.__func__)
        case type() if _is_installed(value):
            return [value.__module__, value.__qualname__]
        case types.FunctionType():
            cells = [_content(cell) for cell in value.__closure__ or ()]
            if _is_installed(value):  # a wrapper of a library, such as torch.no_grad, holds a function that may not be
                return [value.__module__, value.__qualname__, *told(getattr(value, "__wrapped__", cells))]
            named = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
            return told(value.__code__, value.__defaults__, value.__kwdefaults__, cells, vars(value), named)
        case type():
            own = {name: one for name, one in vars(value).items() if _is_told(name, one)}
            return [value.__qualname__, *told(own, value.__bases__)]
    if hasattr(value, "__wrapped__"):  # such as functools.cache
        return told(value.__wrapped__)
    kind: Any = type(value)
    plain = (kind.__reduce__, kind.__reduce_ex__) == (object.__reduce__, object.__reduce_ex__)
    if plain and (hasattr(value, "__dict__") or hasattr(value, "__slots__")):
        slots = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
        return told(kind, {**slots, **getattr(value, "__dict__", {})})
    try:  # what holds more than its attributes, such as an array, says how it is made again
        made_by = pickle.dumps(value).hex() if plain else value.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    except (TypeError, pickle.PickleError, AttributeError, RuntimeError) as error:
        raise FewstepError(
            f"no results can be kept for a policy that holds a {kind.__qualname__}, since two of these cannot be told "
            "apart; make it inside the policy, or keep no results"
        ) from error
    return told(made_by)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _is_installed(value: types.FunctionType | type) -> bool:
    """Whether it is of Python, of this package or of a library, whose code does not change between two runs."""
    if is_of_fewstep(value) or value.__module__ == "builtins":
        return True
    try:
        file = inspect.getfile(value)
    except (TypeError, OSError):  # of a session without files
        return False
    return any(Path(file).is_relative_to(folder) for folder in _LIBRARIES)


def _names(code: types.CodeType) -> Sequence[str]:
    """All names that the code and the functions inside it look up."""
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one)]
    return [*code.co_names, *inner]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return ()


def _is_told(name: str, value: Any) -> bool:
    """Whether this attribute says what a class does; slots, and what Python notes about a class, do not."""
    if isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType) or name == "_abc_impl":
        return False
    return callable(value) or not (name.startswith("__") and name.endswith("__"))


def _slots(value: Any) -> Sequence[str]:
    named = [vars(one).get("__slots__", ()) for one in type(value).__mro__]
    return [name for slots in named for name in ((slots,) if isinstance(slots, str) else slots)]
