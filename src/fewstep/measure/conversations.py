"""Two-turn conversations with a chat model: what is asked, what is answered, and figures by group.

No judge is here: health and agreement with a baseline say what changed, not which answers are better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from fewstep.decode.health import measure_health
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.made_by import answers_made_by
from fewstep.errors import FewstepError
from fewstep.json_files import read_rows
from fewstep.measure.agreement import check_same_tokens, measure_agreement
from fewstep.measure.contenders import Contender, load_contenders
from fewstep.measure.jobs import Job, results, spread
from fewstep.measure.timing import Timing
from fewstep.models.text import Message

KEPT = ("text", "token_ids", "num_tokens", "num_forwards", "num_draft_forwards", "finish_reason")
"""What is kept of an answer."""
EVERYTHING, TURNS = "all", ("turn 1", "turn 2")

History = Literal["baseline", "own"]
"""Whose first answer the second turn follows."""


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
    categories = dict.fromkeys(one.category for one in conversations)
    return [one for name in categories for one in [one for one in conversations if one.category == name][:count]]


def evenly(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """So many of them, or all, from everywhere in the list."""
    count = min(count, len(conversations))
    return [conversations[i * len(conversations) // count] for i in range(count)]


@dataclass(frozen=True)
class Held:
    """The conversations of one contender by the answers' keys: what it was asked, and KEPT of what it answered."""

    prompts: Mapping[str, Sequence[Message]]
    answers: Mapping[str, Mapping[str, Any]]


def load_for_conversations(
    contenders: Sequence[Contender], *, dtype: str = "auto", device: str = "auto"
) -> dict[str, LanguageModel]:
    """As `load_contenders`; FewstepError too if a model holds no conversations, or has other tokens than the first."""
    found = load_contenders(contenders, dtype=dtype, device=device)
    for lm in found.values():
        lm.encode([{"role": "user", "content": "Hello"}])
    check_same_tokens({name: lm.network for name, lm in found.items()})
    return found


def hold(
    lm: LanguageModel,
    conversations: Sequence[Conversation],
    settings: Mapping[str, Any],
    *,
    history: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 32,
) -> Held:
    """Both turns of every conversation. The second follows the first answer of `history`, or of `lm` itself."""

    prompts: dict[str, Sequence[Message]] = {}
    answers: dict[str, Mapping[str, Any]] = {}
    for turn in range(2):
        asked: dict[str, Sequence[Message]] = {}
        for one in conversations:
            first, key = one.keys[0], one.keys[turn]
            replies = answers if history is None else history
            before = [*prompts[first], {"role": "assistant", "content": replies[first]["text"]}] if turn else []
            asked[key] = [*before, {"role": "user", "content": one.turns[turn]}]
        outputs = lm.generate(list(asked.values()), batch_size=batch_size, **settings)
        answers |= {key: {name: getattr(one, name) for name in KEPT} for key, one in zip(asked, outputs, strict=True)}
        prompts |= asked
    return Held(prompts, answers)


def hold_all(
    contenders: Sequence[Contender],
    models: Mapping[str, LanguageModel],
    conversations: Sequence[Conversation],
    folder: Path,
    *,
    history: History,
    batch_size: int = 32,
) -> dict[str, dict[str, Any]] | None:
    """What everybody was asked and answered, by name as the fields of `Held`; the baseline is the first contender.

    It is kept in `folder`, one file for each contender: a rerun does what is missing. The jobs are shared by the
    visible GPUs, and None is returned in a process that only works, see `spread`. FewstepError for kept conversations
    of other weights, settings or prompts, or if a contender failed.
    """
    jobs: list[Job] = []
    baseline = contenders[0].name

    def run(one: Contender, needs: tuple[str, ...]) -> dict[str, Any]:
        said = results(jobs[:1], folder)[baseline]["answers"] if needs else None
        return vars(hold(models[one.name], conversations, one.settings, history=said, batch_size=batch_size))

    for one in contenders:
        needs = (baseline,) if history == "baseline" and one.name != baseline else ()
        made_by = {
            **answers_made_by(models[one.name], [], **one.settings),
            "conversations": sha256(repr(conversations).encode()).hexdigest(),
            "batch_size": batch_size,
            "follows": baseline if needs else "itself",
        }
        jobs.append(Job(name=one.name, made_by=made_by, run=partial(run, one, needs), needs=needs))
    found = spread(jobs, folder)
    if found is not None and (failed := [one.name for one in contenders if one.name not in found]):
        raise FewstepError(f"{', '.join(failed)} held no conversations; {folder}/NAME.failed says why")
    return found


def groups_of(conversations: Sequence[Conversation]) -> dict[str, list[str]]:
    """Name of a group -> keys of its answers: all, the turns, the categories."""
    groups: dict[str, list[str]] = {name: [] for name in (EVERYTHING, *TURNS)}
    for conversation in conversations:
        groups[EVERYTHING] += conversation.keys
        for turn, key in zip(TURNS, conversation.keys, strict=True):
            groups[turn].append(key)
        groups.setdefault(conversation.category, []).extend(conversation.keys)
    return groups


def figures_of(
    answers: Sequence[Mapping[str, Any]],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    alone: Timing | None,
    baseline: Timing | None,
    eos_token_id: int,
) -> dict[str, Any]:
    """A contender's figures for some of its answers; agreement is that of the `pairs` with the baseline's tokens.

    `speed_ratio` compares tokens per second, since answers may differ in length. Passes are the network's own; a
    draft's take their time and are counted apart.
    """
    drafts = fmean(one["num_draft_forwards"] for one in answers)
    return {
        "n": len(answers),
        "num_tokens_mean": fmean(one["num_tokens"] for one in answers),
        "tokens_per_forward": sum(a["num_tokens"] for a in answers) / sum(a["num_forwards"] for a in answers),
        "cut_off": fmean(one["finish_reason"] == "length" for one in answers),
        "health": measure_health((one["token_ids"] for one in answers), ignored_ids=[eos_token_id]).to_json(),
        "agreement": measure_agreement(*zip(*pairs, strict=True)).to_json() if pairs else None,
        "batch_1": alone.to_json() if alone else None,
        "speed_ratio": alone.tokens_per_second / baseline.tokens_per_second if alone and baseline else None,
        **({"num_draft_forwards_mean": drafts} if drafts else {}),
    }
