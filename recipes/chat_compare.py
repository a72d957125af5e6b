"""Decoders and trained variants of a chat model on open conversation: speed, health, and agreement with a baseline.

    python recipes/chat_compare.py --baseline plain=runs/smollm/smollm2 \\
        --contender jacobi=runs/smollm/smollm2,decoder=jacobi,window=16 \\
        --contender CLLM=runs/chat/cllm,decoder=jacobi,window=16

Everybody holds the two-turn conversations of `chat_prompts.jsonl` greedily, in batches, and what was answered is kept,
one file a contender: a rerun does what is missing. Some are answered once more, one by one, all contenders taking
turns, which gives the time of a pass. By default the second turn follows the baseline's first answer, whoever is asked,
so that answers can be compared one to one. A contender's settings are those of `fewstep generate`, and `role`. No judge
model is used: quality is not measured.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import typer
from jobs import Job, result_path, results, spread
from run_recipe import run_recipe

from fewstep.cli.decoding import read_setting, spelt_settings
from fewstep.decode.health import measure_health
from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel, load
from fewstep.engine.made_by import check_made_by, made_by
from fewstep.engine.settings import GenerationSettings, aliases
from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.json_files import read_json, read_rows, write_json_whole, write_rows_whole
from fewstep.measure.agreement import measure_agreement
from fewstep.measure.timing import Timing, describe_machine, this_command, time_interleaved
from fewstep.models.roles import RoleName
from fewstep.models.text import Message

app = typer.Typer(pretty_exceptions_enable=False)
History = Literal["baseline", "own"]

PROMPTS = Path(__file__).with_name("chat_prompts.jsonl")
SPECIFICATION = "NAME=MODEL[,setting=value...]"
SHARED = {"max_new_tokens", "temperature", "top_k", "top_p", "policy"}
"""Settings that a contender does not have of its own: answers are greedy, and of one greatest length."""
EVERYTHING, TURNS = "all", ("turn 1", "turn 2")
NO_JUDGE = (
    "No judge model is used: agreement says how much of the baseline's answers a contender reproduces, not whether its "
    "answers are good. Quality is not measured."
)
COLUMNS = {
    "tokens/forward": lambda figures: f"{figures['tokens_per_forward']:.2f}",
    "ms/forward": lambda figures: _number(figures["batch_1"], "step_ms", ".1f"),
    "tokens/s": lambda figures: _number(figures["batch_1"], "tokens_per_second", ".1f"),
    "times as fast": lambda figures: _number(figures, "speed_ratio", ".2f"),
    "tokens": lambda figures: f"{figures['num_tokens_mean']:.0f}",
    "cut off": lambda figures: f"{figures['cut_off']:.0%}",
    "repetition": lambda figures: f"{figures['health']['repetition']:.3f}",
    "distinct-1": lambda figures: f"{figures['health']['distinct_1']:.3f}",
    "distinct-2": lambda figures: f"{figures['health']['distinct_2']:.3f}",
    "identical": lambda figures: _number(figures["agreement"], "identical", ".1%"),
    "common prefix": lambda figures: _number(figures["agreement"], "common_prefix", ".1%"),
    "similarity": lambda figures: _number(figures["agreement"], "similarity", ".1%"),
}
"""Heading -> cell, from the figures of one contender and group."""


# --- who and what ---


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What a person says in the two turns, whatever is answered."""

    id: str
    category: str
    turns: tuple[str, str]

    @property
    def keys(self) -> tuple[str, str]:
        """Names of the two answers."""
        return f"{self.id}/1", f"{self.id}/2"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model and how it decodes."""

    name: str
    model: str
    role: RoleName | None
    settings: Mapping[str, Any]


def read_conversations(path: Path) -> list[Conversation]:
    """FewstepError for a row without two turns of text, an id that occurs twice, or no row."""
    found: dict[str, Conversation] = {}
    for row in read_rows(path, required=("id", "category", "turns")):
        turns = row["turns"]
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, str) and t.strip() for t in turns):
            raise FewstepError(f"{path}: the turns of {row['id']!r} must be two texts, got {turns!r}")
        if row["id"] in found:
            raise FewstepError(f"{path}: the id {row['id']!r} occurs twice")
        if row["category"] in (EVERYTHING, *TURNS):
            raise FewstepError(f"{path}: the category {row['category']!r} is a name of the report; choose another")
        found[row["id"]] = Conversation(id=row["id"], category=row["category"], turns=(turns[0], turns[1]))
    if not found:
        raise FewstepError(f"{path} holds no conversation")
    return list(found.values())


def first_of_each(conversations: Sequence[Conversation], count: int | None) -> list[Conversation]:
    """The first `count` of each category; None: all."""
    by_category: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_category.setdefault(conversation.category, []).append(conversation)
    return [conversation for some in by_category.values() for conversation in some[:count]]


def evenly(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """So many of them, or all, from everywhere in the list."""
    count = min(count, len(conversations))
    return [conversations[i * len(conversations) // count] for i in range(count)]


def contenders_of(specifications: Sequence[str]) -> list[Contender]:
    """FewstepError for one that `contender_of` refuses, or if two have one name."""
    everyone = [contender_of(specification) for specification in specifications]
    names = [contender.name for contender in everyone]
    if len(set(names)) < len(names):
        raise FewstepError(f"every contender needs a name of its own, got {', '.join(names)}")
    return everyone


def contender_of(specification: str) -> Contender:
    """What NAME=MODEL[,setting=value...] spells. FewstepError for anything else, or a setting that has no meaning."""
    name, _, rest = specification.partition("=")
    model, *parts = rest.split(",")
    if not (name and model):
        raise FewstepError(f"{specification!r} names no contender; write {SPECIFICATION}")
    if "/" in name or name in (".", ".."):
        raise FewstepError(f"{name!r} names a file of answers too, so it holds no / and is not . or ..")
    known = spelt_settings()
    settings: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = aliases().get(key, key)
        if not equals or key in settings:
            raise FewstepError(f"{part!r} in {specification!r} is no setting=value that comes once")
        if key in SHARED:
            raise FewstepError(f"{key} is not a contender's own: answers are greedy, and --max-new-tokens is for all")
        settings[key] = read_setting(key, value) if key in known else value
    role: Any = settings.pop("role", None)
    GenerationSettings.of(**settings)
    return Contender(name=name, model=model, role=role, settings=settings)


def loaded(contenders: Sequence[Contender], *, dtype: str, device: str) -> dict[str, LanguageModel]:
    """Each contender's model by its name, the same weights in the same role once.

    FewstepError, before anything long, if a model cannot decode as it is asked to, holds no conversations, or has other
    tokens than the first one.
    """
    models: dict[tuple[str, RoleName | None], LanguageModel] = {}
    for contender in contenders:
        place = contender.model, contender.role
        lm = models[place] = models.get(place) or load(contender.model, contender.role, dtype, device)
        lm.decoder(**contender.settings)
        lm.encode([{"role": "user", "content": "Hello"}])
    found = {contender.name: models[contender.model, contender.role] for contender in contenders}
    (first, baseline), *others = found.items()
    for name, lm in others:
        theirs, ours = (one.network.tokenizer.get_vocab().items() for one in (baseline, lm))
        if not (theirs <= ours or ours <= theirs):
            raise FewstepError(f"{name} has other tokens than {first}; agreement compares token by token")
    return found


# --- conversations ---


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is kept of an output."""

    text: str
    token_ids: list[int]
    num_tokens: int
    num_forwards: int
    num_draft_forwards: int
    finish_reason: str


@dataclass(frozen=True)
class Held:
    """The conversations of one contender: what it was asked and what it answered, by the answers' keys."""

    prompts: Mapping[str, Sequence[Message]]
    answers: Mapping[str, Answer]

    def to_json(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "answers": {key: asdict(answer) for key, answer in self.answers.items()}}

    @classmethod
    def of_json(cls, told: Mapping[str, Any]) -> "Held":
        return cls(told["prompts"], {key: Answer(**answer) for key, answer in told["answers"].items()})


def hold(
    lm: LanguageModel,
    conversations: Sequence[Conversation],
    settings: Mapping[str, Any],
    *,
    history: Held | None = None,
    batch_size: int = 32,
) -> Held:
    """Both turns of every conversation. The second follows the first answer of `history`, or of `lm` itself."""

    def answered(prompts: Mapping[str, Sequence[Message]]) -> dict[str, Answer]:
        outputs = lm.generate(list(prompts.values()), batch_size=batch_size, **settings)
        return {
            key: Answer(**{field.name: getattr(output, field.name) for field in fields(Answer)})
            for key, output in zip(prompts, outputs, strict=True)
        }

    prompts: dict[str, Sequence[Message]] = {
        conversation.keys[0]: [_said("user", conversation.turns[0])] for conversation in conversations
    }
    answers = answered(prompts)
    replies = answers if history is None else history.answers
    seconds: dict[str, Sequence[Message]] = {
        second: [*prompts[first], _said("assistant", replies[first].text), _said("user", conversation.turns[1])]
        for conversation in conversations
        for first, second in [conversation.keys]
    }
    return Held({**prompts, **seconds}, {**answers, **answered(seconds)})


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contender: its model and conversations, and the time of those answers that it gave once more, alone."""

    lm: LanguageModel
    held: Held
    timing: Timing
    timed_keys: Sequence[str]

    def alone(self, keys: Collection[str]) -> Timing | None:
        """The part of the timing that is about these keys; None if none of them was timed."""
        at = [index for index, key in enumerate(self.timed_keys) if key in keys]
        if not at:
            return None
        seconds, forwards, tokens = self.timing.seconds, self.timing.num_forwards, self.timing.num_tokens
        return Timing([seconds[i] for i in at], [forwards[i] for i in at], [tokens[i] for i in at])


def jobs_of(
    models: Mapping[str, LanguageModel],
    settings: Mapping[str, Mapping[str, Any]],
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    history: History,
    batch_size: int,
) -> list[Job]:
    """A job for each contender, the baseline first, whose file in `folder` the others may need."""
    baseline = next(iter(models))

    def run(name: str, follows: bool) -> dict[str, Any]:
        said = Held.of_json(read_json(result_path(folder, baseline))) if follows else None
        held = hold(models[name], conversations, settings[name], history=said, batch_size=batch_size)
        return {"made_by": made_by(models[name]), **held.to_json()}

    follow = {name: history == "baseline" and name != baseline for name in models}
    return [
        Job(name=name, run=partial(run, name, follow[name]), needs=(baseline,) if follow[name] else ())
        for name in models
    ]


def held_conversations(
    folder: Path, models: Mapping[str, LanguageModel], conversations: Sequence[Conversation], history: History
) -> dict[str, Held]:
    """What the jobs left, the baseline first.

    FewstepError if somebody's is missing, was made by another model, or follows other first answers.
    """
    kept = results(folder)
    if missing := [name for name in models if name not in kept]:
        raise FewstepError(f"{', '.join(missing)} held no conversations; {folder}/NAME.failed says why")
    held = {name: Held.of_json(kept[name]) for name in models}
    baseline = next(iter(held.values()))
    for name, lm in models.items():
        check_made_by(lm, kept[name], result_path(folder, name))
        replies = (held[name] if history == "own" else baseline).answers
        for first, second in (conversation.keys for conversation in conversations):
            if held[name].prompts[second][1]["content"] != replies[first].text:
                raise FewstepError(f"{result_path(folder, name)} follows the answers of another baseline: delete it")
    return held


def measured(
    models: Mapping[str, LanguageModel],
    settings: Mapping[str, Mapping[str, Any]],
    held: Mapping[str, Held],
    timed_keys: Sequence[str],
) -> dict[str, Measured]:
    """Everybody's conversations, and their answers of `timed_keys` once more, one by one, all taking turns."""

    def answer(name: str, key: str) -> Output:
        return models[name].generate(held[name].prompts[key], **settings[name])

    timings = time_interleaved({name: partial(answer, name) for name in held}, timed_keys)
    return {
        name: Measured(lm=models[name], held=one, timing=timings[name], timed_keys=timed_keys)
        for name, one in held.items()
    }


# --- figures ---


def groups_of(conversations: Sequence[Conversation]) -> dict[str, list[str]]:
    """Name of a group -> keys of its answers: all, the turns, the categories."""
    groups: dict[str, list[str]] = {name: [] for name in (EVERYTHING, *TURNS)}
    for conversation in conversations:
        groups[EVERYTHING] += conversation.keys
        for turn, key in zip(TURNS, conversation.keys, strict=True):
            groups[turn].append(key)
        groups.setdefault(conversation.category, []).extend(conversation.keys)
    return groups


def figures_of(one: Measured, baseline: Measured, keys: Sequence[str], comparable: Collection[str]) -> dict[str, Any]:
    """A contender's figures for the answers of these keys; agreement is that of the `comparable` ones, None without.

    `speed_ratio` compares tokens per second, since answers may differ in length. Passes are the network's own; a
    draft's take their time and are counted apart.
    """
    answers = [one.held.answers[key] for key in keys]
    alone, reference = one.alone(keys), baseline.alone(keys)
    drafts = fmean(answer.num_draft_forwards for answer in answers)
    eos_token_id = one.lm.network.eos_token_id
    pairs = [[each.held.answers[key].token_ids for each in (one, baseline)] for key in keys if key in comparable]
    return {
        "n": len(answers),
        "num_tokens_mean": fmean(answer.num_tokens for answer in answers),
        "tokens_per_forward": sum(a.num_tokens for a in answers) / sum(a.num_forwards for a in answers),
        "cut_off": fmean(answer.finish_reason == "length" for answer in answers),
        "health": measure_health((answer.token_ids for answer in answers), ignored_ids=[eos_token_id]).to_json(),
        "agreement": measure_agreement(*zip(*pairs, strict=True)).to_json() if pairs else None,
        "batch_1": alone.to_json() if alone else None,
        "speed_ratio": alone.tokens_per_second / reference.tokens_per_second if alone and reference else None,
        **({"num_draft_forwards_mean": drafts} if drafts else {}),
    }


def row_of(
    contender: Contender,
    one: Measured,
    baseline: Measured,
    groups: Mapping[str, Sequence[str]],
    comparable: Collection[str],
) -> dict[str, Any]:
    """How a contender decodes, and its figures by group."""
    return {
        "contender": contender.name,
        "model": contender.model,
        "role": one.lm.role.name,
        "decoder": one.lm.decoder(**contender.settings).name,
        "settings": dict(contender.settings),
        "groups": {name: figures_of(one, baseline, keys, comparable) for name, keys in groups.items()},
    }


def table_of(rows: Sequence[Mapping[str, Any]], groups: Iterable[str]) -> str:
    """Markdown, a line for each group and contender."""
    headings = ["answers", "contender", *COLUMNS]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for group in groups:
        for row in rows:
            cells = [group, row["contender"], *(cell(row["groups"][group]) for cell in COLUMNS.values())]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(figures: Mapping[str, Any] | None, name: str, form: str) -> str:
    """A cell, empty for a figure that is not there."""
    return "" if figures is None or figures[name] is None else format(figures[name], form)


def document_of(rows: Sequence[Mapping[str, Any]], history: History, max_new_tokens: int) -> str:
    """The report as Markdown: a table of all answers, what its columns mean, and a table of the groups."""
    whole = rows[0]["groups"][EVERYTHING]
    same = {
        "baseline": "Everybody's second turn follows the baseline's first answer.",
        "own": "Everybody's second turn follows their own first answer, so agreement is about first turns alone.",
    }
    return "\n\n".join(
        [
            table_of(rows, [EVERYTHING]),
            NO_JUDGE,
            f"{whole['n']} answers each, greedy. {same[history]} The baseline is {rows[0]['contender']}. Time is that "
            f"of {whole['batch_1']['n']} of them at batch 1, all contenders in turn. Tokens: mean of an answer; cut "
            f"off: share that reached {max_new_tokens} tokens. Repetition: share of 4-grams that occurred before in "
            "the answer; distinct-n falls as a set grows, so compare within a group. Identical: answers equal to the "
            "baseline's, token for token; common prefix: mean share of the baseline's answer before the first "
            "difference; similarity: mean ratio of difflib on token ids. A decoder that guarantees the baseline's "
            "tokens can differ where rounding decides between two nearly equal ones, mostly in bfloat16.",
            table_of(rows, [name for name in rows[0]["groups"] if name != EVERYTHING]),
        ]
    )


def answers_of(conversations: Sequence[Conversation], found: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Every answer, those to the same question beside each other."""
    return [
        {"id": conversation.id, "category": conversation.category, "turn": turn, "contender": name, "text": answer.text,
         "num_tokens": answer.num_tokens, "num_forwards": answer.num_forwards, "finish_reason": answer.finish_reason}
        for conversation in conversations
        for turn, key in enumerate(conversation.keys, start=1)
        for name, one in found.items()
        for answer in [one.held.answers[key]]
    ]  # fmt: skip


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
    everyone = contenders_of([baseline, *(contender or [])])
    conversations = first_of_each(read_conversations(prompts), per_category)
    groups = groups_of(conversations)
    models = loaded(everyone, dtype=dtype, device=device)
    settings = {one.name: {"max_new_tokens": max_new_tokens, **one.settings} for one in everyone}
    kept = folder / "conversations"
    jobs = jobs_of(models, settings, conversations, kept, history=history, batch_size=batch_size)
    asked = {
        "conversations": blake2b(repr(conversations).encode(), digest_size=4).hexdigest(),
        "history": history, "longest answer": max_new_tokens, "batch size": batch_size,
        **{f"contender {one.name}": f"{one.model} {one.role} {dict(one.settings)}" for one in everyone},
    }  # fmt: skip
    if not spread(lambda: jobs, kept, settings=asked):
        return
    held = held_conversations(kept, models, conversations, history)
    found = measured(models, settings, held, groups_of(evenly(conversations, timed))[EVERYTHING])
    first = found[everyone[0].name]
    comparable = set(groups[EVERYTHING if history == "baseline" else TURNS[0]])
    rows = [row_of(one, found[one.name], first, groups, comparable) for one in everyone]
    told = {
        "command": this_command(),
        "machine": describe_machine(),
        "note": NO_JUDGE,
        "similarity": "difflib's ratio on token ids",
        "history": history,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "dtype": str(first.lm.network.dtype).removeprefix("torch."),
        "device": str(first.lm.network.device),
        "baseline": everyone[0].name,
        "rows": rows,
    }
    write_json_whole(folder / "chat.json", told)
    write_rows_whole(folder / "answers.jsonl", answers_of(conversations, found))
    document = document_of(rows, history, max_new_tokens)
    with write_whole(folder / "chat.md") as temporary:
        temporary.write_text(f"{document}\n", encoding="utf-8")
    print(document, flush=True)


if __name__ == "__main__":
    run_recipe(app)
