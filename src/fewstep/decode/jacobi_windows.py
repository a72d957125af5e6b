"""Trajectories of Jacobi decoding: what every window of an answer held before and after each pass.

CLLM, arXiv 2403.00835. Axes: N = positions of a window, P = states of a window, L = positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.decode.generator import submit_all
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.loop import Loop, loop_for
from fewstep.decode.requests import Output, Request
from fewstep.decode.state import State
from fewstep.models.network import Network


@dataclass(frozen=True)
class Window:
    """One window of a trajectory, at `start` in the answer: its tokens before the first pass and after each, [P, N].

    The last row is the fixed point, which is what the answer has there. A last window is cut where the answer ends.
    """

    start: int
    states_PN: Tensor


@dataclass(frozen=True)
class JacobiTrajectory:
    """A decoded request and the windows that it was decoded in, from left to right."""

    output: Output
    windows: list[Window]


def jacobi_trajectories(
    network: Network,
    requests: Sequence[Request],
    decoder: Jacobi,
    *,
    batch_size: int = 32,
    on_trajectory: Callable[[int, JacobiTrajectory], None] | None = None,
) -> list[JacobiTrajectory]:
    """Decode all requests in fixed windows and keep every state of each, on the CPU; in the given order.

    `on_trajectory(index, trajectory)` is called as each completes.
    """
    decoder = replace(decoder, fixed_windows=True)
    recorder = _Recorder(decoder)
    loop: Loop
    loop = loop_for(
        network,
        decoder,
        requests,
        batch_size=batch_size,
        listeners=[lambda state: recorder.observe(state, loop.live)],
    )
    index_of = submit_all(loop, requests)
    trajectories: dict[int, JacobiTrajectory] = {}
    while loop.busy:
        for number, output in loop.step():
            trajectory = JacobiTrajectory(output, recorder.windows(number, output))
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
