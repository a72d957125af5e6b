"""The Medusa objective: heads that guess further tokens, on the hidden rows of a frozen network (arXiv 2401.10774).

Axes as in `objectives.py`; K = heads. Head k (from 0), on the row that scores position t, guesses t + 1 + k.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.roles import Role
from fewstep.train.documents import Batch, Forward, Inputs, PackedDocuments
from fewstep.train.examples import Examples
from fewstep.train.objectives import Loss
from fewstep.values import check_fields

_NOTHING = -100  # what F.cross_entropy ignores


@dataclass(frozen=True, kw_only=True)
class MedusaSettings:
    """How many heads, and how much less each weighs in the loss than the one before it."""

    heads: Annotated[int, Ge(1), Le(64), "Heads, each of which guesses one token further ahead."] = 3
    decay: Annotated[float, Gt(0), Le(1), "Weight of each head's loss relative to that of the head before it."] = 0.8

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class MedusaBatch:
    """A forward, what each head should guess at each scored row [S, K], and the weights of a head's mean [S, K]."""

    inputs: Inputs
    truth_SK: Tensor
    weights_SK: Tensor


class MedusaObjective:
    """The sum over the heads of decay^(k + 1) times their cross-entropy on completions.

    Its forward must give the heads' logits, [S, K, V]: see `heads` of `trainer.train`.
    """

    def __init__(
        self, role: Role, examples: Examples, eos_token_id: int, *, settings: MedusaSettings | None = None
    ) -> None:
        if role.name != "autoregressive":
            raise FewstepError(f"Medusa heads guess for a causal network, not for one of the role {role.name}")
        self.role = role
        self.examples = examples
        self.eos_token_id = eos_token_id
        self.settings = settings or MedusaSettings()
        self.num_examples = len(examples)
        self._lengths = examples.lengths()

    def fingerprint(self) -> dict[str, Any]:
        return {"medusa": asdict(self.settings), "examples": self.examples.fingerprint()}

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return self._lengths[examples_N]

    def prepare(self, batch: Batch, generator: torch.Generator) -> MedusaBatch:
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id)
        remaining_RT = documents.completion_lengths_RT - documents.packed.index_RT - 1
        target_S = (documents.is_noisy_RT & (remaining_RT > 0)).flatten().nonzero()[:, 0]
        ahead_K = 1 + torch.arange(self.settings.heads)
        exists_SK = ahead_K <= remaining_RT.flatten()[target_S][:, None]
        guessed_SK = torch.where(exists_SK, target_S[:, None] + ahead_K, 0)
        truth_SK = torch.where(exists_SK, documents.clean_RT.flatten()[guessed_SK], _NOTHING)
        inputs = Inputs(documents.clean_RT, documents.positions_RT, documents.layout(), target_S - 1)
        return MedusaBatch(inputs, truth_SK, exists_SK / exists_SK.sum(0).clamp_min(1))

    def loss(self, forward: Forward, prepared: MedusaBatch) -> Loss:
        logits_SKV = forward(*prepared.inputs)
        losses_SK = F.cross_entropy(
            logits_SKV.flatten(0, 1).float(), prepared.truth_SK.flatten(), ignore_index=_NOTHING, reduction="none"
        ).view_as(prepared.truth_SK)
        losses_K = (losses_SK * prepared.weights_SK).sum(0)
        total = sum(
            (self.settings.decay ** (k + 1) * loss for k, loss in enumerate(losses_K)), logits_SKV.new_zeros(())
        )
        return Loss(total, {f"head_{k + 1}": loss.detach() for k, loss in enumerate(losses_K)})
