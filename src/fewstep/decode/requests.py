"""What a decoder is asked for (requests), and what it returns (outputs, events).

Axes: G = canvas positions, D = hidden width, K = stored top tokens.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from fewstep.decode.policies import Policy
from fewstep.decode.sampling import GREEDY, Sampling


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to decode, with settings of its own.

    One batch mixes requests of different settings, and a result depends on its request alone.

    `max_new_tokens` is a limit of any size. `canvas`, for infilling, replaces it: the ids after the prompt, with mask
    ids at the positions to fill; all of them are filled, and an end-of-text among them does not stop the request. All
    noise of the request follows from `seed`. `policy`: a policy of the decoder's kind with numbers of its own
    (threshold, gaps); None is the decoder's. `stop_token_ids`: tokens that end the answer; None is those of the
    network. Without `early_stop` all passes of the canvas are run, and only the output ends there.
    """

    prompt_ids: list[int]
    max_new_tokens: int = 256
    seed: int = 0
    canvas: list[int] | None = None
    sampling: Sampling = GREEDY
    policy: Policy | None = None
    early_stop: bool = True
    stop_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The room after a request's context, as a decoder lays it out.

    `tokens`: ids, the placeholder where `open`. The request is done when the first `decode_length` positions are final;
    earlier, if `stops_early`, when an end-of-text and everything before it are final. `num_blocks` of its blocks have
    open positions; paced policies share `num_steps` among them.
    """

    tokens: list[int]
    open: list[bool]
    decode_length: int
    stops_early: bool
    num_blocks: int = 1
    num_steps: int = 1


@dataclass(frozen=True)
class Ticket:
    """The host's side of a submitted request."""

    number: int
    request: Request
    canvas: Canvas
    submitted_s: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """What an Output keeps of a finalised token's distribution: the `hidden` row it came from, its `top_k` tokens."""

    hidden: bool = False
    top_k: int | None = None


@dataclass(frozen=True)
class Event:
    """A token that became final. `position` counts from the end of the context; `step` is the number of the pass, from
    1.

    `text` is set by `LanguageModel`. Not `final`: the token may change; a `Stream` tells of such tokens where a model
    makes whole texts, and no generator does among its events.
    """

    position: int
    token_id: int
    step: int
    confidence: float
    text: str = ""
    final: bool = True


@dataclass(frozen=True)
class TopK:
    """The k most probable tokens of G distributions, best first; `tail_mass_G` is the probability of all others."""

    ids_GK: Tensor
    log_probs_GK: Tensor
    tail_mass_G: Tensor


FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ends: an end-of-text or a stop text; its limit, or a filled canvas; or its request was given up."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """A decoded request; the canvas has G positions, tensors are on the CPU.

    `token_ids`: the answer, cut after the first end-of-text (which is included) and at `max_new_tokens`; for infilling
    the whole canvas, of which `num_tokens` were filled in; of a request that was cancelled, what is final before its
    first open position, which may be nothing. `num_forwards`: target-network passes in which the request
    was live, and those of a block-causal draft, which may be as large; `num_draft_forwards`: those of a causal draft.
    `seconds`: from submission to completion. `text` is set by `LanguageModel`.

    `canvas_ids_G`, `step_G` (the pass, from 1, that finalised the position; 0 = given, -1 = still open when the
    request stopped, with a mask token or a guess in it) and `confidence_G` rebuild every intermediate state.
    `hidden_GD`: the row after the final norm that each finalised token was drawn from; `top_k`: its distribution. Both
    only if recorded, and meaningful where `step_G` > 0.
    """

    token_ids: list[int]
    num_tokens: int
    num_forwards: int
    seconds: float
    finish_reason: FinishReason
    canvas_ids_G: Tensor = field(repr=False)
    step_G: Tensor = field(repr=False)
    confidence_G: Tensor = field(repr=False)
    num_draft_forwards: int = 0
    hidden_GD: Tensor | None = field(default=None, repr=False)
    top_k: TopK | None = field(default=None, repr=False)
    text: str = ""

    @property
    def tokens_per_forward(self) -> float:
        """0 for a request that was given up before its first pass."""
        return self.num_tokens / self.num_forwards if self.num_forwards else 0.0
