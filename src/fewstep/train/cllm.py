"""The CLLM objective: consistency training of a causal network on its own Jacobi trajectories (arXiv 2403.00835).

Axes as in `objectives.py`; W = windows of all trajectories, Z = flat tokens of all their states, K = states of a window
before the fixed point, C = noisy rows to score, A = rows that score the answer.

A document is `[prompt | noisy windows | clean answer]`: all windows of an answer train in one forward, as in Jacobi
Forcing (arXiv 2512.14681). A noisy window holds one of its states, and sees the prompt, the clean answer before it and
itself causally, which is what a Jacobi pass computes. Its goal, the detached distributions of the fixed point, are
those of the clean rows at the same positions, so the forward that anchors the network yields them too.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.masks import Layout
from fewstep.models.roles import Role
from fewstep.train import corruption, losses
from fewstep.train.documents import CLEAN, Batch, Forward, Inputs, PackedDocuments
from fewstep.train.examples import Examples, fingerprint
from fewstep.train.objectives import Loss
from fewstep.values import Count, Share, Weight, check_fields

Goal = Literal["global", "local"]
Noise = Literal["uniform", "progressive"]
Labels = Literal["trajectory", "reference"]


@dataclass(frozen=True)
class JacobiTable:
    """Jacobi trajectories as flat tensors.

    `examples`: prompts and greedy answers, each decoded in windows of `window` tokens from its start, the last cut at
    the answer's end. `states_Z`: the tokens of each window before the first pass and after each, one state after the
    other; the last is the fixed point. `num_states_W`: at least 2.
    """

    examples: Examples
    window: int
    states_Z: Tensor
    num_states_W: Tensor

    def __post_init__(self) -> None:
        if len(self.num_states_W) != int(self.first_window_N[-1]):
            raise ValueError(f"{len(self.num_states_W)} windows for answers of {int(self.first_window_N[-1])}")
        if len(self.states_Z) != int(self.first_token_W[-1]):
            raise ValueError(f"{len(self.states_Z)} tokens for states of {int(self.first_token_W[-1])}")

    @cached_property
    def first_window_N(self) -> Tensor:
        """The number of each example's first window, and that of all, [N + 1]."""
        counts_N = -(-self.examples.completion_offsets.diff() // self.window)
        return torch.nn.functional.pad(counts_N.cumsum(0), (1, 0))

    @cached_property
    def length_W(self) -> Tensor:
        """Tokens of each window: all have the same number, but the last of an answer."""
        counts_N = self.first_window_N.diff()
        index_W = torch.arange(int(counts_N.sum())) - self.first_window_N[:-1].repeat_interleave(counts_N)
        answer_W = self.examples.completion_offsets.diff().repeat_interleave(counts_N)
        return (answer_W - index_W * self.window).clamp_max(self.window)

    @cached_property
    def first_token_W(self) -> Tensor:
        """Where each window's states begin in `states_Z`, and where they end, [W + 1]."""
        return torch.nn.functional.pad((self.length_W * self.num_states_W).cumsum(0), (1, 0))

    @cached_property
    def wrong_WK(self) -> Tensor:
        """The share of each state's tokens that differ from the fixed point; infinite where there is no such state."""
        length_W, num_states_W = self.length_W.numpy(), self.num_states_W.numpy()
        of_state = np.repeat(length_W, num_states_W)
        window_Z = np.repeat(np.arange(len(length_W)), length_W * num_states_W)
        offset_Z = np.arange(len(window_Z)) - self.first_token_W.numpy()[window_Z]
        last_Z = self.first_token_W.numpy()[window_Z + 1] - length_W[window_Z]
        states_Z = self.states_Z.numpy()
        differs_Z = states_Z != states_Z[last_Z + offset_Z % length_W[window_Z]]
        wrong = np.add.reduceat(differs_Z.astype(np.int64), np.concatenate([[0], of_state.cumsum()[:-1]])) / of_state
        table_WK = np.full((len(length_W), int(num_states_W.max())), np.inf, dtype=np.float32)
        index = np.arange(len(of_state)) - np.repeat(num_states_W.cumsum() - num_states_W, num_states_W)
        table_WK[np.repeat(np.arange(len(length_W)), num_states_W), index] = wrong
        table_WK[np.arange(len(length_W)), num_states_W - 1] = np.inf  # the fixed point itself
        return torch.from_numpy(table_WK[:, :-1])

    def fingerprint(self) -> str:
        """Differs for other trajectories or another window."""
        return f"{self.window}: {self.examples.fingerprint()} {fingerprint(self.states_Z, self.num_states_W)}"


@dataclass(frozen=True, kw_only=True)
class CLLMSettings:
    """The weights of the two losses and how each is formed.

    The consistency loss is between a window's state and its fixed point (`global`) or its next state (`local`), from
    the first token on in which they differ. A state is drawn uniformly for each window (`uniform`, as published), or
    the windows of an answer take the states nearest to noise ratios that rise from 1 / `noise_cycle` to 1 and begin
    again (`progressive`, Jacobi Forcing; where the cycle begins is drawn for each answer). In a share `augmented` of
    the windows half of the wrong tokens are corrected. The autoregressive loss is on the network's own answer
    (`trajectory`), or on reference answers as separate documents. FewstepError for a consistency loss without it,
    unless forced.
    """

    consistency: Annotated[Weight, "Weight of the divergence of a window's state from its goal."] = 1.0
    autoregressive: Annotated[Weight, "Weight of the cross-entropy that anchors the model."] = 10.0
    goal: Annotated[Goal, "The target of a state: the fixed point of its window, or its next state."] = "global"
    labels: Annotated[Labels, "Cross-entropy on the model's own answers, or on the reference answers."] = "trajectory"
    noise: Annotated[Noise, "Train on any state of a window, or on noise ratios that rise from window to window."] = (
        "uniform"
    )
    noise_cycle: Annotated[Count, "Number of windows over which the ratio of progressive noise rises to 1."] = 8
    augmented: Annotated[Share, "Share of windows in which half of the wrong tokens are corrected."] = 0.0
    temperature: Annotated[float, Gt(0), Le(1e6), "Temperature of both distributions in the consistency loss."] = 1.0
    label_smoothing: Annotated[float, Ge(0), Lt(1), "Label smoothing of the cross-entropy."] = 0.0
    allow_unanchored: Annotated[bool, "Allow a consistency loss without another loss, which may collapse."] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.consistency + self.autoregressive == 0:
            raise FewstepError("both loss weights are 0; there is nothing to learn")
        if self.augmented and self.goal == "local":
            raise FewstepError("an augmented state has no next state; use the global goal or set augmented to 0")
        if self.consistency and not self.autoregressive and not self.allow_unanchored:
            raise FewstepError(
                "a consistency loss alone may collapse; add an autoregressive loss, or force it with allow_unanchored"
            )


@dataclass(frozen=True, kw_only=True)
class CLLMBatch:
    """A forward whose first C scored rows are noisy and the others clean, and what is compared.

    Indices into the clean ones: `goal_C`, those at the positions of the noisy ones; `answer_A`, those that score the
    text, where `truth_A` belongs. `next_inputs`: for local goals, the same windows one state later.
    """

    inputs: Inputs
    num_noisy: int
    goal_C: Tensor
    answer_A: Tensor
    truth_A: Tensor
    next_inputs: Inputs | None


class CLLMObjective:
    """Trains a causal network on its own Jacobi trajectories."""

    def __init__(
        self,
        role: Role,
        table: JacobiTable,
        eos_token_id: int,
        *,
        references: Examples | None = None,
        settings: CLLMSettings | None = None,
    ) -> None:
        if role.name != "autoregressive":
            raise FewstepError(f"CLLM trains a causal network, not one of the role {role.name}")
        self.role = role
        self.table = table
        self.eos_token_id = eos_token_id
        self.settings = settings or CLLMSettings()
        self._on_references = bool(self.settings.autoregressive) and self.settings.labels == "reference"
        self.examples = table.examples
        if self._on_references:
            if references is None:
                raise FewstepError("labels reference needs reference answers, which these trajectories do not hold")
            self.examples = Examples.joined([table.examples, references])
        self.num_examples = len(self.examples)
        self._lengths = self.examples.lengths()

    def fingerprint(self) -> dict[str, Any]:
        return {
            "cllm": asdict(self.settings),
            "examples": self.examples.fingerprint(),
            "trajectories": self.table.fingerprint(),
        }

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        context, answer = self._lengths[examples_N].T
        return np.stack([context, np.where(examples_N < len(self.table.examples), answer, 0), answer], 1)

    def prepare(self, batch: Batch, generator: torch.Generator) -> CLLMBatch:
        documents = PackedDocuments(self.role, self.examples, batch, self.eos_token_id)
        windows = _Windows(self, documents, batch, generator)
        scored_RT = windows.scored() if self.settings.consistency else torch.zeros_like(documents.is_noisy_RT)
        noisy_C = scored_RT.flatten().nonzero()[:, 0]
        # The clean answer lies behind the noisy one, which is as long, or missing.
        noisy_lengths_RT = batch.segments_NG[documents.document_RT, 1]
        goal_C = noisy_C + noisy_lengths_RT.flatten()[noisy_C]
        target_A, row_A = self._answers(documents, noisy_lengths_RT)
        clean_S = torch.cat([goal_C, row_A]).unique()
        layout = windows.layout()

        def inputs(tokens_RT: Tensor, rows: Tensor) -> Inputs:
            return Inputs(tokens_RT, documents.positions_RT, layout, rows)

        is_local = self.settings.goal == "local" and bool(self.settings.consistency)
        return CLLMBatch(
            inputs=inputs(windows.tokens_RT, torch.cat([noisy_C, clean_S])),
            num_noisy=len(noisy_C),
            goal_C=torch.searchsorted(clean_S, goal_C),
            answer_A=torch.searchsorted(clean_S, row_A),
            truth_A=documents.clean_RT.flatten()[target_A],
            next_inputs=inputs(windows.next_tokens_RT, noisy_C) if is_local else None,
        )

    def _answers(self, documents: PackedDocuments, noisy_lengths_RT: Tensor) -> tuple[Tensor, Tensor]:
        """Flat positions of the text to learn, and the flat rows that score them: the first by the prompt's last."""
        packed = documents.packed
        learnt_RT = packed.real_RT & (packed.segment_RT == CLEAN) & bool(self.settings.autoregressive)
        if self._on_references:
            learnt_RT &= noisy_lengths_RT == 0
        target_A = learnt_RT.flatten().nonzero()[:, 0]
        is_first_A = packed.index_RT.flatten()[target_A] == 0
        return target_A, target_A - 1 - torch.where(is_first_A, noisy_lengths_RT.flatten()[target_A], 0)

    def loss(self, forward: Forward, prepared: CLLMBatch) -> Loss:
        settings = self.settings
        logits_SV = forward(*prepared.inputs)
        noisy_CV, clean_SV = logits_SV[: prepared.num_noisy], logits_SV[prepared.num_noisy :]
        parts: dict[str, Tensor] = {}
        if settings.consistency:
            if prepared.next_inputs is None:
                goal_CV = clean_SV.detach()[prepared.goal_C]
            else:
                goal_CV = forward(*prepared.next_inputs, gradient=False)
            parts["consistency"] = (
                losses.divergence(goal_CV, noisy_CV, temperature=settings.temperature)
                if prepared.num_noisy
                else noisy_CV.sum()
            )
        if settings.autoregressive:
            answer_AV = clean_SV[prepared.answer_A]
            parts["autoregressive"] = (
                losses.cross_entropy(answer_AV, prepared.truth_A, label_smoothing=settings.label_smoothing)
                if len(answer_AV)
                else answer_AV.sum()
            )
        zero = torch.zeros((), device=logits_SV.device)
        total = sum((getattr(settings, name) * part for name, part in parts.items()), zero)
        return Loss(total, {name: part.detach() for name, part in parts.items()})


class _Windows:
    """The noisy windows of a batch: the state drawn for each, and its tokens at the packed positions."""

    def __init__(
        self, objective: CLLMObjective, documents: PackedDocuments, batch: Batch, generator: torch.Generator
    ) -> None:
        self._documents, self._settings, table = documents, objective.settings, objective.table
        self._size = table.window
        self._index_RT = documents.packed.index_RT
        self._noisy_RT = documents.is_noisy_RT
        per_document = self._index_RT.shape[1] // self._size + 1
        own_RT = self._index_RT.div(self._size, rounding_mode="floor")
        # Windows of the batch are numbered document by document; U = N * per_document with those that do not exist.
        self._unit_RT = documents.document_RT * per_document + own_RT
        index_NU = torch.arange(per_document).expand(len(batch.examples_N), -1)
        first_N = table.first_window_N[batch.examples_N.clamp_max(len(table.examples) - 1)]
        window_U = (first_N[:, None] + index_NU).flatten().clamp_max(len(table.num_states_W) - 1)
        state_U = self._draw(table, index_NU, window_U, generator)
        self._first_U, self._length_U = table.first_token_W[window_U], table.length_W[window_U]
        self._table, self._state_U = table, state_U
        self.tokens_RT = self._augment(self._tokens_of(state_U), generator)

    @property
    def next_tokens_RT(self) -> Tensor:
        """The tokens of the windows one pass later."""
        return self._tokens_of(self._state_U + 1)

    def layout(self) -> Layout:
        documents = self._documents
        position_RT = documents.positions_RT
        start_RT = position_RT - torch.where(self._noisy_RT, self._index_RT % self._size, 0)
        return Layout(documents.packed.document_RT, position_RT, self._noisy_RT, start_RT)

    def scored(self) -> Tensor:
        """Noisy rows that score a token of their window and see at least one token that differs from the goal.

        Earlier rows see only right tokens, so they compute the goal itself. The first token of a window is scored by a
        clean row.
        """
        goal_RT = self.next_tokens_RT if self._settings.goal == "local" else self._documents.clean_RT
        wrong_RT = (self.tokens_RT != goal_RT) & self._noisy_RT
        count_RT = wrong_RT.cumsum(1)
        in_window_RT = self._index_RT % self._size
        start_RT = (torch.arange(count_RT.shape[1]) - in_window_RT).clamp_min(0)
        before_RT = count_RT.gather(1, start_RT) - wrong_RT.gather(1, start_RT).long()
        is_last_RT = in_window_RT == self._length_U[self._unit_RT] - 1
        return self._noisy_RT & (count_RT > before_RT) & ~is_last_RT

    def _draw(self, table: JacobiTable, index_NU: Tensor, window_U: Tensor, generator: torch.Generator) -> Tensor:
        """For each window a state before the fixed point."""
        if self._settings.noise == "uniform":
            draw_U = corruption.stratified_uniform((len(window_U),), generator)
            return (draw_U * (table.num_states_W[window_U] - 1)).long()
        cycle = self._settings.noise_cycle
        phase_N = torch.randint(cycle, (len(index_NU), 1), generator=generator)
        ratio_U = ((index_NU + phase_N) % cycle + 1).flatten() / cycle
        return (table.wrong_WK[window_U] - ratio_U[:, None]).abs().argmin(1)

    def _tokens_of(self, state_U: Tensor) -> Tensor:
        """The clean tokens, with these states in the noisy windows."""
        first_RT = (self._first_U + state_U * self._length_U)[self._unit_RT]
        source_RT = torch.where(self._noisy_RT, first_RT + self._index_RT % self._size, 0)
        return torch.where(self._noisy_RT, self._table.states_Z[source_RT].long(), self._documents.clean_RT)

    def _augment(self, tokens_RT: Tensor, generator: torch.Generator) -> Tensor:
        if not self._settings.augmented:
            return tokens_RT
        chosen_U = torch.rand(len(self._state_U), generator=generator) < self._settings.augmented
        righted_RT = chosen_U[self._unit_RT] & (torch.rand(tokens_RT.shape, generator=generator) < 0.5)
        return torch.where(righted_RT, self._documents.clean_RT, tokens_RT)
