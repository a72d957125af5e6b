"""Commands that are settings classes: their fields are the options, and an instance has the defaults.

A run of several stages is declared so once, as instances by name, and several such runs share the classes.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints

import typer

from fewstep.cli.option_names import naming_options, option_name


class Runnable(Protocol):
    """A frozen dataclass whose fields are settings. The texts in their annotations are the help of the options; of a
    field that holds a settings class, the fields of that are options too.
    """

    def run(self) -> None: ...


def app_of(commands: Mapping[str, Runnable]) -> typer.Typer:
    """The commands by name; each runs its instance with the options that were given."""
    app = typer.Typer(pretty_exceptions_enable=False)
    for name, settings in commands.items():
        app.command(name, help=inspect.getdoc(type(settings)))(_command(settings))
    return app


def _command(settings: Runnable) -> Callable[..., None]:
    def command(**given: Any) -> None:
        with naming_options({name: option_name(name) for name in given}):
            _with_values(settings, given).run()

    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in _options(settings)
    ]
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """The settings, and the settings classes among their fields, with the values that are given by a field's name."""
    changed = {
        field.name: _with_values(value, values) if is_dataclass(value) else values.get(field.name, value)
        for field in fields(settings)
        if field.init
        for value in [getattr(settings, field.name)]
    }
    return replace(settings, **changed)


def _options(settings: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, annotation for typer and default of each option."""
    plain, declared = get_type_hints(type(settings)), get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _options(value)
            continue
        words = " ".join(word for word in getattr(declared[field.name], "__metadata__", ()) if isinstance(word, str))
        kind = plain[field.name]
        if get_origin(kind) is tuple:  # typer repeats options of lists only
            kind, value = list[get_args(kind)[0]], list(value)  # type: ignore[misc]
        yield field.name, Annotated[kind, typer.Option(help=words or None)], value
