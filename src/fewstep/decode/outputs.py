"""What a state says of a request: the events of its last step, and its output; on the host.

Axes: L = positions, G = canvas positions, D = hidden width, V = vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.decode.requests import Canvas, Event, FinishReason, Output, Record, Request, TopK
from fewstep.decode.state import State
from fewstep.models.network import Network


def new_events(
    request: Request, tokens_L: Tensor, step_L: Tensor, confidence_L: Tensor, steps_before: Tensor
) -> Iterator[Event]:
    """What the steps of the request after the first `steps_before` finalised in its answer; a round may have two."""
    infilled = request.canvas is not None
    start, length = len(request.prompt_ids), request.max_new_tokens if request.canvas is None else len(request.canvas)
    answer = slice(start, start + length)
    tokens_G, steps_G = tokens_L[answer], step_L[answer]
    ends = torch.tensor(() if infilled else request.stop_token_ids or (), dtype=tokens_G.dtype)
    stops_G = torch.isin(tokens_G, ends) & (steps_G > 0)
    for position in (steps_G > steps_before).nonzero()[:, 0].tolist():
        if stops_G[:position].any():
            return
        yield Event(position, int(tokens_G[position]), int(steps_G[position]), float(confidence_L[start + position]))


def output_of(request: Request, layout: Canvas, state: State, row: int, *, seconds: float) -> Output:
    """The output of a request in a row of the state, which is on the CPU.

    Of one under way: the final tokens before its first open position, whatever was drawn behind it.
    """
    stop_token_ids = request.stop_token_ids or ()
    start = len(request.prompt_ids)
    canvas = slice(start, start + len(layout.tokens))
    canvas_ids_G = state.tokens_RL[row, canvas].clone()
    infilled = request.canvas is not None
    limit = len(layout.tokens) if infilled else request.max_new_tokens
    open_G = (~state.final_RL[row, canvas]).nonzero()[:, 0].tolist()
    num_final = min([limit, *open_G[:1]])
    token_ids = canvas_ids_G[:num_final].tolist()
    if not infilled:
        ends = [i for i, token_id in enumerate(token_ids) if token_id in stop_token_ids]
        token_ids = token_ids[: ends[0] + 1] if ends else token_ids
    if not infilled and token_ids and token_ids[-1] in stop_token_ids:
        finish_reason: FinishReason = "stop"
    else:
        finish_reason = "length" if num_final == limit else "cancelled"
    return Output(
        token_ids=token_ids,
        num_tokens=sum(layout.open[:num_final]) if infilled else len(token_ids),
        num_forwards=int(state.num_forwards_R[row]),
        num_draft_forwards=int(state.num_draft_forwards_R[row]),
        seconds=seconds,
        finish_reason=finish_reason,
        canvas_ids_G=canvas_ids_G,
        step_G=state.step_RL[row, canvas].clone(),
        confidence_G=state.confidence_RL[row, canvas].clone(),
    )


def with_record(output: Output, hidden_GD: Tensor, record: Record, network: Network) -> Output:
    """With what the record asks for, from the hidden row of each position of the canvas."""
    top_k = None
    if record.top_k is not None:
        log_probs_GV = network.head(hidden_GD).log_softmax(-1)
        best = log_probs_GV.topk(min(record.top_k, network.most_recorded), dim=-1)
        tail_G = (1 - best.values.exp().sum(-1)).clamp(min=0)
        top_k = TopK(best.indices.cpu(), best.values.cpu(), tail_G.cpu())
    return replace(output, hidden_GD=hidden_GD.cpu() if record.hidden else None, top_k=top_k)
