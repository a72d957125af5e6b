"""Self-speculative decoding: one set of weights drafts a block with a gated adapter and verifies it without.

Axes: R = requests, Q = rows of a forward, C = guesses of a draft, S = rows scored, K = branches, T = masks of all
branches (K C).

A draft is C masks on base + adapter, the first of which stands where a token is still unknown; the mask at position p
guesses token p + 1. What belongs in place of the first mask the base itself says in the same forward, in the row
before. So a draft that begins at position s gives, with one token of the base's own, guesses for s + 1 .. s + C, and
needs to know the tokens before s alone.

A pass has up to three parts: the pending tokens on the base; guesses behind them, which the base verifies; and drafts
that begin where the guesses may turn out wrong. The parts share a forward because a draft for the acceptance of a
guesses begins at front + a, where the correction will stand: it sees the guesses before that place and its own masks,
and the base's row there says the correction. Drafts of different a are *branches*. They stand in slots that no later
forward sees.

- `two-pass`: a pass drafts (no guesses, one branch), the next verifies (no branch).
- `fused`: every pass verifies the last draft and drafts the next one for the `branches` most probable acceptance
  lengths, as the draft's own confidences have it: a is accepted with the chance that the guesses before it are right
  and the one after them is not. A branch is kept if it began at the right place, or earlier and has guessed what became
  final since; of several the latest. Where none did, the next pass drafts only, as the first one of a request does.
- `auto`: one or the other, and the length of drafts among a few, by what gives most tokens a second: see `chooser`. A
  fused pass then verifies no more guesses than one of its requests may hope to have accepted, rounded up to one of the
  same few lengths.

The tokens are those of autoregressive decoding, at any temperature: guesses are drawn with the noise of their
positions, and a guess is right if it equals the base's own draw. TiDAR (arXiv 2511.08923) drafts and verifies in one
forward alike, for all acceptance lengths; I-DLM (2604.11035) gates its adapter alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, accept_agreed, keep_agreed
from fewstep.decode.cycles import WITH_DRAFT, WITHOUT_DRAFT, CycleChooser, DraftCycle
from fewstep.decode.declarations import Details
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.requests import Canvas, Output, Request
from fewstep.decode.resources import Resources
from fewstep.decode.sampling import confidence
from fewstep.decode.state import State, scored_positions, write
from fewstep.decode.steps import draw_tokens
from fewstep.decode.tree import MOST_GUESSES
from fewstep.errors import FewstepError
from fewstep.models.network import Plan, Scores
from fewstep.models.roles import INVISIBLE
from fewstep.values import Count, check_fields

if TYPE_CHECKING:
    from fewstep.models.gated import GatedAdapter
else:  # its file loads PEFT, which takes a second
    GatedAdapter = Any


def where_drafts_began(output: Output) -> Tensor:
    """Of each token of an answer that was decoded in two passes a cycle, whether a draft began at it; boolean.

    Such passes draft and verify in turn, and a draft pass finalises the one token at which its draft begins.
    """
    return output.step_G[: output.num_tokens] % 2 == 1


DEFAULT_BRANCHES = 2

Cycle = Literal["two-pass", "fused", "auto"]

_WORTH_A_ROW = 0.05
"""Verified are guesses that are accepted with at least this chance."""

_CHOOSERS: WeakKeyDictionary[GatedAdapter, dict[Any, CycleChooser]] = WeakKeyDictionary()
"""What has been learnt of an adapter outlives the decoders that are built for it."""


@dataclass(frozen=True, kw_only=True)
class SelfSpeculativeState(State):
    """`drafted_R` guesses stand at the front, of which `worth_R` are worth a row.

    `odds_RC`: how probable the draft found each. `verified_R`: guesses that the last pass verified.
    """

    drafted_R: Tensor
    odds_RC: Tensor
    worth_R: Tensor
    verified_R: Tensor

    @property
    def told(self) -> tuple[Tensor, ...]:
        return self.verified_R, self.drafted_R, self.worth_R


@dataclass(frozen=True)
class Parts:
    """Of a pass, besides the pending rows: how many guesses it verifies, and how many drafts of so many masks."""

    guesses: int
    branches: int
    masks: int

    @property
    def rows(self) -> int:
        return self.guesses + self.branches * self.masks


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(Causal):
    """`window` guesses a draft; see the module for `cycle` and `branches`.

    Plan shapes, beside W pending rows (1; 2 where a fused pass left no draft; more for requests that begin): `draft m`
    (m masks), `verify n` (n guesses) and `fused n, m` (n guesses, and m masks for each branch), where m and n are the
    `window`, for `auto` also half and a quarter of it.
    """

    name: ClassVar[str] = "self-speculative"

    adapter: GatedAdapter = field(repr=False)
    window: Annotated[Count, "Guesses per pass.", Details(default="as many as a draft had in training")] = 16
    cycle: Annotated[
        Cycle,
        "Draft and verify in two passes, or in one (fused); auto: what is faster here, with shorter drafts too.",
        Details(default="fused on a GPU, two-pass on a CPU"),
    ] = "fused"
    branches: Annotated[
        Count | None, "How many acceptance lengths a fused pass drafts for.", Details(default=str(DEFAULT_BRANCHES))
    ] = None

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        if self.cycle == "two-pass" and self.branches is not None:
            raise FewstepError("branches belong to fused passes, and cycle is two-pass; leave one of them out")
        num_branches = 1 if self.cycle == "two-pass" else self.num_branches
        if self.window * num_branches > MOST_GUESSES:
            raise FewstepError(
                f"the {self.name} decoder would draft {num_branches} times {self.window} tokens in every pass; set a "
                f"smaller window or fewer branches, for at most {MOST_GUESSES}"
            )

    @property
    def num_branches(self) -> int:
        return DEFAULT_BRANCHES if self.branches is None else self.branches

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of drafts, the longest first."""
        shares = (1, 2, 4) if self.cycle == "auto" else (1,)
        return tuple(dict.fromkeys(-(-self.window // share) for share in shares))

    @cached_property
    def parts(self) -> Mapping[str, Parts]:
        """Of every kind of plan."""
        kinds: dict[str, Parts] = {}
        for masks in self.lengths:
            kinds |= {_draft(masks): Parts(0, 1, masks), _verify(masks): Parts(masks, 0, 0)}
            for guesses in self.lengths:
                if guesses <= masks and self.cycle != "two-pass":
                    kinds[_fused(guesses, masks)] = Parts(guesses, min(self.num_branches, guesses + 1), masks)
        return kinds

    @cached_property
    def chooser(self) -> CycleChooser | None:
        """What `auto` goes by, kept with the adapter."""
        if self.cycle != "auto":
            return None
        cycles = [
            cycle
            for length in self.lengths
            for cycle in (
                DraftCycle("fused", length, (_fused(length, length),), (_draft(length),)),
                DraftCycle("two-pass", length, (_draft(length), _verify(length))),
            )
        ]
        key = self.window, self.num_branches, self.adapter.mask_embedding.device, self.adapter.mask_embedding.dtype
        return _CHOOSERS.setdefault(self.adapter, {}).setdefault(key, CycleChooser(cycles))

    @classmethod
    def build(cls, resources: Resources, **given: Any) -> Self:
        """FewstepError for a network without a gated adapter."""
        adapter = resources.adapter
        if adapter is None:
            raise FewstepError(
                "the self-speculative decoder needs a model with a gated adapter; fewstep train draft makes one"
            )
        defaults: dict[str, Any] = {"window": min(adapter.block_size - 1, MOST_GUESSES // DEFAULT_BRANCHES)}
        if adapter.mask_embedding.device.type == "cpu" and "branches" not in given:
            defaults["cycle"] = "two-pass"  # a CPU pays for every row of the branches
        return cls(role=resources.role, adapter=adapter, **(defaults | given))

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=self.window + 1,
            pass_length=1 + max(parts.rows for parts in self.parts.values()),
            branching=True,
            observe=None if self.chooser is None else self.chooser.observe,
            steady=self._steady(),
        )

    def _steady(self) -> Sequence[Shape]:
        if self.cycle == "two-pass":
            return Shape(_draft(self.window), WITH_DRAFT), Shape(_verify(self.window), 1)
        return (Shape(_fused(self.window, self.window), WITHOUT_DRAFT),) if self.cycle == "fused" else ()

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        none_R = torch.zeros_like(state.front_R)
        odds_RC = torch.zeros((len(none_R), self.window))
        return SelfSpeculativeState(**vars(state), drafted_R=none_R, odds_RC=odds_RC, worth_R=none_R, verified_R=none_R)

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        masks = guesses = self.window
        cycle = self.cycle
        if self.chooser is not None:
            chosen = self.chooser.choose(len(pending_R))
            cycle, masks = chosen.kind, chosen.length
            num_worth = self.chooser.num_worth(chosen, len(pending_R))
            guesses = min(one for one in self.lengths if one >= num_worth)
        widths = (WITH_DRAFT, WITHOUT_DRAFT)
        if cycle == "two-pass":
            for members, width in grouped_passes(pending_R, shapes=widths, active=masks):
                yield members, [Shape(_draft(masks), width), Shape(_verify(masks), 1)]
            return
        fused = _fused(guesses, masks)
        for members, width in grouped_passes(pending_R, shapes=widths, active=self.parts[fused].rows):
            may_have_drafts = bool((pending_R[members] == WITH_DRAFT).any())
            yield members, [Shape(fused if may_have_drafts else _draft(masks), width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        assert isinstance(state, SelfSpeculativeState)
        parts = self.parts[shape.kind]
        trunk = cached_plan(shape.kind, state, self.role, width=shape.width, active=parts.guesses)
        if not parts.branches:
            return trunk
        assert trunk.slots_RQ is not None
        device, length = state.tokens_RL.device, state.tokens_RL.shape[1]
        done_R1, num_masks = state.done_R[:, None], parts.branches * parts.masks
        # Of every mask, where its branch begins.
        start_RT = (state.front_R[:, None] + self._branches(state, parts)).repeat_interleave(parts.masks, 1)
        mask_T = torch.arange(num_masks, device=device)
        # What follows the end of the canvas is never used; its rows stay within the positions that the network knows.
        positions_RT = (start_RT + mask_T % parts.masks).minimum(state.canvas_end_R[:, None] - 1).clamp(min=0)
        slots_RT = state.front_R[:, None] + parts.guesses + mask_T
        num_clean = shape.width + parts.guesses
        row_Q = torch.arange(num_clean + num_masks, device=device)
        branch_T = mask_T // parts.masks
        return replace(
            trunk,
            tokens_RQ=torch.cat([trunk.tokens_RQ, torch.full_like(start_RT, self.adapter.mask_token_id)], 1),
            positions_RQ=torch.cat([trunk.positions_RQ, positions_RT], 1),
            blocks_RQ=torch.cat([trunk.blocks_RQ, torch.where(done_R1, INVISIBLE, start_RT - 1)], 1),
            slots_RQ=torch.cat([trunk.slots_RQ, torch.where(done_R1, length, slots_RT)], 1),
            scored_RS=row_Q[shape.width - 1 :].expand(len(start_RT), -1),
            tree_TT=branch_T[:, None] == branch_T,
            adapted_RQ=(row_Q >= num_clean).expand(len(start_RT), -1),
        )

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        assert isinstance(state, SelfSpeculativeState)
        parts = self.parts[shape.kind]
        start_RK = state.front_R[:, None] + self._branches(state, parts)
        positions_RS = torch.cat(
            [scored_positions(state, parts.guesses + 1), _places(start_RK + 1, parts.masks).flatten(1)], 1
        )
        turn_RS = positions_RS - state.context_length_R[:, None] + 1
        tokens_RS = draw_tokens(shape.drawing, state, scores.logits_RSV, positions_RS, turn_RS)

        verified = parts.guesses + 1
        guess_S = torch.arange(verified, device=tokens_RS.device)
        agreed_RS = state.tokens_RL.gather(1, positions_RS[:, :verified]) == tokens_RS[:, :verified]
        agreed_RS &= guess_S < state.drafted_R.clamp(max=parts.guesses)[:, None]
        of_base = Scores(scores.logits_RSV[:, :verified], scores.hidden_RSD[:, :verified])
        accepted = keep_agreed(accept_agreed(self, state, tokens_RS[:, :verified], agreed_RS, of_base))
        after = accepted.state
        verified_R = state.drafted_R.clamp(max=parts.guesses)
        after = replace(after, verified_R=torch.where(state.done_R, state.verified_R, verified_R))
        if not parts.branches:
            none_R = after.drafted_R.masked_fill(~state.done_R, 0)
            return replace(accepted, state=replace(after, drafted_R=none_R, worth_R=none_R))
        shape_KC = (parts.branches, parts.masks)
        guesses_RKC = tokens_RS[:, verified:].unflatten(1, shape_KC)
        odds_RKC = confidence(scores.logits_RSV[:, verified:], tokens_RS[:, verified:]).unflatten(1, shape_KC)
        return replace(accepted, state=self._drafted(after, start_RK, guesses_RKC, odds_RKC, parts))

    def _branches(self, state: SelfSpeculativeState, parts: Parts) -> Tensor:
        """The acceptance lengths that the pass drafts for, the most probable first, [R, K]."""
        if parts.guesses == 0:
            return torch.zeros_like(state.front_R)[:, None].expand(-1, parts.branches)
        guess_C = torch.arange(parts.guesses, device=state.front_R.device)
        odds_RC = state.odds_RC[:, : parts.guesses].double()
        odds_RC = torch.where(guess_C < state.drafted_R[:, None], odds_RC, 0.0)
        reached_RS = torch.nn.functional.pad(odds_RC.cumprod(1), (1, 0), value=1.0)
        wrong_RS = torch.nn.functional.pad(1 - odds_RC, (0, 1), value=1.0)
        return (reached_RS * wrong_RS).topk(parts.branches, 1).indices

    def _drafted(
        self, after: SelfSpeculativeState, start_RK: Tensor, guesses_RKC: Tensor, odds_RKC: Tensor, parts: Parts
    ) -> SelfSpeculativeState:
        """With the guesses of the branch that fits what became final in the pass, from the new front on."""
        live_R1, size = ~after.done_R[:, None], parts.masks
        # How many guesses of a branch lie before the front now: none of the branch that began at the last final token.
        behind_RK = after.front_R[:, None] - 1 - start_RK
        place_C = torch.arange(size, device=start_RK.device)
        last = after.tokens_RL.shape[1] - 1
        tokens_RKC = after.tokens_RL.gather(1, _places(start_RK + 1, size).flatten(1).clamp(max=last))
        agreed_RKC = (guesses_RKC == tokens_RKC.view_as(guesses_RKC)) | (place_C >= behind_RK[..., None])
        fits_RK = (behind_RK >= 0) & (behind_RK < size) & agreed_RKC.all(-1)
        behind_R1, branch_R1 = behind_RK.masked_fill(~fits_RK, size).min(1, keepdim=True)
        shifted_RC = (behind_R1 + place_C).clamp(max=size - 1)

        def kept(field_RKC: Tensor) -> Tensor:
            return field_RKC.gather(1, branch_R1[..., None].expand(-1, 1, size))[:, 0].gather(1, shifted_RC)

        drafted_R1 = size - behind_R1
        odds_RC = torch.where(place_C < drafted_R1, kept(odds_RKC), 0.0)
        # The first may well be wrong, but without it there would be no draft.
        worth_R = (odds_RC.double().cumprod(1) >= _WORTH_A_ROW).sum(1).clamp(min=1)
        odds_RC = torch.nn.functional.pad(odds_RC, (0, self.window - size))
        positions_RC = scored_positions(after, size)
        open_RC = ~after.final_RL.gather(1, positions_RC) & (place_C < drafted_R1) & live_R1
        cached_R = after.cached_R
        if parts.guesses:
            lost_R = (live_R1 & (drafted_R1 == 0))[:, 0]
            cached_R = torch.where(lost_R, after.front_R - WITHOUT_DRAFT, cached_R)
        return replace(
            after,
            tokens_RL=write(after.tokens_RL, positions_RC, open_RC, kept(guesses_RKC)),
            drafted_R=torch.where(live_R1, drafted_R1, after.drafted_R[:, None])[:, 0],
            odds_RC=torch.where(live_R1, odds_RC, after.odds_RC),
            worth_R=torch.where(live_R1[:, 0], worth_R, after.worth_R),
            cached_R=cached_R,
        )


def _draft(masks: int) -> str:
    return f"draft {masks}"


def _verify(guesses: int) -> str:
    return f"verify {guesses}"


def _fused(guesses: int, masks: int) -> str:
    return f"fused {guesses}, {masks}"


def _places(first_RK: Tensor, count: int) -> Tensor:
    """`count` positions from each of these on, [R, K, C]."""
    return first_RK[..., None] + torch.arange(count, device=first_RK.device)
