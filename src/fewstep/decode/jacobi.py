"""Jacobi decoding: guess a window of tokens and replace all by the network's answer until nothing changes.

Santilli et al., arXiv 2305.10427; CLLM, arXiv 2403.00835. Axes: R = requests, L = positions, S = positions scored, N =
positions of a window, P = states of a window.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, NGram, verify
from fewstep.decode.decoder import Shape, cached_plan, grouped_passes
from fewstep.decode.loop import Loop, loop_for
from fewstep.decode.prompt_lookup import look_up
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import noise_keys, uniform
from fewstep.decode.state import State, scored_positions, write
from fewstep.models.network import Network, Plan, Scores
from fewstep.values import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class Jacobi(Causal):
    """A window of `window` guesses; what is right from the left on is final and cached at once.

    The window slides: as many new guesses enter at its end as tokens became final. With `fixed_windows` they stand one
    after the other, as published, and the next begins when one is final: trajectories for training are made so. New
    guesses are random tokens of the prompt, or, with `ngram`, what followed the longest match of up to so many last
    final tokens. It takes at most one pass per token. Greedy only. Plan shapes: `iterate` (window rows) and
    `prefill` (W + window - 1).
    """

    name: ClassVar[str] = "jacobi"

    window: Count = 16
    ngram: NGram | None = None
    fixed_windows: bool = False

    def __post_init__(self) -> None:
        self.refuse_sampling()
        check_fields(self, self.name)

    @property
    def num_guessed(self) -> int:
        return self.window

    @property
    def span(self) -> int:
        return self.window

    def start(self, state: State) -> State:
        return self._filled(state, state.front_R, ~state.done_R)

    def passes(self, pending_R: Tensor, extent_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=self.window - 1):
            yield members, [Shape("iterate" if width == 1 else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        end_R = torch.minimum(self.window_end(state) - 1, state.canvas_end_R)
        return cached_plan(shape.kind, state, self.role, width=shape.width, active=self.window - 1, end_R=end_R)

    def accept(self, state: State, shape: Shape, scores: Scores) -> State:
        end_R = self.window_end(state)
        after, tokens_RS = verify(self, state, scores, end_R)
        positions_RS = scored_positions(state, tokens_RS.shape[1])
        guessed_RS = ~after.final_RL.gather(1, positions_RS) & (positions_RS < end_R[:, None]) & ~state.done_R[:, None]
        after = replace(after, tokens_RL=write(after.tokens_RL, positions_RS, guessed_RS, tokens_RS))
        return self._filled(after, end_R, ~after.done_R & (self.window_end(after) > end_R))

    def window_end(self, state: State) -> Tensor:
        """The position after the window that the front is in, [R]; the last window may reach past the canvas."""
        if not self.fixed_windows:
            return state.front_R + self.window
        return state.front_R + self.window - (state.front_R - state.context_length_R) % self.window

    def first_guesses(self, state: State, start_R: Tensor) -> Tensor:
        """What a window that begins at `start_R` is filled with before its first pass, [R, N]."""
        positions_RN = start_R[:, None] + torch.arange(self.window, device=start_R.device)
        picks_RN = uniform(noise_keys(state.seed_R, positions_RN, torch.zeros_like(start_R)), 1)[..., 0]
        guesses_RN = state.tokens_RL.gather(1, (picks_RN * state.context_length_R[:, None]).long())
        if self.ngram is None:
            return guesses_RN
        found_RN, is_found_R = look_up(state.tokens_RL, start_R, self.ngram, self.window)
        return torch.where(is_found_R[:, None], found_RN, guesses_RN)

    def _filled(self, state: State, end_R: Tensor, fresh_R: Tensor) -> State:
        """With new guesses for these requests, from the position `end_R` to the end of the window."""
        positions_RN = scored_positions(state, self.window)
        chosen_RN = ~state.final_RL.gather(1, positions_RN) & (positions_RN >= end_R[:, None]) & fresh_R[:, None]
        guesses_RN = self.first_guesses(state, state.front_R)
        return replace(state, tokens_RL=write(state.tokens_RL, positions_RN, chosen_RN, guesses_RN))


@dataclass(frozen=True)
class Window:
    """One window of a trajectory, at `start` in the answer: its tokens before the first pass and after each, [P, N].

    The last row is the fixed point, which is what the answer has there. A last window is cut where the answer ends.
    """

    start: int
    states_PN: Tensor


@dataclass(frozen=True)
class Trajectory:
    """A decoded request and the windows that it was decoded in, from left to right."""

    output: Output
    windows: list[Window]


def jacobi_trajectories(
    network: Network,
    requests: Sequence[Request],
    decoder: Jacobi,
    *,
    batch_size: int = 32,
    on_trajectory: Callable[[int, Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Decode all requests in fixed windows and keep every state of each, on the CPU; in the given order.

    `on_trajectory(index, trajectory)` is called as each completes.
    """
    if not requests:
        return []
    decoder = replace(decoder, fixed_windows=True)
    recorder = _Recorder(decoder)
    loop: Loop
    loop, index_of = loop_for(
        network,
        decoder,
        requests,
        batch_size=batch_size,
        listeners=[lambda state: recorder.observe(state, loop.live)],
    )
    trajectories: dict[int, Trajectory] = {}
    while loop.busy:
        for number, output in loop.step():
            trajectory = Trajectory(output, recorder.windows(number, output))
            trajectories[index_of[number]] = trajectory
            if on_trajectory is not None:
                on_trajectory(index_of[number], trajectory)
    return [trajectories[i] for i in range(len(requests))]


class _Recorder:
    """Collects the states of the windows of all requests that a loop has live."""

    def __init__(self, decoder: Jacobi) -> None:
        self._decoder = decoder
        self._states: dict[int, list[list[Tensor]]] = {}

    def observe(self, state: State, live: Mapping[int, int]) -> None:
        """Keep what the windows hold after a round; `live`: slot -> number. The loop reuses the state's memory."""
        size = self._decoder.window
        tokens_RL, first_RN = state.tokens_RL.cpu(), self._decoder.first_guesses(state, state.context_length_R).cpu()
        starts, fronts = state.context_length_R.tolist(), state.front_R.tolist()
        for slot, number in live.items():
            windows = self._states.setdefault(number, [[first_RN[slot]]])
            start = starts[slot] + size * (len(windows) - 1)
            windows[-1].append(tokens_RL[slot, start : start + size].clone())
            if fronts[slot] >= start + size:  # the front of a request that is done stays where it was
                windows.append([tokens_RL[slot, start + size : start + 2 * size].clone()])

    def windows(self, number: int, output: Output) -> list[Window]:
        """The windows of a completed request, which is forgotten."""
        size, length = self._decoder.window, int((output.step_G > 0).sum())
        return [
            Window(i * size, torch.stack(states)[:, : length - i * size].clone())
            for i, states in enumerate(self._states.pop(number))
        ]
