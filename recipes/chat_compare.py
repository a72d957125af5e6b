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

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from run_recipe import run_recipe

from fewstep.cli.compare import read_specification
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.files import write_text_whole
from fewstep.json_files import write_rows_whole
from fewstep.measure.agreement import check_same_tokens
from fewstep.measure.contenders import Contender, load_contenders
from fewstep.measure.conversation_report import NO_JUDGE, compared_rows, report_of
from fewstep.measure.conversations import (
    EVERYTHING,
    TURNS,
    History,
    evenly,
    first_of_each,
    groups_of,
    hold_all,
    read_conversations,
)
from fewstep.measure.timing import time_interleaved, write_figures

app = typer.Typer(pretty_exceptions_enable=False)

PROMPTS = Path(__file__).with_name("chat_prompts.jsonl")
SPECIFICATION = "NAME=MODEL[,setting=value...]"
SHARED = ("max_new_tokens", "temperature", "top_k", "top_p")
"""Settings that a contender does not have of its own: answers are greedy, and of one greatest length."""


def contender_of(specification: str, max_new_tokens: int) -> Contender:
    """What NAME=MODEL[,setting=value...] spells. FewstepError for anything else, or a setting that has no meaning."""
    name, _, rest = specification.partition("=")
    if not (name and rest.split(",")[0]):
        raise FewstepError(f"{specification!r} names no contender; write {SPECIFICATION}")
    model, settings = read_specification(rest)
    role = settings.pop("role", None)
    plain, own = GenerationSettings(), GenerationSettings.of(**settings)
    for shared in SHARED:
        if getattr(own, shared) != getattr(plain, shared):
            raise FewstepError(
                f"{shared} is not a contender's own: answers are greedy, and --max-new-tokens is for all"
            )
    return Contender(name=name, model=model, role=role, settings={**settings, "max_new_tokens": max_new_tokens})


def loaded(contenders: Sequence[Contender], *, dtype: str, device: str) -> dict[str, LanguageModel]:
    """As `load_contenders`; FewstepError too if a model holds no conversations, or has other tokens than the first."""
    found = load_contenders(contenders, dtype=dtype, device=device)
    for lm in found.values():
        lm.encode([{"role": "user", "content": "Hello"}])
    check_same_tokens({name: lm.network for name, lm in found.items()})
    return found


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
    everyone = [contender_of(one, max_new_tokens) for one in (baseline, *(contender or []))]
    conversations = first_of_each(read_conversations(prompts), per_category)
    groups = groups_of(conversations)
    models = loaded(everyone, dtype=dtype, device=device)
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
    told_of = ("text", "num_tokens", "num_forwards", "finish_reason")
    answers = [  # those to the same question beside each other
        {"id": conversation.id, "category": conversation.category, "turn": turn, "contender": one.name,
         **{name: found[one.name]["answers"][key][name] for name in told_of}}
        for conversation in conversations
        for turn, key in enumerate(conversation.keys, start=1)
        for one in everyone
    ]  # fmt: skip
    write_rows_whole(folder / "answers.jsonl", answers)
    document = report_of(rows, history, max_new_tokens)
    write_text_whole(folder / "chat.md", f"{document}\n")
    print(document, flush=True)


if __name__ == "__main__":
    run_recipe(app)
