"""Recipes end as the command line does: bad input in one sentence, with code 2."""

import sys
from pathlib import Path

import typer

from fewstep.errors import FewstepError


def run_recipe(app: typer.Typer) -> None:
    """Run the command that was typed; a FewstepError is printed behind the recipe's name."""
    try:
        app()
    except FewstepError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
