"""`fewstep bench-serve`: load on a server, ours or another of OpenAI's API."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from annotated_types import Gt

import fewstep
from fewstep.cli.compare import SPECIFICATION, read_specification
from fewstep.cli.extras import require
from fewstep.cli.generate import read_prompts
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json
from fewstep.cli.report import deliver, note, print_table
from fewstep.cli.serve import KEY_VARIABLE
from fewstep.cli.sources import Touches
from fewstep.errors import FewstepError
from fewstep.values import Count, Share


def bench_serve(
    url: Annotated[str, typer.Argument(help="Address of the server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str, typer.Option(metavar=SPECIFICATION, help="Model of the server, with few-step settings.")
    ] = "gsm-student",
    concurrency: Annotated[
        str | None, typer.Option(metavar="LIST", help="So many requests at a time; 1,8,32 unless --rate is given.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(metavar="LIST", help="So many requests begin in each second, at random times.")
    ] = None,
    requests: Annotated[
        Count | None, typer.Option(help="Requests of each load; 64 unless --duration is given.")
    ] = None,
    duration: Annotated[float | None, Gt(0), typer.Option(help="Seconds of each load.")] = None,
    cut: Annotated[Share, typer.Option(help="Share of the requests whose client goes before the end.")] = 0.0,
    goal: Annotated[float, Gt(0), typer.Option(help="An answer within so many seconds counts for the goodput.")] = 10.0,
    max_tokens: Annotated[Count, typer.Option(help="Most new tokens of an answer.")] = 128,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help='Prompts: JSON lines {"prompt"} or {"messages"}.'),
        Touches.READS,
    ] = None,
    prompts: Annotated[Count, typer.Option(help="Different prompts, which are asked in turn.")] = 32,
    check: Annotated[
        bool, typer.Option("--check", help="Ask each prompt alone first, and compare answers under load with that.")
    ] = False,
    alone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Load this model here, and let it answer the prompts one after another first."
        ),
        Touches.READS_MODEL,
    ] = None,
    api_key: Annotated[str | None, typer.Option(help=f"Key of the server; by default that of {KEY_VARIABLE}.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the times at which requests begin and clients go.")] = 0,
    json: Json = None,
) -> None:
    """Puts load on a server: times to the first text and of answers, tokens a second, goodput, cut requests."""
    require("httpx2")
    if concurrency is not None and rate is not None:
        raise FewstepError("give --concurrency or --rate, not both")
    if requests is not None and duration is not None:
        raise FewstepError("give --requests or --duration, not both")
    if not url.startswith(("http://", "https://")):
        raise FewstepError(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000")
    url = url.rstrip("/").removesuffix("/v1")  # clients of OpenAI's name the address with it
    numbers = _numbers(rate, "--rate", float) if rate else _numbers(concurrency or "1,8,32", "--concurrency", int)
    name, settings = read_specification(model, texts=())
    if alone is not None:
        check_model_name(alone)
    asked = [prompt for _, prompt in read_prompts(input_file)] if input_file is not None else _questions(prompts)
    asked = asked[:prompts]
    from fewstep.measure.serving import Asker, Load, answers_alone, measured, streamed_here

    asker = Asker(
        url=url,
        fields={"model": name, "max_tokens": max_tokens, **settings},
        api_key=api_key or os.environ.get(KEY_VARIABLE) or None,
    )
    loads = [
        Load(
            **{"rate" if rate else "concurrency": number},
            num_requests=(requests or 64) if duration is None else None,
            seconds=duration,
            cut=cut,
            goal_s=goal,
            seed=seed,
        )
        for number in numbers
    ]
    rows: list[dict[str, Any]] = []
    if alone is not None:
        rows.append(streamed_here(fewstep.load(alone), asked, max_new_tokens=max_tokens, **settings))
    expected = [one.text for one in answers_alone(asker, asked if check else asked[:1])]  # it answers, and is warm
    for load in loads:
        note(f"{load.concurrency or load.rate} {'at a time' if load.concurrency else 'a second'} ...")
        rows.append(measured(asker, asked, load, alone=expected if check else None))
    deliver(json, {"url": url, "model": name, "settings": settings, "loads": rows}, show=lambda: _show(rows))


def _numbers(text: str, option: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise FewstepError(f"{option} must be numbers such as 1,8,32, got {text[:60]!r}") from None


def _questions(count: int) -> list[Any]:
    from fewstep.tasks.gsm_symbolic import problems

    return [problem.question for problem in problems("dev")[:count]]


def _show(rows: list[dict[str, Any]]) -> None:
    head = ["load", "answers", "cut", "refused", "failed", "different", "tokens/s", "good/s"]
    times = ["first text p50", "p90", "p99 (ms)", "answer p50", "p90", "p99 (ms)"]
    print_table([*head, *times], [[*_counts(row), *_times(row)] for row in rows], num_texts=1)


def _counts(row: dict[str, Any]) -> list[str]:
    load = f"{row['rate']:g} a second" if row.get("rate") else f"{row['concurrency']} at a time"
    names = ("completed", "cut", "refused", "failed", "different")
    counts = ["" if row.get(name) is None else str(row[name]) for name in names]
    rates = [
        "" if row.get(name) is None else f"{row[name]:.1f}" for name in ("tokens_per_second", "goodput_per_second")
    ]
    return ["one after another here" if row["concurrency"] == "alone" else load, *counts, *rates]


def _times(row: dict[str, Any]) -> list[str]:
    found = [one for name in ("first_text_ms", "answer_ms") for one in row[name].values()]
    return ["" if one is None else f"{one:.0f}" for one in found]
