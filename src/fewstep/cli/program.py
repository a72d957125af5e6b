"""How a program ends, a command or a recipe: what went wrong in one sentence on standard error, and an exit code."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from fewstep.cli.dashes import hint
from fewstep.cli.extras import missing_sentence
from fewstep.cli.interruption import INTERRUPTED, TERMINATED, InterruptionError, Termination
from fewstep.cli.streams import lenient_streams
from fewstep.errors import FewstepError

_LONGEST_WORD = 400


def run_program(name: str, run: Callable[[], Any]) -> NoReturn:
    """Run one command and exit: 0, or 2 with one sentence on standard error, or 130 after Ctrl-C (143: SIGTERM).

    `run` returns an exit code or anything else, as an app of typer does outside of its standalone mode. A closed
    standard output is no error; one that cannot take what is printed, as on a full disk, is told in a sentence once
    the command has written its files.
    """
    with lenient_streams() as streams, Termination() as termination:
        code = _code_of(name, run)
        sys.stdout.flush()
        failure = streams.failure()
        if code == 0 and failure is not None:
            code = _fail(name, f"could not write to standard output: {failure}; files that were asked for are written")
    sys.exit(TERMINATED if code == INTERRUPTED and termination.arrived else code)


def _code_of(name: str, run: Callable[[], Any]) -> int:
    # Notices about the internals of these libraries tell a user of ours nothing.
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|torch)")
    warnings.formatwarning = lambda message, *_, **__: f"{name}: {message}\n"  # where in the code is no user's business
    try:
        code = run()
    except typer.TyperException as error:
        return _fail(name, _usage_sentence(name, error))
    except FewstepError as error:
        return _fail(name, str(error))
    except ModuleNotFoundError as error:
        sentence = missing_sentence(error.name or "")
        if sentence is None:
            raise
        return _fail(name, sentence)
    except OSError as error:  # a path that may not be looked into or is too long may turn up wherever one is named
        if error.filename is None:
            raise
        return _fail(name, f"could not use {os.fsdecode(error.filename)}: {error.strerror or error}")
    except InterruptionError as interruption:
        _print_error(name, str(interruption))
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _print_error(name, "interrupted")
    return code if isinstance(code, int) else 0


def _usage_sentence(name: str, error: typer.TyperException) -> str:
    format_message = getattr(error, "format_message", None)
    message = str(format_message() if callable(format_message) else error).strip()
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else name
    return f"{message.rstrip('.')}; see {where} --help{hint(error)}" if message else f"see {where} --help"


def _fail(name: str, message: str) -> int:
    _print_error(name, " ".join(_shortened(word) for word in message.split()))
    return 2


def _shortened(word: str) -> str:
    """A word, such as a path, that fills screens would hide what is said about it."""
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD // 2]}...{word[-_LONGEST_WORD // 2 :]}"


def _print_error(name: str, sentence: str) -> None:
    print(f"{name}: {sentence}", file=sys.stderr)
