"""Settings as they are declared: once, beside the code that reads them.

A setting is an annotated field of a class, or an annotated argument of a function, whose annotation holds its help:

    window: Annotated[Count, "Tokens of a window."] = 16

Of a class the arguments of its class method `build` count too. What the text cannot say stands in `Details` beside it.

`declared_settings` is given the class or function itself, or where it is ("fewstep.decode.jacobi:Jacobi"). Then its
module is read but not run, unless torch is loaded already: a module that decodes loads it, which takes seconds, and a
command line that prints its help or refuses an option must not wait for them.
"""

import ast
import builtins
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any, get_args, get_origin, get_type_hints

_LIGHT = {*sys.stdlib_module_names, "annotated_types"}
"""Packages that take no time to import."""

Place = str
"""Where a class or a function is: "package.module:Name"."""


@dataclass(frozen=True, kw_only=True)
class Details:
    """What is told of a setting besides its help.

    `name`: under which it is set, where that is not the name of its field. `aliases`: other names that are understood.
    `default`: what holds if it is not set, in words, where the default value of the field does not say it. `reads`: the
    kind of a model that it names, NAME or FOLDER, which no command may then overwrite.
    """

    name: str | None = None
    aliases: tuple[str, ...] = ()
    default: str | None = None
    reads: str | None = None


@dataclass(frozen=True, kw_only=True)
class Declared:
    """One setting; `type` has its bounds, `default` is MISSING for a setting without one."""

    name: str
    field: str
    type: Any
    default: Any
    help: str
    details: Details

    @property
    def told_default(self) -> str | None:
        """The default in words, None if there is none to tell of."""
        if self.details.default is not None:
            return self.details.default
        untold = self.default is None or self.default is False or self.default is MISSING
        return None if untold else str(self.default)


def declared_settings(owner: Place | Callable[..., Any]) -> dict[str, Declared]:
    """Name -> setting, in the order of declaration, those of base classes first."""
    if isinstance(owner, str):
        module, _, name = owner.partition(":")
        if module not in sys.modules and "torch" not in sys.modules:
            return _from_source(owner)
        owner = getattr(import_module(module), name)
    return _read(owner)


@cache
def _from_source(place: Place) -> dict[str, Declared]:
    module, _, name = place.partition(":")
    try:
        return {one.name: one for one in _source(module).declared(name)}
    except _UnreadableError:
        return _read(getattr(import_module(module), name))


def _declared(field: str, annotation: Any, default: Any) -> Iterator[Declared]:
    """The setting, if the annotation holds a help text."""
    beside = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    texts = [part for part in beside if isinstance(part, str)]
    if texts:
        details = next((part for part in beside if isinstance(part, Details)), Details())
        name = details.name or field
        yield Declared(name=name, field=field, type=annotation, default=default, help=" ".join(texts), details=details)


# From a class or a function


@cache
def _read(owner: Callable[..., Any]) -> dict[str, Declared]:
    """Of a class with its `build`, or of a function."""
    takes_fields = isinstance(owner, type)
    found = [
        (field, hint, getattr(owner, field, MISSING))
        for field, hint in (get_type_hints(owner, include_extras=True) if takes_fields else {}).items()
    ]
    function = getattr(owner, "build", None) if takes_fields else owner
    if function is not None:
        hints = get_type_hints(function, include_extras=True)
        found += [
            (name, hints[name], MISSING if argument.default is inspect.Parameter.empty else argument.default)
            for name, argument in inspect.signature(function).parameters.items()
            if name in hints
        ]
    return {one.name: one for field, hint, default in found for one in _declared(field, hint, default)}


# From the source


class _UnreadableError(Exception):
    """The source alone does not say it."""


class _Source:
    """The top level of a module that is not run."""

    def __init__(self, module: str) -> None:
        self.names: dict[str, ast.stmt] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for statement in ast.parse(_text_of(module)).body:
            match statement:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                    self.names[name] = statement
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    self.names[name] = statement
                case ast.ImportFrom(module=str(origin), names=names, level=0):
                    self.imported |= {alias.asname or alias.name: (origin, alias.name) for alias in names}

    def declared(self, name: str) -> Iterator[Declared]:
        statement = self.names.get(name)
        if isinstance(statement, ast.FunctionDef):
            yield from self._arguments(statement)
            return
        if not isinstance(statement, ast.ClassDef):
            raise _UnreadableError(name)
        lineage = list(self._lineage(statement))
        fields = {one.target.id: (source, one) for source, node in lineage for one in _fields(node)}
        for name, (source, one) in fields.items():
            yield from source._declared(name, one.annotation, one.value)
        builds = [(source, one) for source, node in lineage for one in node.body if _is_named(one, "build")]
        for source, build in builds[-1:]:
            assert isinstance(build, ast.FunctionDef)
            yield from source._arguments(build)

    def _lineage(self, node: ast.ClassDef) -> "Iterator[tuple[_Source, ast.ClassDef]]":
        """The class after its bases, which are ours: those of the standard library declare nothing."""
        for base in reversed(node.bases):
            source, name = self, _name_of(base)
            while name in source.imported and _is_ours(source.imported[name][0]):
                module, name = source.imported[name]
                source = _source(module)
            if isinstance(statement := source.names.get(name), ast.ClassDef):
                yield from source._lineage(statement)
            elif not _is_light(source.imported.get(name, ("",))[0]):
                raise _UnreadableError(name)
        yield self, node

    def _arguments(self, node: ast.FunctionDef) -> Iterator[Declared]:
        positional, named = node.args.args, node.args.kwonlyargs
        defaults = [*[None] * (len(positional) - len(node.args.defaults)), *node.args.defaults, *node.args.kw_defaults]
        for one, default in zip([*positional, *named], defaults, strict=True):
            yield from self._declared(one.arg, one.annotation, default)

    def _declared(self, field: str, annotation: ast.expr | None, default: ast.expr | None) -> Iterator[Declared]:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if annotation is None or not self._holds_text(annotation):
            return
        value = MISSING if default is None else self._evaluated(default)
        yield from _declared(field, self._evaluated(annotation), value.default if isinstance(value, Field) else value)

    def _holds_text(self, annotation: ast.expr) -> bool:
        """Whether it is an Annotated with a text among its parts, or the name of one."""
        match annotation:
            case ast.Subscript(
                value=ast.Name(id="Annotated") | ast.Attribute(attr="Annotated"), slice=ast.Tuple(elts=parts)
            ):
                return any(_is_text(part) for part in parts)
            case ast.Name(id=name) if name in self.imported:
                module, origin = self.imported[name]
                return _is_ours(module) and _source(module)._holds_text(ast.Name(origin))
            case ast.Name(id=name):
                statement = self.names.get(name)
                return isinstance(statement, ast.Assign) and self._holds_text(statement.value)
        return False

    def _evaluated(self, expression: ast.expr) -> Any:
        names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        values = {name: self._value(name) for name in names}
        return eval(compile(ast.Expression(expression), "<declaration>", "eval"), values)

    def _value(self, name: str) -> Any:
        match self.names.get(name):
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                return self._evaluated(value)
            case ast.ClassDef():
                return type(name, (), {})  # what is no plain value is only named
        if name not in self.imported:
            if hasattr(builtins, name):
                return getattr(builtins, name)
            raise _UnreadableError(name)
        module, name = self.imported[name]
        if module in sys.modules or _is_light(module):
            return getattr(import_module(module), name)
        if _is_ours(module):
            return _source(module)._value(name)
        raise _UnreadableError(name)


@cache
def _source(module: str) -> _Source:
    return _Source(module)


def _text_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    text = getattr(spec.loader, "get_source", lambda _: None)(module) if spec is not None else None
    if text is None:
        raise _UnreadableError(module)
    return str(text)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


def _is_light(module: str) -> bool:
    return module.partition(".")[0] in _LIGHT


def _name_of(base: ast.expr) -> str:
    """Of a base class, which may have arguments, such as Generic[T]."""
    base = base.value if isinstance(base, ast.Subscript) else base
    if not isinstance(base, ast.Name):
        raise _UnreadableError
    return base.id


def _fields(node: ast.ClassDef) -> Iterator[Any]:
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            yield one


def _is_named(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.FunctionDef) and statement.name == name


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
