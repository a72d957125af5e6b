"""Training for a time: how many steps fit into it is measured first."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.json_files import read_json
from fewstep.models.network import Network
from fewstep.train.checkpoint import RUN
from fewstep.train.objectives import Objective
from fewstep.train.output import CHECKPOINTS, check_output
from fewstep.train.trainer import TrainResult, TrainSettings, train

PROBE_STEPS = 60
LOG_LINES = 20


def train_for(
    seconds: float,
    network: Network,
    objective_of: Callable[[int], Objective],
    settings: TrainSettings,
    output: Path,
    *,
    probe_steps: int = PROBE_STEPS,
    **others: Any,
) -> TrainResult:
    """Train for about so many seconds of steps; see `train`, which takes `others` too.

    `probe_steps` are trained first, then undone: the last third of them tells how long a step takes, when all is
    compiled. They are not part of `seconds`. `objective_of` is given the number of steps. Of `settings`, `max_steps`
    is a limit, the warm-up is cut to the steps there are, and the log has about LOG_LINES lines. A run that was
    interrupted goes on to as many steps as it was begun with.

    FewstepError if `seconds` is not above 0, or as `train`.
    """
    if not seconds > 0:
        raise FewstepError(f"no time is left to train {output.name}; allow more seconds")
    steps = _begun_with(output)
    if steps is None:
        check_output(output)
        step_s = _seconds_of_step(network, objective_of(probe_steps), settings, probe_steps, others)
        steps = max(1, min(settings.max_steps, int(seconds / step_s)))
        print(f"{output.name}: {steps} steps of {1000 * step_s:.1f} ms", flush=True)
    warmup = None if settings.warmup_steps is None else min(settings.warmup_steps, steps)
    settings = replace(settings, max_steps=steps, warmup_steps=warmup, log_every=max(1, steps // LOG_LINES))
    return train(network, objective_of(steps), settings, output, **others)


def _seconds_of_step(
    network: Network, objective: Objective, settings: TrainSettings, steps: int, others: dict[str, Any]
) -> float:
    """Of the last third of so many steps, which leave no trace in the network."""
    settings = replace(settings, max_steps=steps, warmup_steps=None, log_every=-(-steps // 3), evaluate_every=None)
    weights = {name: value.clone() for name, value in network.module.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        done = train(network, objective, settings, Path(folder) / "probe", **others)
    network.module.load_state_dict(weights)
    rates = [line["tokens_per_second"] for line in done.history if "tokens_per_second" in line]
    return done.real_tokens / steps / rates[-1]


def _begun_with(output: Path) -> int | None:
    """The number of steps of the run whose checkpoint is there; None if there is none that can be read."""
    newest = max((output / CHECKPOINTS).glob("step-*"), default=None)
    if newest is None:
        return None
    try:
        return int(read_json(newest / RUN)["fingerprint"]["settings"]["max_steps"])
    except (FewstepError, KeyError, TypeError, ValueError):
        return None  # `train` says what is wrong with it
