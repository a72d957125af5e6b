"""The draft objective: a gated adapter learns to write, in one pass, what its causal base would write token by token.

Axes as in `documents.py`; U = drafts of a batch, B = masks of a draft, P = places of a text, K = drafts of a
document.

A document is `[prompt | text | drafts]`. The text is the base's own, and its rows run on the base alone. A draft is a
block of B masks that begins anywhere in the text: it sees the clean rows before its start and itself, and with shifted
logits the mask at position s + j is read for token s + j + 1 (token s is what the base itself says there). So one
forward trains drafts from many starts, and the clean rows of the same forward hold the base's own distributions at the
positions that the drafts guess.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.masks import Layout
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.train.documents import Batch, Forward, Inputs
from fewstep.train.examples import Examples, fingerprint
from fewstep.train.objectives import Loss
from fewstep.values import Weight, check_fields

PROMPT, TEXT, DRAFTS = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """How drafts are trained: their number and size, and the weights of the three losses.

    A position of a draft is weighted by the probability that decoding reaches it, which is the product of the
    probabilities that the draft gives to the tokens before it (`reach` = 1); or all have the same weight (`reach` = 0);
    or the weight is a mixture of both. FewstepError if a value has no meaning.
    """

    block_size: Annotated[int, Ge(2), Le(1024), "Mask tokens of a draft."] = 32
    starts: Annotated[int, Ge(1), Le(1024), "Drafts of each text in an epoch, each with another start."] = 16
    visited: Annotated[
        float,
        Ge(0),
        Le(1),
        "Probability that a position where decoding began a draft is taken as a start before other positions.",
    ] = 0.9
    hard: Annotated[Weight, "Weight of the cross-entropy on the base's own text."] = 1.0
    divergence: Annotated[Weight, "Weight of the divergence from the base's distribution at each position."] = 0.0
    length: Annotated[Weight, "Weight of the expected number of accepted tokens, as a share of a draft."] = 1.0
    reach: Annotated[
        float,
        Ge(0),
        Le(1),
        "How strongly a position's weight follows the probability that decoding reaches it, from 0 to 1.",
    ] = 0.9

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hard + self.divergence + self.length == 0:
            raise FewstepError("all three loss weights are 0; there is nothing to learn")


@dataclass(frozen=True, kw_only=True)
class DraftBatch:
    """A forward whose first U x B scored rows are masks; `truth_UB`: the tokens that they should say, where `valid_UB`.

    The rows after those are clean, and `base_UB` is the index among them of the one that scores the same position.
    """

    inputs: Inputs
    truth_UB: Tensor
    valid_UB: Tensor
    base_UB: Tensor | None


class DraftObjective:
    """Trains the gated adapter of a network on the network's own texts.

    `examples`: prompts and the texts. `visited`, boolean, one a token of the texts: where decoding begins drafts.
    """

    def __init__(
        self,
        network: Network,
        examples: Examples,
        *,
        visited: Tensor | None = None,
        settings: DraftSettings | None = None,
    ) -> None:
        if network.adapter is None:
            raise ValueError(f"{network.name} has no gated adapter to train; add one first")
        if visited is not None and visited.shape != examples.completion_ids.shape:
            raise ValueError(f"visited marks {len(visited)} tokens of texts of {len(examples.completion_ids)}")
        self.role: Role = network.role
        self.settings = settings or DraftSettings()
        self.examples = examples
        self.visited = visited
        self.mask_token_id = network.adapter.mask_token_id
        self.num_examples = len(examples)
        self._lengths = examples.lengths()
        if self._lengths[:, 1].max() < 2:
            raise FewstepError("no text is longer than a token, so there is nothing to draft")

    def fingerprint(self) -> dict[str, Any]:
        return {
            "draft": asdict(self.settings),
            "examples": self.examples.fingerprint(),
            "visited": None if self.visited is None else fingerprint(self.visited),
            "mask_token_id": self.mask_token_id,
        }

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        prompt, text = self._lengths[examples_N].T
        num_drafts = np.minimum(self.settings.starts, text - 1)
        return np.stack([prompt, text, num_drafts * self.settings.block_size], 1)

    def prepare(self, batch: Batch, generator: torch.Generator) -> DraftBatch:
        packed, size = batch.packed, self.settings.block_size
        document_RT = packed.document_RT.clamp_min(0)
        example_RT = batch.examples_N[document_RT]
        prompt_RT, text_RT = (batch.segments_NG[document_RT, segment] for segment in (PROMPT, TEXT))
        is_draft_RT = packed.real_RT & (packed.segment_RT == DRAFTS)
        start_RT = prompt_RT + self._starts(batch, document_RT, generator)
        place_RT = packed.index_RT % size
        position_RT = torch.where(packed.segment_RT == PROMPT, packed.index_RT, prompt_RT + packed.index_RT)
        position_RT = torch.where(is_draft_RT, (start_RT + place_RT).minimum(prompt_RT + text_RT), position_RT)
        tokens_RT = torch.where(is_draft_RT, self.mask_token_id, self._clean(example_RT, position_RT, prompt_RT))
        block_RT = torch.where(is_draft_RT, start_RT, position_RT)

        masks_UB = is_draft_RT.flatten().nonzero()[:, 0].view(-1, size)
        guessed_RT = start_RT + place_RT + 1
        last_RT = prompt_RT + text_RT - 1
        valid_UB = (guessed_RT <= last_RT).flatten()[masks_UB]
        truth_RT = self._clean(example_RT, guessed_RT.minimum(last_RT), prompt_RT)
        rows_S, base_UB = masks_UB.flatten(), None
        if self.settings.divergence:
            # The clean row at the same position; a document's drafts lie behind its clean rows.
            before_RT = packed.index_RT + text_RT + prompt_RT
            first_RT = torch.arange(before_RT.numel()).view_as(before_RT) - before_RT
            clean_UB = (first_RT + (guessed_RT - 1).minimum(last_RT)).flatten()[masks_UB]
            clean_S, base = clean_UB.flatten().unique(return_inverse=True)
            rows_S, base_UB = torch.cat([rows_S, clean_S]), base.view_as(clean_UB)
        layout = Layout(packed.document_RT, block_RT, is_draft_RT)
        return DraftBatch(
            inputs=Inputs(tokens_RT, position_RT, layout, rows_S, is_draft_RT),
            truth_UB=truth_RT.flatten()[masks_UB],
            valid_UB=valid_UB,
            base_UB=base_UB,
        )

    def loss(self, forward: Forward, prepared: DraftBatch) -> Loss:
        settings, valid_UB = self.settings, prepared.valid_UB
        logits_SV = forward(*prepared.inputs)
        log_probs_NV = logits_SV[: valid_UB.numel()].float().log_softmax(-1)
        truth_UB = prepared.truth_UB
        log_right_UB = log_probs_NV.gather(1, truth_UB.flatten()[:, None]).view_as(truth_UB)
        # A position past the text's end counts as right, and weighs nothing.
        accepted_UB = torch.where(valid_UB, log_right_UB, 0.0).cumsum(1).exp()
        reached_UB = torch.nn.functional.pad(accepted_UB[:, :-1].detach(), (1, 0), value=1.0)
        weight_UB = valid_UB * (1 - settings.reach + settings.reach * reached_UB)
        weight_UB = weight_UB / weight_UB.sum().clamp_min(1.0)
        length = (accepted_UB * valid_UB).sum() / max(len(valid_UB), 1)
        hard = -(weight_UB * log_right_UB).sum()
        parts = {"hard": hard, "accepted": length}
        total = settings.hard * hard - settings.length * length / settings.block_size
        if prepared.base_UB is not None:
            base_NV = logits_SV[valid_UB.numel() :].detach().float().log_softmax(-1)[prepared.base_UB.flatten()]
            gap_N = torch.nn.functional.kl_div(log_probs_NV, base_NV, reduction="none", log_target=True).sum(-1)
            parts["divergence"] = (weight_UB.flatten() * gap_N).sum()
            total = total + settings.divergence * parts["divergence"]
        return Loss(total, {name: part.detach() for name, part in parts.items()})

    def _starts(self, batch: Batch, document_RT: Tensor, generator: torch.Generator) -> Tensor:
        """Where in the text each draft begins, at its rows [R, T]: distinct, first those that decoding visits."""
        size, examples = self.settings.block_size, self.examples
        text_N1 = batch.segments_NG[:, TEXT, None]
        place_NP = torch.arange(max(int(text_N1.max()) - 1, self.settings.starts)).expand(len(text_N1), -1)
        priority_NP = torch.rand(place_NP.shape, generator=generator)
        if self.visited is not None:
            first_N1 = examples.completion_offsets[batch.examples_N][:, None]
            visited_NP = self.visited[(first_N1 + place_NP).clamp_max(len(self.visited) - 1)]
            kept_NP = torch.rand(place_NP.shape, generator=generator) < self.settings.visited
            priority_NP = priority_NP + (visited_NP & kept_NP)
        start_NK = priority_NP.masked_fill(place_NP >= text_N1 - 1, -1.0).topk(self.settings.starts, 1).indices
        number_RT = (batch.packed.index_RT // size).clamp_max(self.settings.starts - 1)
        return start_NK[document_RT, number_RT]

    def _clean(self, example_RT: Tensor, position_RT: Tensor, prompt_RT: Tensor) -> Tensor:
        """The token of the prompt or the text at each position of its document."""
        examples = self.examples
        in_prompt_RT = position_RT < prompt_RT
        prompt = examples.prompt_offsets[example_RT] + position_RT
        text = examples.completion_offsets[example_RT] + position_RT - prompt_RT
        return torch.where(
            in_prompt_RT,
            examples.prompt_ids[prompt.clamp(0, len(examples.prompt_ids) - 1)],
            examples.completion_ids[text.clamp(0, len(examples.completion_ids) - 1)],
        ).long()
