"""The report of conversations that several contenders held: figures by group of answers, and tables of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewstep.engine.language_model import LanguageModel
from fewstep.measure.contenders import Contender, figure, markdown_table
from fewstep.measure.conversations import EVERYTHING, Conversation, History, figures_of
from fewstep.measure.timing import Timing

NO_JUDGE = (
    "No judge model is used: agreement says how much of the baseline's answers a contender reproduces, not whether its "
    "answers are good. Quality is not measured."
)
COLUMNS = {
    "answers": lambda row: row["group"],
    "contender": lambda row: row["contender"],
    "tokens/forward": figure(".2f", "tokens_per_forward"),
    "ms/forward": figure(".1f", "batch_1", "step_ms"),
    "tokens/s": figure(".1f", "batch_1", "tokens_per_second"),
    "times as fast": figure(".2f", "speed_ratio"),
    "tokens": figure(".0f", "num_tokens_mean"),
    "cut off": figure(".0%", "cut_off"),
    "repetition": figure(".3f", "health", "repetition"),
    "distinct-1": figure(".3f", "health", "distinct_1"),
    "distinct-2": figure(".3f", "health", "distinct_2"),
    "identical": figure(".1%", "agreement", "identical"),
    "common prefix": figure(".1%", "agreement", "common_prefix"),
    "similarity": figure(".1%", "agreement", "similarity"),
}


def compared_rows(
    contenders: Sequence[Contender],
    models: Mapping[str, LanguageModel],
    held: Mapping[str, Mapping[str, Any]],
    groups: Mapping[str, Sequence[str]],
    comparable: Sequence[str],
    timed: Sequence[str],
    timings: Mapping[str, Timing],
) -> list[dict[str, Any]]:
    """A row for each contender, the first of which is the baseline, with its figures for each group.

    `held`: what `hold_all` returns. `comparable`: keys of the answers that follow the same conversation for all, so
    that they can be compared one to one. `timed`: keys of those that were answered alone, in the order of `timings`.
    """
    first = contenders[0].name

    def figures(name: str, keys: Sequence[str]) -> dict[str, Any]:
        answers, references = (held[which]["answers"] for which in (name, first))
        pairs = [(answers[key]["token_ids"], references[key]["token_ids"]) for key in keys if key in among]
        places = [index for index, key in enumerate(timed) if key in keys]
        alone, reference = timings[name].at(places), timings[first].at(places)
        return figures_of([answers[key] for key in keys], pairs, alone, reference, models[name].network.eos_token_id)

    among = set(comparable)
    return [
        {
            "contender": one.name,
            "model": one.model,
            "role": models[one.name].role.name,
            "decoder": models[one.name].decoder(**one.settings).name,
            "settings": dict(one.settings),
            "groups": {group: figures(one.name, keys) for group, keys in groups.items()},
        }
        for one in contenders
    ]


def answer_rows(
    contenders: Sequence[Contender], held: Mapping[str, Mapping[str, Any]], conversations: Sequence[Conversation]
) -> Iterator[dict[str, Any]]:
    """A row for each answer, those to the same question beside each other."""
    told = ("text", "num_tokens", "num_forwards", "finish_reason")
    for conversation in conversations:
        for turn, key in enumerate(conversation.keys, start=1):
            for one in contenders:
                answer = held[one.name]["answers"][key]
                about = {"id": conversation.id, "category": conversation.category, "turn": turn, "contender": one.name}
                yield about | {name: answer[name] for name in told}


def report_of(rows: Sequence[Mapping[str, Any]], history: History, max_new_tokens: int) -> str:
    """The report as Markdown: a table of all answers, what its columns mean, and a table of the groups."""
    groups = rows[0]["groups"]
    lines = [
        {"group": group, "contender": row["contender"], **row["groups"][group]} for group in groups for row in rows
    ]
    same = {
        "baseline": "Everybody's second turn follows the baseline's first answer.",
        "own": "Everybody's second turn follows their own first answer, so agreement is about first turns alone.",
    }
    return "\n\n".join(
        [
            markdown_table([line for line in lines if line["group"] == EVERYTHING], COLUMNS),
            NO_JUDGE,
            f"{groups[EVERYTHING]['n']} answers each, greedy. {same[history]} The baseline is {rows[0]['contender']}. "
            f"Time is that of {groups[EVERYTHING]['batch_1']['n']} of them at batch 1, all contenders in turn. Tokens: "
            f"mean of an answer; cut off: share that reached {max_new_tokens} tokens. Repetition: share of 4-grams "
            "that occurred before in the answer; distinct-n falls as a set grows, so compare within a group. "
            "Identical: answers equal to the baseline's, token for token; common prefix: mean share of the baseline's "
            "answer before the first difference; similarity: mean ratio of difflib on token ids. A decoder that "
            "guarantees the baseline's tokens can differ where rounding decides between two nearly equal ones, mostly "
            "in bfloat16.",
            markdown_table([line for line in lines if line["group"] != EVERYTHING], COLUMNS),
        ]
    )
