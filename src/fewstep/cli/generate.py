"""`fewstep generate`: one prompt from the command line or standard input, or a file of prompts."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.cli.decoding import DecodingOptions
from fewstep.cli.iterations import complete_in_view
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, ModelOptions, written_file_check
from fewstep.cli.report import deliver, keeping_target, note, note_kept, progress_bar
from fewstep.cli.sources import STANDARD_OUTPUT, Touches
from fewstep.errors import FewstepError
from fewstep.values import Count, shown

if TYPE_CHECKING:
    from fewstep.decode.requests import Output
    from fewstep.engine.answers import Answer
    from fewstep.engine.language_model import LanguageModel

Picture = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw the answer as an SVG: positions from left to right, and one row for each pass.",
        callback=written_file_check("--picture"),
    ),
    Touches.WRITES,
]


def generate(
    model: ModelOptions,
    decoding: DecodingOptions,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; without it and without --input, the prompt is read from standard input."),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help='Prompts: JSON lines {"prompt"} or {"messages"}, optionally with "id".'
        ),
        Touches.READS,
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help='Results of --input: JSON lines {"id", "text", "num_tokens", "num_forwards", "seconds"}. Without it, '
            "or with -, they go to standard output.",
        ),
        Touches.WRITES,
    ] = None,
    batch_size: Annotated[Count, typer.Option(help="Prompts of --input decoded together.")] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without a template.")] = False,
    show_iterations: Annotated[
        bool,
        typer.Option("--show-iterations", help="Show what the jacobi decoder guesses in every pass, in fixed windows."),
    ] = False,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer before this text; repeat the option for further texts."),
    ] = None,
    picture: Picture = None,
    json: Json = None,
) -> None:
    """Completes one prompt, or every prompt of a file."""
    if input_file is None and output_file is not None:
        raise FewstepError("--output is for the results of --input; name a file of prompts with it")
    if prompt is not None and input_file is not None:
        raise FewstepError("give a prompt or --input, not both")
    if show_iterations and input_file is not None:
        raise FewstepError("--show-iterations shows one prompt; leave out --input")
    if picture is not None and input_file is not None:
        raise FewstepError("--picture draws the answer to one prompt; leave out --input")
    if picture == STANDARD_OUTPUT:
        raise FewstepError("--picture is drawn to a file, since standard output has the answer; name a file")
    if show_iterations and stop:
        raise FewstepError("--stop has no effect with --show-iterations, which shows whole windows; leave one out")
    settings = decoding.given() | ({"stop": tuple(stop)} if stop else {})
    check_model_name(model.model)
    if input_file is not None:
        _complete_file(model, settings, input_file, output_file, json, batch_size=batch_size, raw=raw)
        return
    text = _read_prompt(prompt)
    lm = model.load_model()
    rest: list[str] = []
    if show_iterations:
        output = complete_in_view(lm, text, raw=raw, **settings)
    else:
        output, unprinted = _complete_one(lm, text, raw=raw, **settings)
        rest = [unprinted]
    report = summary(lm, [output], settings)
    if picture is not None:
        _draw(lm, output, picture, title=f"{Path(report['model']).name}, {report['decoder']}: {_counts(report)}")
    deliver(json, report, show=lambda: print(*rest) if rest else None)
    note(describe(report))


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise FewstepError("no prompt: give one as an argument, on standard input, or with --input FILE")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        raise FewstepError("standard input is not UTF-8 text; convert it first, for example with iconv") from None
    # Some editors begin a file with a byte order mark, or end lines as Windows does.
    return text.removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\n")


def read_prompts(path: Path) -> list[tuple[Any, Any]]:
    """Id and prompt of each row, in the order of the file; a prompt without an id has the number of its line."""
    from fewstep.json_files import numbered_rows
    from fewstep.models.rows import id_key, row_id, split_prompt_row

    prompts: list[tuple[Any, Any]] = []
    lines: dict[str, int] = {}
    for line, row in numbered_rows(path):
        where = f"{path} line {line}"
        name = row_id(row, line)
        earlier = lines.setdefault(id_key(name), line)
        if earlier != line:
            raise FewstepError(f"{where}: the id {shown(name)} is that of line {earlier} too; give every row its own")
        prompt, _ = split_prompt_row(row, where)
        if not prompt:
            raise FewstepError(f"{where}: the prompt is empty; give some text")
        prompts.append((name, prompt))
    if not prompts:
        raise FewstepError(f"{path} holds no prompts")
    return prompts


def _complete_one(lm: "LanguageModel", prompt: str, **settings: Any) -> "tuple[Output, str]":
    """Answer one prompt, printing the answer as it grows in a terminal; with the output comes what is not printed."""
    stream = lm.stream(prompt, **settings)
    printed = ""
    for _ in stream:
        if sys.stdout.isatty():
            text = stream.answer_text()
            print(text.removeprefix(printed), end="", flush=True)
            printed = text
    assert stream.output is not None
    return stream.output, stream.output.text.removeprefix(printed)


def _draw(lm: "LanguageModel", output: "Output", path: Path, *, title: str) -> None:
    from fewstep.files import write_whole
    from fewstep.measure.picture import decoding_svg

    tokens = [str(lm.network.tokenizer.decode([token_id])) for token_id in output.token_ids]
    with write_whole(path) as temporary:
        drawing = decoding_svg(tokens, output.step_G[: len(tokens)].tolist(), title=title)
        temporary.write_text(drawing, encoding="utf-8")


def _complete_file(
    model: ModelOptions,
    settings: dict[str, Any],
    source: Path,
    target: Path | None,
    json: Path | None,
    *,
    batch_size: int,
    raw: bool,
) -> None:
    """Answer every prompt of a file. At batch size 1 each is submitted alone, so that its `seconds` do not count the
    wait for the others.
    """
    named = read_prompts(source)
    from fewstep.engine.answers import answer_all, check_prompts
    from fewstep.engine.made_by import answers_made_by
    from fewstep.kept import kept_results

    names, prompts = [name for name, _ in named], [prompt for _, prompt in named]
    lm = model.load_model()
    check_prompts(lm, prompts, [f"{source}, prompt {shown(name)}" for name in names], raw=raw, **settings)

    def made_by() -> dict[str, Any]:
        return answers_made_by(lm, prompts, raw=raw, **settings)

    with kept_results(keeping_target(target, json), made_by) as kept:
        note_kept(kept, len(prompts))
        with progress_bar("generating", len(prompts)) as advance:
            answered = answer_all(lm, prompts, batch_size=batch_size, kept=kept, progress=advance, raw=raw, **settings)
        report = summary(lm, answered.answers, settings)
        if answered.num_kept:
            report["answered_earlier"] = answered.num_kept
        rows = [
            {
                "id": name,
                "text": answer.text,
                "num_tokens": answer.num_tokens,
                "num_forwards": answer.num_forwards,
                "seconds": answer.seconds,
            }
            for name, answer in zip(names, answered.answers, strict=True)
        ]
        deliver(json, report, rows_path=target or STANDARD_OUTPUT, rows=rows)
    note(describe(report))


def summary(lm: "LanguageModel", outputs: "Sequence[Output | Answer]", settings: dict[str, Any]) -> dict[str, Any]:
    """The report on some outputs; the ratio is that of the sums.

    `settings` are those that were given; beside them stand those that took effect. No `steps`: one per token, or as few
    as the threshold finds.
    """
    manner = lm.manner(**settings)
    num_tokens = sum(output.num_tokens for output in outputs)
    num_forwards = sum(output.num_forwards for output in outputs)
    return {
        "model": lm.network.name,
        "role": lm.role.name,
        "decoder": manner.decoder,
        **manner.rule,
        "steps": settings.get("steps"),
        "settings": settings,
        "engine": manner.engine,
        "engine_note": manner.note,
        "dtype": manner.dtype,
        "device": str(lm.network.device),
        "n": len(outputs),
        "num_tokens": num_tokens,
        "num_forwards": num_forwards,
        "num_draft_forwards": sum(output.num_draft_forwards for output in outputs),
        "tokens_per_forward": num_tokens / num_forwards,
        "seconds": [output.seconds for output in outputs],
        "finish_reasons": [output.finish_reason for output in outputs],
        "texts": [output.text for output in outputs],
    }


def describe(report: dict[str, Any]) -> str:
    """The report in one line."""
    return f"{_counts(report)} ({report['tokens_per_forward']:.1f} per pass), {max(report['seconds']):.2f} s" + (
        f" for the slowest of {report['n']} prompts" if report["n"] > 1 else ""
    )


def _counts(report: dict[str, Any]) -> str:
    drafts = f" and {report['num_draft_forwards']} of the draft" if report["num_draft_forwards"] else ""
    return f"{report['num_tokens']} tokens in {report['num_forwards']} passes{drafts}"
