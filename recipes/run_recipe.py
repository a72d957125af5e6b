"""Recipes end as the command line does: what went wrong in one sentence, with its exit code.

Imported before what takes long to import, so that Ctrl-C is told in a sentence from the beginning.
"""

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import typer

from fewstep.cli.interruption import INTERRUPTED, spoken_interrupts
from fewstep.cli.program import run_program

NAME = Path(sys.argv[0]).stem


def run_recipe(app: typer.Typer) -> NoReturn:
    """Run the command that was typed and exit, see `run_program`."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = spoken_interrupts()(command.callback)
    run_program(NAME, lambda: app(prog_name=NAME, standalone_mode=False))


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(f"{NAME}: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # nothing is begun; Python itself would end by the signal
    else:
        sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # a recipe runs, not a test of one
    sys.excepthook = _tell
