"""A conversation with a model: what was asked and answered, and what the model is told of it at the next question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel, Prompt
    from fewstep.models.text import Message


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer, with the settings and the figures of the answer.

    `finish_reason` is `cancelled` for an answer that was stopped; `answer` is then what was final before the first open
    position. `num_prompt_tokens` counts all that the model was told.
    """

    question: str
    answer: str
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    num_forwards: int
    seconds: float
    num_draft_forwards: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> str:
        """Its figures in one line."""
        drafts = f" and {self.num_draft_forwards} of the draft" if self.num_draft_forwards else ""
        ratio = f" ({self.num_tokens / self.num_forwards:.1f} per pass)" if self.num_forwards else ""
        stopped = {"length": ", cut off at max_new_tokens", "cancelled": ", stopped"}.get(self.finish_reason, "")
        return f"{self.num_tokens} tokens in {self.num_forwards} passes{drafts}{ratio}, {self.seconds:.2f} s{stopped}"

    def messages(self) -> "list[Message]":
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


@dataclass
class Conversation:
    """What was said so far.

    `remembers`: the model is told the turns before a question; `system`: what it is told before all of them.
    """

    system: str | None
    remembers: bool
    turns: list[Turn] = field(default_factory=list)

    def rows(self) -> "list[dict[str, list[Message]]]":
        """As rows of `messages`, which training and `generate --input` read: one, or one a turn if each was asked
        alone. A question without an answer is left out.
        """
        turns = [turn.messages() for turn in self.turns if turn.answer]
        if self.remembers:
            turns = [[message for turn in turns for message in turn]] if turns else []
        return [{"messages": [*self._beginning(), *turn]} for turn in turns]

    def prompt(self, lm: "LanguageModel", question: str, *, num_new: int) -> "tuple[Prompt, int]":
        """What the model is told for this question, and how many of the oldest turns it is not told, since the model
        has no positions for them and `num_new` tokens of an answer.
        """
        turns = [turn for turn in self.turns if turn.answer] if self.remembers else []
        for num_left_out in range(len(turns)):
            prompt = self._prompt(lm, turns[num_left_out:], question)
            if len(lm.encode(prompt)) + num_new <= lm.network.max_positions:
                return prompt, num_left_out
        return self._prompt(lm, [], question), len(turns)

    def _prompt(self, lm: "LanguageModel", turns: Sequence[Turn], question: str) -> "Prompt":
        if not lm.network.tokenizer.chat_template:
            return question
        told = [message for turn in turns for message in turn.messages()]
        return [*self._beginning(), *told, {"role": "user", "content": question}]

    def _beginning(self) -> "list[Message]":
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def conversation_with(
    lm: "LanguageModel", *, system: str | None, remembers: bool | None, bundled: bool
) -> Conversation:
    """An empty conversation. `remembers` None: as the model allows, see `why_alone`.

    FewstepError if the model's chat template, or the lack of one, does not allow what is asked for.
    """
    if not lm.network.tokenizer.chat_template:
        for option, given in (("--system", system is not None), ("--remember", remembers)):
            if given:
                raise FewstepError(f"{lm.network.name} has no chat template, so {option} has no effect; leave it out")
    conversation = Conversation(system, why_alone(lm, bundled=bundled) is None if remembers is None else remembers)
    if system is not None:
        prompt, _ = conversation.prompt(lm, "?", num_new=1)
        lm.encode(prompt)
    return conversation


def why_alone(lm: "LanguageModel", *, bundled: bool) -> str | None:
    """Why a model is by itself not told the turns before a question; None if it is."""
    if not lm.network.tokenizer.chat_template:
        return f"{lm.network.name} has no chat template"
    return f"{lm.network.name} was trained on single questions" if bundled else None
