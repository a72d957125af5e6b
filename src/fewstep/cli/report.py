"""What a command leaves behind: its report as JSON, tables and notes in the terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def write_report(path: Path | None, report: Any) -> None:
    """Write `report` as JSON, whole or not at all; nothing if `path` is None."""
    if path is not None:
        from fewstep.files import write_json_whole

        write_json_whole(path, report)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, num_texts: int = 1) -> None:
    """A table on standard output: drawn for a terminal, tab-separated lines for a pipe or a file.

    The first `num_texts` columns are text and may be folded; the others are figures.
    """
    if not sys.stdout.isatty():
        for row in [headers, *rows]:
            print("\t".join(str(cell) for cell in row))
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, header in enumerate(headers):
        if index < num_texts:
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def note(sentence: str) -> None:
    """A remark for a person on standard error; a pipe's output stays clean."""
    print(sentence, file=sys.stderr)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error if that is a terminal; yields what to call after each of `total` items."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
