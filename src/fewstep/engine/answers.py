"""Answers to many prompts, one by one or in batches; each answer is kept when it completes, with the time for all."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le

from fewstep.decode.requests import Output
from fewstep.decode.state import State
from fewstep.engine.language_model import LanguageModel, Prompt
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.kept import Kept
from fewstep.values import MOST_INTEGER, check_fields, fitted

_Seconds = Annotated[float, Ge(0), Le(1e9)]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is kept of an Output."""

    text: str
    num_tokens: Annotated[int, Ge(0), Le(MOST_INTEGER)]
    num_forwards: Annotated[int, Ge(1), Le(MOST_INTEGER)]
    seconds: _Seconds
    finish_reason: str
    num_draft_forwards: Annotated[int, Ge(0), Le(MOST_INTEGER)] = 0

    @classmethod
    def of(cls, output: Output) -> "Answer":
        return cls(**{name: getattr(output, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Answers:
    """An answer for each prompt, in order; `num_kept` of them are of an earlier run.

    `wall_seconds` and `round_seconds` (of each round of the loop) are those of all answers, whichever run gave them.
    """

    answers: list[Answer]
    num_kept: int
    wall_seconds: float
    round_seconds: list[float]

    @property
    def step_ms(self) -> float:
        """The median time between two rounds; at batch 1 that of one forward and the work around it."""
        return 1000 * statistics.median(self.round_seconds)


def check_prompts(
    lm: LanguageModel, prompts: Sequence[Prompt], names: Sequence[str], *, raw: bool = False, **settings: Any
) -> None:
    """FewstepError with the name of the first prompt that the model cannot answer with these settings, before any is
    answered.
    """
    check, chosen = lm.checker(**settings), GenerationSettings.of(**settings)
    for prompt, name in zip(prompts, names, strict=True):
        try:
            check(chosen.request(lm.encode(prompt, raw=raw)))
        except FewstepError as error:
            raise FewstepError(f"{name}: {error}") from None


def answer_all(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    kept: Kept | None = None,
    progress: Callable[[], None] | None = None,
    raw: bool = False,
    **settings: Any,
) -> Answers:
    """Answer each prompt that has no answer in `kept`; `progress` is called after each prompt, also for those kept.

    At `batch_size` 1 the prompts are asked one after another, so that `seconds` is the time of that prompt alone; in a
    batch it counts from the common start and includes the wait for a free slot.
    """
    kept = Kept() if kept is None else kept
    entries = [_whole(kept.get(str(index))) for index in range(len(prompts))]
    missing = [index for index, entry in enumerate(entries) if entry is None]
    num_kept = len(prompts) - len(missing)
    if progress is not None:
        for _ in range(num_kept):
            progress()
    clock = _Clock()
    groups = [[index] for index in missing] if batch_size == 1 else [missing] if missing else []
    for group in groups:

        def keep(place: int, output: Output, group: list[int] = group) -> None:
            index = group[place]
            entries[index] = entry = {"answer": asdict(Answer.of(output)), **clock.lap()}
            kept.add(str(index), entry)
            if progress is not None:
                progress()

        clock.start()
        asked: Any = [prompts[index] for index in group]
        lm.generate(
            asked,
            batch_size=batch_size,
            raw=raw,
            listeners=[clock],
            on_output=keep,
            **settings,
        )
    found = [entry for entry in entries if entry is not None]
    return Answers(
        answers=[Answer(**entry["answer"]) for entry in found],
        num_kept=num_kept,
        wall_seconds=sum(entry["wall_seconds"] for entry in found),
        round_seconds=[seconds for entry in found for seconds in entry["round_seconds"]],
    )


def _whole(entry: Any) -> Any:
    """A kept entry; None, so that it is made again, if it is damaged."""
    try:
        check_fields(Answer(**entry["answer"]))
        fitted(entry["wall_seconds"], _Seconds, "wall_seconds")
        fitted(entry["round_seconds"], tuple[_Seconds, ...], "round_seconds")
    except (FewstepError, KeyError, TypeError):
        return None
    return entry


@dataclass
class _Clock:
    """A listener that notes how long each round of the loop took."""

    _round_seconds: list[float] = field(default_factory=list)
    _lap_s: float = 0.0
    _last_s: float = 0.0

    def start(self) -> None:
        self._last_s = self._lap_s = time.perf_counter()

    def __call__(self, _: State) -> None:
        now_s = time.perf_counter()
        self._round_seconds.append(now_s - self._last_s)
        self._last_s = now_s

    def lap(self) -> dict[str, Any]:
        """The time since the last lap, and the rounds in it."""
        now_s = time.perf_counter()
        told = {"wall_seconds": now_s - self._lap_s, "round_seconds": [round(one, 7) for one in self._round_seconds]}
        self._lap_s, self._round_seconds = now_s, []
        return told
