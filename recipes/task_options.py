"""Options that several recipes take: any task by name, and counts."""

from pathlib import Path
from typing import Annotated

import typer

from fewstep.tasks.registry import TASKS

TaskName = Annotated[str, typer.Option("--task", help=f"one of {', '.join(TASKS)}")]
TaskData = Annotated[
    Path | None, typer.Option("--data", help="file or folder of a task that does not ship with fewstep")
]
TaskSplit = Annotated[str | None, typer.Option("--split", help="of the task; by default its first")]

Many = Annotated[int, typer.Option(min=1)]
