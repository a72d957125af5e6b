"""Texts that begin with a dash, such as `fewstep infill "- There is a [MASK]"`: arguments, not options."""

import re
from collections.abc import Iterable
from itertools import islice

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

_OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
"""How an option looks, with its value or without. What begins with a dash and does not look so is a text."""


class TextCommand(TyperCommand):
    """A command that takes a text with a leading dash as an argument; one that looks like an option needs `--` first,
    as everywhere.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, self._texts_last(args))

    def _texts_last(self, arguments: list[str]) -> list[str]:
        """The same arguments, those that are no options behind a `--`, if one of them is a text with a dash."""
        takes = {name: option.nargs for option in _options(self.params) if not option.is_flag for name in option.opts}
        known = {name for option in _options(self.params) for name in (*option.opts, *option.secondary_opts)}
        options: list[str] = []
        texts: list[str] = []
        rest = iter(arguments)
        for argument in rest:
            if argument == "--":
                texts += rest
            elif argument in takes:
                options += [argument, *islice(rest, takes[argument])]
            elif len(argument) > 1 and argument.startswith("-") and not _is_text(argument, known):
                options.append(argument)
            else:
                texts.append(argument)
        return [*options, "--", *texts] if texts else options


def _options(parameters: Iterable[object]) -> list[TyperOption]:
    return [parameter for parameter in parameters if isinstance(parameter, TyperOption)]


def _is_text(argument: str, known: set[str]) -> bool:
    """Unless its first word is an option, whose value was quoted with it."""
    return _OPTION.fullmatch(argument) is None and argument.split(maxsplit=1)[0] not in known


def hint(error: typer.TyperException) -> str:
    """What to do if the unknown option that an error is about was meant as a text; nothing for other errors."""
    context = getattr(error, "ctx", None)
    takes_texts = context is not None and any(isinstance(one, TyperArgument) for one in context.command.params)
    if not takes_texts or not hasattr(error, "option_name") or getattr(error, "possibilities", None):
        return ""
    return ", or put -- before a text that begins with a dash"
