"""The command `fewstep` and its commands."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import fewstep
from fewstep.cli.bench import bench
from fewstep.cli.bench_serve import bench_serve
from fewstep.cli.calibrate import calibrate
from fewstep.cli.chat import chat
from fewstep.cli.collect import collect
from fewstep.cli.compare import compare
from fewstep.cli.correct import correct
from fewstep.cli.dashes import TextCommand
from fewstep.cli.demo import demo
from fewstep.cli.doctor import doctor
from fewstep.cli.evaluate import evaluate
from fewstep.cli.generate import generate
from fewstep.cli.import_ import import_
from fewstep.cli.infill import infill
from fewstep.cli.merge import merge
from fewstep.cli.models import models
from fewstep.cli.options import check_synonyms, with_option_groups
from fewstep.cli.program import run_program
from fewstep.cli.serve import serve
from fewstep.cli.train import FORWARD_EVERYTHING, train

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
    "chat": chat,
    "generate": generate,
    "infill": infill,
    "correct": correct,
    "collect": collect,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "bench-serve": bench_serve,
    "calibrate": calibrate,
    "import": import_,
    "merge": merge,
    "models": models,
    "doctor": doctor,
}

for name, command in COMMANDS.items():
    app.command(name, cls=TextCommand)(with_option_groups(command))
app.command("serve")(serve)
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
    """Run one command and exit, see `run_program`."""

    def run() -> Any:
        check_synonyms(sys.argv[1:] if arguments is None else arguments)
        return app(args=arguments, prog_name="fewstep", standalone_mode=False)

    run_program("fewstep", run)
