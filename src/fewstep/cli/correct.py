"""`fewstep correct`: a text with its sentences corrected; what was changed is shown."""

import difflib
import os
import re
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from fewstep.cli.decoding import DecodingOptions
from fewstep.cli.model_names import check_corrector
from fewstep.cli.options import CorrectorOptions, Json
from fewstep.cli.report import deliver, note, progress_bar
from fewstep.cli.sources import STANDARD_OUTPUT, Touches
from fewstep.cli.terminal import printable
from fewstep.engine.correction_settings import CorrectionSettings
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from fewstep.engine.correction import Change, Corrected

_STANDARD_INPUT = Path("-")


@dataclass(frozen=True)
class CorrectionOptions(DecodingOptions):
    """How the sentences are decoded; the room for an answer follows from its sentence."""

    without = ("max_new_tokens", "canvas_length")


def correct(
    model: CorrectorOptions,
    decoding: CorrectionOptions,
    settings: CorrectionSettings,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The text to correct; - for standard input.", show_default=False),
        Touches.READS,
    ],
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Write the corrected text to FILE, and keep the old one as FILE.bak.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write the corrected text to this file; - for standard output."),
        Touches.WRITES,
    ] = None,
    json: Json = None,
) -> None:
    """Corrects the sentences of a text, and shows what it changed; --in-place or --output writes the result.

    Changes are shown sentence by sentence in a terminal, elsewhere as a patch. Code, tables and headings stay as they
    are.
    """
    if in_place and output is not None:
        raise FewstepError("--in-place writes to the file itself; leave out --output")
    if in_place and file == _STANDARD_INPUT:
        raise FewstepError("--in-place needs a file, and - is standard input; use --output")
    if in_place and not stat.S_ISREG(os.stat(file).st_mode if os.path.exists(file) else stat.S_IFREG):
        raise FewstepError(f"--in-place needs a plain file, and {file} is none; use --output")
    if STANDARD_OUTPUT == output == json:
        raise FewstepError("--output and --json cannot both go to standard output; name a file for one of them")
    data = _read(file)
    text = _decoded(data, file)
    check_corrector(model.model)
    from fewstep.engine.correction import correct_text, num_asked

    lm = model.load_model()
    started_s = time.perf_counter()
    with progress_bar("correcting", num_asked(text)) as advance:
        corrected = correct_text(lm, text, settings, progress=advance, **decoding.given())
    seconds = time.perf_counter() - started_s
    report = {
        "file": str(file), "model": lm.network.name, "role": lm.role.name, "settings": decoding.given(),
        "num_sentences": corrected.num_sentences, "num_changed": len(corrected.changes),
        "num_too_long": corrected.num_too_long, "num_refused": corrected.num_refused,
        "num_forwards": corrected.num_forwards, "seconds": seconds,
        "changes": [{"line": one.line, "before": one.before, "after": one.after} for one in corrected.changes],
    }  # fmt: skip
    kept = _write_in_place(file, data, corrected.text) if in_place else None
    if output is not None and output != STANDARD_OUTPUT:
        from fewstep.files import write_whole

        with write_whole(output) as temporary:
            temporary.write_bytes(corrected.text.encode())

    def show() -> None:
        # The text itself may be what standard output is for.
        stream = sys.stderr if STANDARD_OUTPUT in (output, json) else sys.stdout
        console = Console(file=stream, highlight=False, soft_wrap=True)
        # A terminal without colours would not tell what was taken out from what was put in.
        if console.is_terminal and console.color_system is not None and not console.no_color:
            for change in corrected.changes:
                console.print(_coloured(change))
        else:
            stream.writelines(patch(text, corrected.text, str(file)))
        if output == STANDARD_OUTPUT:
            sys.stdout.flush()
            sys.stdout.buffer.write(corrected.text.encode())
            sys.stdout.buffer.flush()

    deliver(json, report, show=show)
    note(_summary(corrected, seconds) + ("" if kept is None else f"; the old text is kept in {kept}"))


def _read(file: Path) -> bytes:
    if file == _STANDARD_INPUT:
        return sys.stdin.buffer.read()
    from fewstep.json_files import read_bytes

    return read_bytes(file)


def _decoded(data: bytes, file: Path) -> str:
    """The text; FewstepError if it is none, or if there is nothing in it."""
    name = "standard input" if file == _STANDARD_INPUT else str(file)
    if (place := data.find(b"\0")) >= 0:
        raise FewstepError(f"{name} is no text: its byte {place} is a null; name a text file")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FewstepError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it first, for example with iconv"
        ) from None
    if not text.strip("\ufeff \t\r\n"):
        raise FewstepError(f"{name} holds no text; there is nothing to correct")
    return text


def _write_in_place(file: Path, data: bytes, text: str) -> Path | None:
    """Put the text into the file, and what was there into another beside it, which is returned; None for no change."""
    from fewstep.files import write_whole
    from fewstep.json_files import read_bytes

    if text.encode() == data:
        return None
    if read_bytes(file) != data:
        raise FewstepError(f"{file} was changed by somebody else in the meantime, and is left as it is; try again")
    mode = stat.S_IMODE(os.stat(file).st_mode)
    backup = next(path for path in _backups(file) if not os.path.lexists(path))
    with write_whole(backup, mode=mode) as temporary:
        temporary.write_bytes(data)
    with write_whole(file, mode=mode) as temporary:
        temporary.write_bytes(text.encode())
    return backup


def _backups(file: Path) -> Iterator[Path]:
    """FILE.bak, and others for when older texts are kept already."""
    yield file.with_name(f"{file.name}.bak")
    number = 2
    while True:
        yield file.with_name(f"{file.name}.bak{number}")
        number += 1


def patch(before: str, after: str, name: str) -> Iterator[str]:
    """The lines of a unified diff, by which `patch` makes one text from the other."""
    old, new = (re.findall(r"[^\n]*\n|[^\n]+", text) for text in (before, after))
    for line in difflib.unified_diff(old, new, fromfile=name, tofile=name):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _coloured(change: "Change") -> Text:
    """The sentence with what was taken out in red and struck through, and what was put in in green."""
    shown = Text(f"{change.line}: ", style="dim")
    before, after = _parts(change.before), _parts(change.after)
    for kind, first, last, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            shown.append(_visible(before[first:last]), style="not dim")
            continue
        shown.append(_visible(before[first:last]), style="not dim red strike")
        shown.append(_visible(after[start:end]), style="not dim green underline")
    return shown


def _parts(text: str) -> list[str]:
    """Words, and the white space between them."""
    return re.findall(r"\s+|\S+", text)


def _visible(parts: Sequence[str]) -> str:
    """Line breaks as spaces, so that each change takes one line."""
    return printable(re.sub(r"[\t\r\n]+", " ", "".join(parts)))


def _summary(corrected: "Corrected", seconds: float) -> str:
    parts = [f"{len(corrected.changes)} of {corrected.num_sentences} sentences changed"]
    if corrected.num_too_long:
        parts.append(f"{corrected.num_too_long} left as they are, since they are too long for the model or --longest")
    if corrected.num_refused:
        parts.append(f"{corrected.num_refused} left as they are, since the answer was no correction")
    parts.append(f"{corrected.num_forwards} passes, {seconds:.2f} s")
    return "; ".join(parts)
