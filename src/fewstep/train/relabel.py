"""A second round: the teacher labels the states that the student itself visits (on-policy distillation, arXiv
2306.13649).

Axes: M = outputs, N = states, L = positions (context, then canvas, then padding), S = scored positions of a state,
G = canvas positions, K = stored tokens, D = hidden width.

The student decodes as it will be used. For each of its passes, the teacher scores the state before the pass, as it sees
one: the context, earlier blocks final, the block as it stood, everything after it masked up to the teacher's canvas.
Stored at each position is the teacher's distribution when the student finalised it.

Final ids stay the student's, also where the teacher prefers another token, because later states were made from them.
The stored distribution then differs from the final id, and the divergence teaches the student the difference. So such a
store is for distillation with the directions `forward` and `reverse`; `hard` is refused (`TrajectoryTable.of_student`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.decode.decoder import whole_blocks
from fewstep.decode.requests import Output, TopK
from fewstep.errors import FewstepError
from fewstep.models.load import network_hash
from fewstep.models.network import Network, Plan
from fewstep.models.roles import INVISIBLE
from fewstep.train.collect import Decode, teacher_of
from fewstep.train.records import PromptRow
from fewstep.train.trajectories import OF_STUDENT, Distribution, Teacher
from fewstep.values import Count, check_fields

LENGTH_BUCKET = 16
"""Forwards are multiples of this long, so that there are few shapes."""


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How a teacher labels: what is stored, the canvas that it sees (None: the student's), and a forward's size in
    tokens.
    """

    distribution: Distribution
    canvas_length: Count | None = None
    tokens_per_forward: Count = 65536

    def __post_init__(self) -> None:
        check_fields(self)


def labelled(decode_rows: Decode, teacher: Network, labelling: Labelling) -> Decode:
    """A `decode_rows` for `collect`: the student's `decode_rows` decodes, and `teacher` labels the states it visited.

    Give `collect` the teacher as `teacher_of(teacher)`, the student's `stop_token_ids`, and `of_student(student)` among
    its settings.
    """

    def run(rows: Sequence[PromptRow], seeds: Sequence[int]) -> Sequence[Output]:
        return label(teacher, [row.prompt_ids for row in rows], decode_rows(rows, seeds), labelling)

    return run


def labelling_for(teacher: Network, student: Network, distribution: Distribution, max_new_tokens: int) -> Labelling:
    """The teacher sees the canvas on which it would decode itself, in whole blocks of both. FewstepError unless both
    have the same vocabulary and mask token.
    """
    _check_same_tokens(teacher_of(teacher), teacher_of(student), f"{teacher.name} and {student.name}")
    block_size = math.lcm(teacher.role.block_size, student.role.block_size)
    return Labelling(distribution=distribution, canvas_length=whole_blocks(max_new_tokens, block_size))


def _check_same_tokens(first: Teacher, second: Teacher, whose: str) -> None:
    if (first.vocab_size, first.mask_token_id) != (second.vocab_size, second.mask_token_id):
        raise FewstepError(f"{whose} have different vocabularies, so one cannot label the other's states")


def of_student(student: Network) -> dict[str, Any]:
    """The entry of the student in the settings of a relabelled store."""
    return {OF_STUDENT: network_hash(student)}


@torch.no_grad()
def label(
    teacher: Network, prompts: Sequence[Sequence[int]], outputs: Sequence[Output], labelling: Labelling
) -> list[Output]:
    """The outputs with the recorded distributions replaced by the teacher's at the same states.

    FewstepError if a context and canvas exceed the teacher's positions, or a canvas is longer than the teacher's.
    """
    states = _States(teacher, prompts, outputs, labelling)
    rows = _Rows(outputs, labelling.distribution)
    for batch in states.batches():
        scores = teacher.score(states.plan(batch))
        chosen_NS = batch.scored_NS >= 0
        where = (batch.record_N[:, None].expand_as(batch.scored_NS)[chosen_NS].cpu(), batch.scored_NS[chosen_NS].cpu())
        if labelling.distribution.kind == "hidden":
            rows.keep(where, hidden=scores.hidden_RSD[chosen_NS])
        else:
            log_probs = scores.logits_RSV[chosen_NS].log_softmax(-1)
            best = log_probs.topk(labelling.distribution.width, dim=-1)
            tail = (1 - best.values.exp().sum(-1)).clamp(min=0)
            rows.keep(where, ids=best.indices, log_probs=best.values, tail=tail)
    return rows.outputs()


@dataclass(frozen=True)
class _Batch:
    """States to score together: record and pass of each, canvas positions that the pass finalised (-1: none)."""

    record_N: Tensor
    pass_N: Tensor
    scored_NS: Tensor
    length: int


class _States:
    """Every state that the outputs visited, in batches of similar length."""

    def __init__(
        self, teacher: Network, prompts: Sequence[Sequence[int]], outputs: Sequence[Output], labelling: Labelling
    ) -> None:
        self._role = teacher.role
        self._tokens_per_forward = labelling.tokens_per_forward
        device = teacher.device
        canvases = [labelling.canvas_length or len(output.canvas_ids_G) for output in outputs]
        for prompt, output, canvas in zip(prompts, outputs, canvases, strict=True):
            if int((output.step_G >= 0).nonzero().max()) >= canvas:
                raise FewstepError(f"an answer is longer than the teacher's canvas of {canvas}; raise canvas_length")
            if len(prompt) + canvas > teacher.max_positions:
                raise FewstepError(
                    f"a prompt of {len(prompt)} tokens and a canvas of {canvas} exceed the {teacher.max_positions} "
                    f"positions of {teacher.name}; lower canvas_length"
                )
        canvas_ends = [len(prompt) + canvas for prompt, canvas in zip(prompts, canvases, strict=True)]
        length = whole_blocks(max(canvas_ends), LENGTH_BUCKET)
        tokens_ML = torch.full((len(outputs), length), int(self._role.mask_token_id or 0))
        steps_ML = torch.full((len(outputs), length), -1)
        for m, (prompt, output, canvas_end) in enumerate(zip(prompts, outputs, canvas_ends, strict=True)):
            kept = canvas_end - len(prompt)
            tokens_ML[m, : len(prompt)], steps_ML[m, : len(prompt)] = torch.tensor(list(prompt)), 0
            canvas_ids, steps = output.canvas_ids_G[:kept], output.step_G[:kept]
            tokens_ML[m, len(prompt) : len(prompt) + len(canvas_ids)] = canvas_ids
            steps_ML[m, len(prompt) : len(prompt) + len(steps)] = steps
        self._tokens_ML, self._steps_ML = tokens_ML.to(device), steps_ML.to(device)
        self._context_M = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._canvas_end_M = torch.tensor(canvas_ends, device=device)
        self._visited = sorted(
            (canvas_ends[m], m, int(number))
            for m, output in enumerate(outputs)
            for number in output.step_G[output.step_G > 0].unique()
        )

    def batches(self) -> list[_Batch]:
        batches, start = [], 0
        while start < len(self._visited):
            # Canvas ends ascend, so a batch is as long as its last state; the first state's is a close enough guess.
            count = max(1, self._tokens_per_forward // self._visited[start][0])
            chosen = self._visited[start : start + count]
            batches.append(self._batch(chosen))
            start += len(chosen)
        return batches

    def _batch(self, visited: Sequence[tuple[int, int, int]]) -> _Batch:
        device = self._tokens_ML.device
        record_N = torch.tensor([m for _, m, _ in visited], device=device)
        pass_N = torch.tensor([number for _, _, number in visited], device=device)
        now_NL = self._steps_ML[record_N] == pass_N[:, None]
        width = int(now_NL.sum(1).max())
        # The finalised positions first, in order.
        position_NS = torch.argsort(~now_NL, dim=1, stable=True)[:, :width]
        found_NS = now_NL.gather(1, position_NS)
        scored_NS = torch.where(found_NS, position_NS - self._context_M[record_N][:, None], -1)
        length = whole_blocks(visited[-1][0], LENGTH_BUCKET)
        return _Batch(record_N, pass_N, scored_NS, length)

    def plan(self, batch: _Batch) -> Plan:
        """The state before each pass, with what lies past the canvas inert."""
        tokens_NL = self._tokens_ML[batch.record_N, : batch.length]
        steps_NL = self._steps_ML[batch.record_N, : batch.length]
        open_NL = (steps_NL < 0) | (steps_NL >= batch.pass_N[:, None])
        positions_NL = torch.arange(batch.length, device=tokens_NL.device).expand_as(tokens_NL)
        context_N1 = self._context_M[batch.record_N][:, None]
        inert_NL = positions_NL >= self._canvas_end_M[batch.record_N][:, None]
        return Plan(
            kind="full",
            tokens_RQ=tokens_NL.masked_fill(open_NL, int(self._role.mask_token_id or 0)),
            positions_RQ=positions_NL,
            blocks_RQ=torch.where(inert_NL, INVISIBLE, self._role.blocks(positions_NL, context_N1)),
            slots_RQ=None,
            scored_RS=context_N1 + batch.scored_NS.clamp_min(0),
        )


class _Rows:
    """The labels of all outputs, on the host."""

    def __init__(self, outputs: Sequence[Output], distribution: Distribution) -> None:
        self._outputs, self._kind = outputs, distribution.kind
        shape = (len(outputs), max(len(output.canvas_ids_G) for output in outputs))
        half = torch.bfloat16 if distribution.dtype == "bfloat16" else torch.float16
        self._arrays: Mapping[str, Tensor] = (
            {"hidden": torch.zeros((*shape, distribution.width), dtype=half)}
            if self._kind == "hidden"
            else {
                "ids": torch.zeros((*shape, distribution.width), dtype=torch.long),
                "log_probs": torch.zeros((*shape, distribution.width)),
                "tail": torch.zeros(shape),
            }
        )

    def keep(self, where: tuple[Tensor, Tensor], **values: Tensor) -> None:
        for name, rows in values.items():
            self._arrays[name][where] = rows.to("cpu", self._arrays[name].dtype)

    def outputs(self) -> list[Output]:
        return [self._labelled(m, output, len(output.canvas_ids_G)) for m, output in enumerate(self._outputs)]

    def _labelled(self, m: int, output: Output, length: int) -> Output:
        mine = {name: array[m, :length] for name, array in self._arrays.items()}
        if self._kind == "hidden":
            return replace(output, hidden_GD=mine["hidden"], top_k=None)
        return replace(output, hidden_GD=None, top_k=TopK(mine["ids"], mine["log_probs"], mine["tail"]))
