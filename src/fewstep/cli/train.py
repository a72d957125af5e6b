"""`fewstep train`: its subcommands are made on demand, since their options mirror settings classes of the trainer."""

import typer

from fewstep.cli.interruption import one_voice


def train(context: typer.Context) -> None:
    """Trains: diffusion (a teacher), cdlm (a student), cllm, embedding, medusa, draft, sft; see train --help."""
    with one_voice():
        from fewstep.cli.training import app

        code = app(args=context.args, prog_name="fewstep train", standalone_mode=False)
    if code:
        raise typer.Exit(code)


FORWARD_EVERYTHING = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
"""Context settings with which `train` receives its arguments, `--help` too, as they stand."""
