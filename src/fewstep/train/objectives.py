"""Objectives: which documents are packed, which forwards run on them, and which losses follow.

Axes as in `documents`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.decode.decoder import whole_blocks
from fewstep.errors import FewstepError
from fewstep.models.roles import Role
from fewstep.train import corruption, losses
from fewstep.train.corruption import Corruption
from fewstep.train.documents import (
    NOISY,
    Batch,
    CanvasLengths,
    Forward,
    Inputs,
    Masking,
    PackedDocuments,
    Unmasking,
    check_packable,
)
from fewstep.train.examples import Examples


@dataclass(frozen=True)
class Loss:
    """`total` is what to descend; `parts` are detached figures for the log."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Scored:
    """A forward, the token ids that belong at its scored rows [S], and their weights (None: equal).

    With an `unmasking` it stands for the forward of the state in which the network has unmasked these.
    """

    inputs: Inputs
    truth_S: Tensor
    weights_S: Tensor | None = None
    unmasking: Unmasking | None = None


class Objective(Protocol):
    """What the trainer needs to know, in two halves: `prepare` needs no network and works on the host, so that it can
    be done ahead; `loss` computes with what it made (NamedTuples and dataclasses of tensors), moved to the device by
    `to_device`, and waits for nothing.

    Everything random comes from the generators given. `fingerprint` is JSON-able and differs for other data or
    settings. `segment_lengths` has a row an example [N, G]; where lengths are drawn, without `rng` the longest that
    may be. FewstepError naming one of the `examples` that cannot be trained on. A batch without anything to score has
    the loss 0, with a gradient.
    """

    role: Role
    examples: Examples
    num_examples: int

    def fingerprint(self) -> dict[str, Any]: ...

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray: ...

    def prepare(self, batch: Batch, generator: torch.Generator) -> Any: ...

    def loss(self, forward: Forward, prepared: Any) -> Loss: ...


def to_device(prepared: Any, device: torch.device) -> Any:
    """What `prepare` made with its tensors on `device`; a copy to a GPU does not wait for it."""
    return _map_tensors(prepared, lambda tensor: _copied(tensor, device))


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, dict)):
        raise TypeError(f"prepared tensors stand in NamedTuples and dataclasses, not in a {type(value).__name__}")
    if isinstance(value, tuple):
        return type(value)(*(_map_tensors(part, function) for part in value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value


class CausalObjective:
    """Next-token cross-entropy on completions (supervised fine-tuning of a causal model)."""

    def __init__(self, role: Role, examples: Examples, eos_token_id: int) -> None:
        if role.name != "autoregressive":
            raise FewstepError(f"causal fine-tuning needs the role autoregressive, not {role.name}")
        self.role = role
        self.examples = examples
        self.eos_token_id = eos_token_id
        self.num_examples = len(examples)
        self._lengths = examples.lengths()

    def fingerprint(self) -> dict[str, Any]:
        return {"examples": self.examples.fingerprint()}

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        return self._lengths[examples_N]

    def prepare(self, batch: Batch, generator: torch.Generator) -> Scored:
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id)
        targets = documents.is_noisy_RT.flatten().nonzero()[:, 0]
        inputs = Inputs(documents.clean_RT, documents.positions_RT, documents.layout(), targets - 1)
        return Scored(inputs, documents.clean_RT.flatten()[targets])

    def loss(self, forward: Forward, prepared: Scored) -> Loss:
        return scored_loss(forward, prepared)


def scored_loss(forward: Forward, scored: Scored) -> Loss:
    """Cross-entropy of the tokens that belong at the scored rows."""
    inputs, weights_S = scored.inputs, scored.weights_S
    if scored.unmasking is not None:
        # `Corruption` has no other weights with an unmasking.
        inputs, weights_S = scored.unmasking.go_on(forward, inputs, scored.truth_S)
    logits = forward(*inputs)
    loss = losses.cross_entropy(logits, scored.truth_S, weights_S) if len(scored.truth_S) else logits.sum()
    return Loss(loss, {"cross_entropy": loss.detach()})


class MaskedDiffusionObjective:
    """Masked denoising on references: trains a bidirectional teacher, or a block-causal network (plain block
    diffusion).

    `canvases`: how many states of its answer a document shows, each on a canvas of its own, after one context.
    """

    def __init__(
        self,
        role: Role,
        examples: Examples,
        eos_token_id: int,
        *,
        corruption: Corruption | None = None,
        canvas: CanvasLengths | None = None,
        canvases: int = 1,
    ) -> None:
        if role.name == "autoregressive":
            raise FewstepError("masked diffusion needs the role bidirectional or block_causal, not autoregressive")
        check_packable(role)
        if canvases < 1:
            raise FewstepError(f"a document has at least one canvas, got {canvases}")
        if canvases > 1 and (role.name, role.context_attention) != ("bidirectional", "causal"):
            raise FewstepError(
                "several canvases can share a context only if it does not see them: with the role bidirectional and "
                "context_attention=causal"
            )
        self.role = role
        self.examples = examples
        self.eos_token_id = eos_token_id
        self.corruption = corruption or Corruption()
        self.corruption.check(role.name)
        self.canvas = canvas or CanvasLengths(block_size=role.block_size)
        self.canvases = canvases
        self.num_examples = len(examples)
        self._lengths = examples.lengths()

    def fingerprint(self) -> dict[str, Any]:
        return {
            "examples": self.examples.fingerprint(),
            "corruption": asdict(self.corruption),
            "canvas": asdict(self.canvas),
            "canvases": self.canvases,
        }

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        context, completion = self._lengths[examples_N].T
        if self.role.name == "block_causal":
            canvas = whole_blocks(completion, self.role.block_size)
            return np.stack([context, canvas, canvas], 1)
        canvas = self.canvas.draw(completion, rng, lambda index: self.examples.name(int(examples_N[index])))
        return np.stack([context, *[canvas] * self.canvases], 1)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Scored:
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id, canvases=self.canvases)
        masking = self._mask(documents, len(batch.examples_N), generator)
        targets, rows = documents.rows(masking.scored_RT, batch)
        inputs = Inputs(documents.with_masks(masking.masked_RT), documents.positions_RT, documents.layout(), rows)
        weights = None
        if self.corruption.weighting == "inverse_ratio":
            weights = 1 / masking.ratio_RT.flatten()[targets].clamp_min(1e-3)
        unmasking = None
        if self.corruption.visited:
            unmasking = documents.unmasking(masking, targets, self.corruption.visited, generator)
        return Scored(inputs, documents.clean_RT.flatten()[targets], weights, unmasking)

    def loss(self, forward: Forward, prepared: Scored) -> Loss:
        return scored_loss(forward, prepared)

    def _mask(self, documents: PackedDocuments, num_documents: int, generator: torch.Generator) -> Masking:
        if self.role.name == "block_causal":
            return documents.mask_blocks(num_documents, self.corruption, generator)
        canvas_RT = documents.document_RT * self.canvases + (documents.packed.segment_RT - NOISY).clamp_min(0)
        num_canvases = num_documents * self.canvases
        ratio_C, leftward_C, active_C = (corruption.stratified_uniform((num_canvases,), generator) for _ in range(3))
        leftward_RT = (leftward_C < self.corruption.leftward)[canvas_RT]
        masked_RT = corruption.random_mask(canvas_RT, ratio_C, generator)
        scored_RT = torch.ones_like(masked_RT)
        if self.corruption.leftward:
            # The active block is one that decoding visits: up to the one that holds the end-of-text.
            num_blocks_RT = (documents.completion_lengths_RT - 1).div(self.role.block_size, rounding_mode="floor") + 1
            active_RT = (active_C[canvas_RT] * num_blocks_RT).long()
            block_RT = documents.block_of_response()
            within_RT = documents.masked_within_blocks(self.corruption, canvas_RT, ratio_C, generator)
            masked_RT = torch.where(leftward_RT, corruption.leftward_mask(block_RT, active_RT, within_RT), masked_RT)
            scored_RT = ~leftward_RT | (block_RT == active_RT)
        masked_RT = masked_RT & documents.is_noisy_RT
        return Masking(masked_RT, masked_RT & scored_RT, ratio_C[canvas_RT], canvas_RT, num_canvases, leftward_RT)
