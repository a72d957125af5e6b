"""A request as a service keeps it, and the news of it."""

from dataclasses import dataclass, field, replace

import torch

from fewstep.decode.decoder import Decoder
from fewstep.decode.requests import Event, Output, Record, Request
from fewstep.engine.choice import EngineSetting
from fewstep.engine.language_model import LanguageModel
from fewstep.models.network import Network
from fewstep.models.text import AnswerText


@dataclass(eq=False, kw_only=True)
class Job:
    """A request that was checked, in the order of its `number`. Times are those of `time.monotonic`.

    `network`: whose forward its passes run. `record`: what its output keeps of distributions. `length` and
    `slot_bytes`: of the slot that it needs. `ahead`: the text of its answer so far, if stop texts can end it.
    """

    number: int
    model: LanguageModel
    model_name: str
    decoder: Decoder
    engine: EngineSetting
    network: Network
    request: Request
    length: int
    slot_bytes: int
    submitted_s: float
    record: Record | None = None
    time_limit_s: float | None = None
    stop: tuple[str, ...] = ()
    ahead: AnswerText | None = field(init=False)
    first_token_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.ahead = self.model.answer_text(self.stop) if self.stop else None

    @property
    def deadline_s(self) -> float:
        return float("inf") if self.time_limit_s is None else self.submitted_s + self.time_limit_s

    def tell(self, event: Event, now_s: float) -> bool:
        """Note what became final; whether a stop text is complete by it."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        if self.ahead is None:
            return False
        self.ahead.add(event.position, event.token_id)
        return self.ahead.stopped

    def finished(self, output: Output | None, now_s: float) -> Output:
        """Its output with text, and with its time since it was submitted; None is one that was not begun."""
        seconds = now_s - self.submitted_s
        if output is None:
            nothing_G = torch.zeros(0, dtype=torch.long)
            return Output(
                token_ids=[],
                num_tokens=0,
                num_forwards=0,
                seconds=seconds,
                finish_reason="cancelled",
                canvas_ids_G=nothing_G,
                step_G=nothing_G,
                confidence_G=nothing_G.float(),
            )
        return replace(self.model.with_text(output, self.stop), seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class News:
    """Of one request: that it is queued, that it has got a slot, tokens that became final, and at last its output or
    why it has none.
    """

    number: int
    job: Job | None = None
    begun: bool = False
    events: tuple[Event, ...] = ()
    output: Output | None = None
    error: Exception | None = None

    @property
    def ends(self) -> bool:
        return self.output is not None or self.error is not None
