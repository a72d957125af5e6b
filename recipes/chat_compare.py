"""Decoders and trained variants of a chat model on open conversation: speed, health, and agreement with a baseline.

    python recipes/chat_compare.py --baseline plain=runs/smollm/smollm2 \\
        --contender jacobi=runs/smollm/smollm2,decoder=jacobi,window=16 \\
        --contender CLLM=runs/chat/cllm,decoder=jacobi,window=16

Everybody holds the two-turn conversations of `chat_prompts.jsonl` greedily, in batches, and what was answered is kept,
one file a contender: a rerun does what is missing. Some are answered once more, one by one, all contenders taking
turns, which gives the time of a pass. By default the second turn follows the baseline's first answer, whoever is asked,
so that answers can be compared one to one. A contender's settings are those of `fewstep compare`. No judge
model is used: quality is not measured.
"""

from pathlib import Path
from typing import Annotated

import typer
from run_recipe import run_recipe

from fewstep.cli.contenders import SPECIFICATION, greedy_contender
from fewstep.files import write_text_whole
from fewstep.json_files import write_rows_whole
from fewstep.measure.conversation_report import NO_JUDGE, answer_rows, compared_rows, report_of
from fewstep.measure.conversations import (
    EVERYTHING,
    TURNS,
    History,
    evenly,
    first_of_each,
    groups_of,
    hold_all,
    load_for_conversations,
    read_conversations,
)
from fewstep.measure.timing import time_interleaved, write_figures

app = typer.Typer(pretty_exceptions_enable=False)

PROMPTS = Path(__file__).with_name("chat_prompts.jsonl")


@app.command()
def compare(
    baseline: Annotated[str, typer.Option(metavar=SPECIFICATION, help="what the others are compared with")],
    contender: Annotated[list[str] | None, typer.Option(metavar=SPECIFICATION, help="repeatable")] = None,
    folder: Annotated[
        Path, typer.Option("--results", help="folder for chat.json, chat.md, answers.jsonl and the conversations")
    ] = Path("results/chat"),
    prompts: Annotated[Path, typer.Option(help='lines {"id", "category", "turns"}', show_default=False)] = PROMPTS,
    history: Annotated[History, typer.Option(help="whose first answer the second turn follows")] = "baseline",
    per_category: Annotated[int | None, typer.Option(min=1, help="conversations; by default all")] = None,
    timed: Annotated[int, typer.Option(min=1, help="of them, answered one by one as well")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of an answer")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Hold the conversations with everybody, and compare."""
    everyone = [greedy_contender(one, max_new_tokens) for one in (baseline, *(contender or []))]
    conversations = first_of_each(read_conversations(prompts), per_category)
    groups = groups_of(conversations)
    models = load_for_conversations(everyone, dtype=dtype, device=device)
    found = hold_all(everyone, models, conversations, folder / "conversations", history=history, batch_size=batch_size)
    if found is None:
        return

    timed_keys = groups_of(evenly(conversations, timed))[EVERYTHING]
    takers = {
        one.name: lambda key, one=one: models[one.name].generate(found[one.name]["prompts"][key], **one.settings)
        for one in everyone
    }
    timings = time_interleaved(takers, timed_keys)
    first = everyone[0].name
    comparable = groups[EVERYTHING if history == "baseline" else TURNS[0]]
    rows = compared_rows(everyone, models, found, groups, comparable, timed_keys, timings)
    network = models[first].network
    told = {
        "note": NO_JUDGE, "similarity": "difflib's ratio on token ids", "history": history,
        "max_new_tokens": max_new_tokens, "batch_size": batch_size,
        "dtype": str(network.dtype).removeprefix("torch."), "device": str(network.device),
        "baseline": first, "rows": rows,
    }  # fmt: skip
    write_figures(folder / "chat.json", told)
    write_rows_whole(folder / "answers.jsonl", answer_rows(everyone, found, conversations))
    document = report_of(rows, history, max_new_tokens)
    write_text_whole(folder / "chat.md", f"{document}\n")
    print(document, flush=True)


if __name__ == "__main__":
    run_recipe(app)
