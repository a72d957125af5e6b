"""What a command leaves behind: its report as JSON, tables and notes in the terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewstep.cli.sources import STANDARD_OUTPUT

if TYPE_CHECKING:
    from fewstep.kept import Kept

SECONDS_PER_LINE = 10.0


def write_report(path: Path | None, report: Any) -> None:
    """Write `report` as JSON, whole or not at all; nothing if `path` is None, and to standard output if it is `-`."""
    if path == STANDARD_OUTPUT:
        print(json.dumps(report, indent=2, allow_nan=False))
    elif path is not None:
        from fewstep.json_files import write_json_whole

        write_json_whole(path, report)


def write_rows(path: Path | None, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, all or none; to standard output if `path` is None or `-`."""
    if path is None or path == STANDARD_OUTPUT:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    from fewstep.json_files import write_rows_whole

    write_rows_whole(path, rows)


def deliver(
    report_path: Path | None,
    report: Any,
    *,
    rows_path: Path | None = None,
    rows: Iterable[Mapping[str, Any]] = (),
    show: Callable[[], None] = lambda: None,
) -> None:
    """Write a report and rows, and `show` what is for people: files come first, whatever becomes of standard output."""
    writing: list[tuple[Path | None, Callable[[], None]]] = [
        (rows_path, lambda: write_rows(rows_path, rows)),
        (report_path, lambda: write_report(report_path, report)),
    ]
    for path, write in writing:
        if path is not None and path != STANDARD_OUTPUT:
            write()
    show()
    for path, write in writing:
        if path == STANDARD_OUTPUT:
            write()


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, num_texts: int = 1) -> None:
    """An aligned table on standard output; in a terminal it is drawn and fits its width.

    The first `num_texts` columns are text, which a terminal may fold; the others are figures.
    """
    if not sys.stdout.isatty():
        _print_plain_table(headers, [[str(cell) for cell in row] for row in rows], num_texts)
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for index, header in enumerate(headers):
        if index < num_texts:
            table.add_column(header, overflow="fold")
        else:
            table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def _print_plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int) -> None:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in [headers, *rows]:
        cells = [
            cell.ljust(width) if index < num_texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def note(sentence: str) -> None:
    """A remark for a person on standard error, behind what was printed; a pipe's output stays clean."""
    sys.stdout.flush()
    print(sentence, file=sys.stderr)


def note_kept(kept: "Kept", total: int) -> None:
    """Say how many of `total` answers are there from an earlier run."""
    if kept.num_found:
        note(f"{kept.num_found} of {total} answers are kept in {kept.path}, by a run that was interrupted")


def keeping_target(*paths: Path | None) -> Path | None:
    """Beside which file answers are kept: the first that is to be written."""
    return next((path for path in paths if path is not None and path != STANDARD_OUTPUT), None)


class Advance(Protocol):
    """To be called after each item, or after `count` of them."""

    def __call__(self, count: int = 1) -> None: ...


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Advance]:
    """A bar on standard error; where that is no terminal, a line every SECONDS_PER_LINE."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=1: bar.advance(task, count)


def _lines(what: str, total: int) -> Advance:
    num_done, started_s = 0, time.monotonic()
    printed_s = started_s

    def advance(count: int = 1) -> None:
        nonlocal num_done, printed_s
        num_done += count
        now_s = time.monotonic()
        if now_s - printed_s >= SECONDS_PER_LINE:
            printed_s = now_s
            note(f"{what}: {num_done} of {total}, {now_s - started_s:.0f} s")

    return advance
