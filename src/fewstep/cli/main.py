"""The command `fewstep`: its commands, and how it ends when something is wrong."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import fewstep
from fewstep.cli.collect import collect
from fewstep.cli.compare import compare
from fewstep.cli.dashes import TextCommand, hint
from fewstep.cli.demo import demo
from fewstep.cli.doctor import doctor
from fewstep.cli.evaluate import evaluate
from fewstep.cli.extras import missing_sentence
from fewstep.cli.generate import generate
from fewstep.cli.import_ import import_
from fewstep.cli.infill import infill
from fewstep.cli.interruption import INTERRUPTED, TERMINATED, InterruptionError, Termination
from fewstep.cli.merge import merge
from fewstep.cli.models import models
from fewstep.cli.options import check_synonyms, with_option_groups
from fewstep.cli.streams import lenient_streams
from fewstep.cli.train import FORWARD_EVERYTHING, train
from fewstep.errors import FewstepError

app = typer.Typer(
    name="fewstep",
    help="Language models that decode in a few passes: train a student from a teacher, decode fast, measure honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "generate": generate,
    "infill": infill,
    "collect": collect,
    "eval": evaluate,
    "compare": compare,
    "import": import_,
    "merge": merge,
    "models": models,
    "doctor": doctor,
}
_LONGEST_WORD = 400

for name, command in COMMANDS.items():
    app.command(name, cls=TextCommand)(with_option_groups(command))
app.command("train", context_settings=FORWARD_EVERYTHING)(train)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(fewstep.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `fewstep` itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, or 2 with one sentence on standard error, or 130 after Ctrl-C (143: SIGTERM).

    A closed standard output is no error; one that cannot take what is printed, as on a full disk, is told in a
    sentence once the command has written its files.
    """
    with lenient_streams() as streams, Termination() as termination:
        code = _run(arguments)
        sys.stdout.flush()
        failure = streams.failure()
        if code == 0 and failure is not None:
            code = _fail(f"could not write to standard output: {failure}; files that were asked for are written")
    sys.exit(TERMINATED if code == INTERRUPTED and termination.arrived else code)


def _run(arguments: Sequence[str] | None) -> int:
    # Notices about the internals of these libraries tell a user of ours nothing.
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft|torch)")
    try:
        check_synonyms(sys.argv[1:] if arguments is None else arguments)
        code = app(args=arguments, prog_name="fewstep", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(_usage_sentence(error))
    except FewstepError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        sentence = missing_sentence(error.name or "")
        if sentence is None:
            raise
        return _fail(sentence)
    except OSError as error:  # a path that may not be looked into or is too long may turn up wherever one is named
        if error.filename is None:
            raise
        return _fail(f"could not use {os.fsdecode(error.filename)}: {error.strerror or error}")
    except InterruptionError as interruption:
        _print_error(str(interruption))
        return INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _print_error("interrupted")
    return code if isinstance(code, int) else 0


def _usage_sentence(error: typer.TyperException) -> str:
    format_message = getattr(error, "format_message", None)
    message = str(format_message() if callable(format_message) else error).strip()
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "fewstep"
    return f"{message.rstrip('.')}; see {where} --help{hint(error)}" if message else f"see {where} --help"


def _fail(message: str) -> int:
    _print_error(" ".join(_shortened(word) for word in message.split()))
    return 2


def _shortened(word: str) -> str:
    """A word, such as a path, that fills screens would hide what is said about it."""
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD // 2]}...{word[-_LONGEST_WORD // 2 :]}"


def _print_error(sentence: str) -> None:
    print(f"fewstep: {sentence}", file=sys.stderr)
