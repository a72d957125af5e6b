"""One trainer on accelerate: the same entry under `python`, `torchrun` and `accelerate launch`.

A micro-batch is a pure function of (seed, process, epoch, cursor), its noise one of (seed, number of the batch,
process), and checkpoints keep the state of torch's own generators (dropout), so that a resumed run repeats an
uninterrupted one exactly.
"""

import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed

from fewstep.errors import FewstepError
from fewstep.files import remove_leftovers, write_folder_whole
from fewstep.models.attention import prepare_attention
from fewstep.models.checkpoint_files import DESCRIPTIONS
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from fewstep.train.checkpoint import Checkpoints
from fewstep.train.documents import WeightsOf
from fewstep.train.figures import Means, Speed
from fewstep.train.interruption import Interrupt, told_failures
from fewstep.train.learner import Learner
from fewstep.train.lora import LoRASettings, save_trained
from fewstep.train.monitor import CollapseMonitor
from fewstep.train.objectives import Objective
from fewstep.train.output import CHECKPOINTS, FINISHED, LOGS, REPORT, check_output, check_space
from fewstep.train.run_log import RunLog
from fewstep.train.settings import TrainSettings
from fewstep.train.stream import PreparedStream, check_examples

__all__ = ["Evaluate", "TrainResult", "TrainSettings", "inference", "train"]

Evaluate = Callable[[Network, int], Mapping[str, float | str]]
"""Called by the main process at evaluations with the network and the step: figures and texts for the log, by name.

It may raise FewstepError to stop the run. `train.samples.Samples` is one.
"""


@dataclass
class TrainResult:
    """The figures of a finished run; also written as `report.json` beside the weights, with the command, the settings
    of the run and of its objective, and the device's name.

    `real_tokens` are those of all processes, padding left out. `seconds` and `tokens_per_second` are of the training
    steps, without evaluation and saving.
    """

    folder: Path
    steps: int
    seconds: float
    real_tokens: int
    tokens_per_second: float
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    network: Network,
    objective: Objective,
    settings: TrainSettings,
    output: Path,
    *,
    lora: LoRASettings | None = None,
    heads: MedusaHeads | None = None,
    evaluate: Evaluate | None = None,
    monitor: CollapseMonitor | None = None,
) -> TrainResult:
    """Train `network` (float32 weights, changed in place) and write `output`: a plain folder, an adapter with `lora`,
    or the Medusa `heads`, which are then all that is trained.

    A run that was interrupted resumes from the newest checkpoint in `output`/checkpoints, with the same result as an
    uninterrupted one. `monitor` watches the logged losses, and through `evaluate` the outputs. Under several processes
    each calls this alike.

    FewstepError if an example does not fit a row, if a loss or what learns is not finite, if the monitor sees a
    collapse, if `output` holds a finished model or cannot be written, if a checkpoint is of other settings or data or
    damaged, if memory or a disk is full, or if another process has ended. KeyboardInterrupt after Ctrl-C or SIGTERM,
    when the step is finished and a checkpoint saved; several processes on GPUs stop at the next line of the log. What
    comes while the finished model is written changes nothing.
    """
    if lora is not None and heads is not None:
        raise ValueError("heads are trained on a frozen network; train the adapter first")
    check_examples(objective, row_length=settings.row_length, vocab_size=network.vocab_size)
    run = _Run(network, objective, settings, output, lora, heads, evaluate, monitor)
    if run.is_main:
        check_output(output)
        check_space(output, run.learner.num_bytes(checkpoint=run.saves_checkpoints))
    with run.interrupt, told_failures(run.accelerator):
        run.restore()
        run.execute()
        return run.finish()


@contextmanager
def inference(network: Network, *, compiled: bool = False) -> Iterator[None]:
    """Let a network in training decode: evaluation mode, plain attention, no compilation for its many shapes."""
    network.module.eval()
    prepare_attention(network.module, compiled=False)
    try:
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield
    finally:
        prepare_attention(network.module, compiled=compiled)
        network.module.train()


class _Run:
    """One training run: what is trained, how far it is, and where that is written."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        settings: TrainSettings,
        output: Path,
        lora: LoRASettings | None,
        heads: MedusaHeads | None,
        evaluate: Evaluate | None,
        monitor: CollapseMonitor | None,
    ) -> None:
        self.network, self.objective, self.settings, self.output = network, objective, settings, output
        self.lora, self.evaluate, self.monitor = lora, evaluate, monitor
        self.accelerator = _accelerator(settings, cpu=network.device.type == "cpu")
        self.is_main: bool = self.accelerator.is_main_process
        set_seed(settings.seed)
        keeps: WeightsOf = getattr(objective, "target", "own")
        self.learner = Learner(network, settings, self.accelerator, lora, heads, keeps)
        self.objective_settings = {"objective": type(objective).__name__, **objective.fingerprint()}
        self.stream = PreparedStream(
            objective,
            rows=settings.rows,
            row_length=settings.row_length,
            seed=settings.seed,
            process=(self.accelerator.process_index, self.accelerator.num_processes),
            device=self.accelerator.device,
            ahead=2 if self.accelerator.device.type == "cuda" else 0,
        )
        self.step = 0
        self.seconds = 0.0
        self.means = Means()
        self.checkpoints = Checkpoints(
            output / CHECKPOINTS, self.accelerator, self.learner.average, json.loads(json.dumps(self._fingerprint()))
        )
        self.log = RunLog(output / LOGS, max_steps=settings.max_steps, main=self.is_main)
        self.interrupt = Interrupt(main=self.is_main)

    @property
    def saves_checkpoints(self) -> bool:
        """Whether it will, unless it is interrupted."""
        settings = self.settings
        return settings.evaluate_every is not None or (
            settings.save_every is not None and settings.save_every < settings.max_steps
        )

    def _fingerprint(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued: everything that changes the result or the log."""
        settings = asdict(self.settings)
        for name in ("save_every", "evaluate_every", "weights_dtype"):
            del settings[name]
        return {
            "network": self.network.name,
            "role": asdict(self.network.role),
            "settings": settings,
            "lora": asdict(self.lora) if self.lora else None,
            **self.objective_settings,
            "processes": self.accelerator.num_processes,
        }

    # Steps

    def execute(self) -> None:
        """Train from where the run stands to the last step."""
        settings = self.settings
        speed = Speed(self.stream.num_tokens)
        with self.log, closing(self.stream):
            self.log.start(self.step)
            if self.step == settings.max_steps and settings.evaluate_every is not None:
                self._evaluate()  # which is all that was missing
            while self.step < settings.max_steps:
                started = time.monotonic()
                self.means.add(self.learner.step(self.objective, self.stream))
                self.step += 1
                is_last = self.step == settings.max_steps
                saves = self._due(settings.save_every)
                evaluates = settings.evaluate_every is not None and (self._due(settings.evaluate_every) or is_last)
                logs = evaluates or is_last or self._due(settings.log_every)
                # To ask the other processes is to wait for the devices, as a line of the log does.
                asks = logs or saves or self.accelerator.num_processes == 1 or self.accelerator.device.type == "cpu"
                stops = asks and self._anybody(self.interrupt.wanted)
                if logs or saves or stops:
                    figures = self._figures()
                if logs:
                    self.means.clear()
                    figures["tokens_per_second"] = self._sum(speed.rate(self.stream.num_tokens))
                    self._record(figures)
                self.log.advance(self.step)
                self.seconds += time.monotonic() - started
                if evaluates and is_last:
                    self._save()  # a long last evaluation must not cost the whole training if it is killed
                if evaluates:
                    self._evaluate()
                    stops = self._anybody(self.interrupt.wanted)
                if (saves or stops) and not is_last:
                    self._save()
                if stops and not is_last:
                    raise KeyboardInterrupt(
                        f"interrupted at step {self.step}; a checkpoint is saved, repeat the command to continue"
                    )
                if saves or evaluates:
                    speed = Speed(self.stream.num_tokens)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    # Watching

    def _figures(self) -> dict[str, float]:
        """Means over the steps since the last line of the log and over the processes, and the learning rate.

        FewstepError if one is not finite, or what learns is not: such weights must not reach a checkpoint, an
        evaluation or the finished model.
        """
        means = self.means.means
        broken = self.learner.not_finite()
        sent = torch.stack([*means.values(), torch.tensor(float(broken is not None), device=self.accelerator.device)])
        *values, share_broken = self.accelerator.reduce(sent, "mean").tolist()
        figures = dict(zip(means, values, strict=True))
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FewstepError(f"{name} is {value} at step {self.step}; {self._advice()}")
        if share_broken:
            what = broken or "a weight of another process"
            raise FewstepError(f"{what} is not finite at step {self.step}; {self._advice()}")
        return {**figures, "learning_rate": self.learner.learning_rate}

    def _advice(self) -> str:
        """What to do about numbers that are not finite."""
        newest = self.checkpoints.newest()
        kept = "no checkpoint was saved before" if newest is None else f"the last checkpoint is kept: {newest}"
        return (
            f"lower the learning rate (now {self.settings.learning_rate}) in another output folder, or look at the "
            f"data; {kept}"
        )

    def _anybody(self, wish: bool) -> bool:
        """Whether any of the processes wants this: a signal reaches them at different steps."""
        return wish if self.accelerator.num_processes == 1 else self._sum(float(wish)) > 0

    def _sum(self, value: float) -> float:
        """The sum over the processes."""
        return float(
            self.accelerator.reduce(torch.tensor(value, dtype=torch.float64, device=self.accelerator.device), "sum")
        )

    def _record(self, figures: dict[str, float]) -> None:
        self.log.figures(self.step, figures)
        if self.monitor is not None:
            self.monitor.observe_loss(figures["loss"], step=self.step)

    def _evaluate(self) -> None:
        """Evaluate on the main process; an error there stops the other processes too."""
        problem: list[str | None] = [None]
        if self.evaluate is not None and self.is_main:
            try:
                with self.learner.averaged(), inference(self.network, compiled=self.settings.compiled):
                    found = self.evaluate(self.network, self.step)
            except FewstepError as error:
                if self.accelerator.num_processes == 1:
                    raise
                problem = [str(error)]
            else:
                self.log.figures(
                    self.step, {name: value for name, value in found.items() if not isinstance(value, str)}
                )
                self.log.texts(self.step, {name: value for name, value in found.items() if isinstance(value, str)})
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise FewstepError(problem[0])

    # Files

    def _save(self) -> None:
        run = {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.log.history,
            "monitor": self.monitor.state_dict() if self.monitor else None,
        }
        self.checkpoints.save(self.step, run, {"stream": self.stream.state_dict(), "means": self.means.state_dict()})

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one. FewstepError if it cannot be used."""
        found = self.checkpoints.restore()
        if found is None:
            return
        broken = self.learner.not_finite()
        if broken is not None:
            raise FewstepError(f"{broken} is not finite in {self.checkpoints.newest()}; remove that folder")
        run, local = found
        self.step, self.seconds, self.log.history = run["step"], run["seconds"], run["history"]
        self.stream.load_state_dict(local["stream"])
        self.means.load_state_dict(local["means"], device=self.accelerator.device)
        if self.monitor is not None and run["monitor"] is not None:
            self.monitor.load_state_dict(run["monitor"])

    def finish(self) -> TrainResult:
        """Write the model and its report, then remove the checkpoints.

        FewstepError, after a checkpoint, for weights that are finite only in float32.
        """
        dtype = self.learner.dtype_saved
        too_large = self.learner.overflow(dtype)
        if too_large is not None:
            self._save()
            raise FewstepError(
                f"{too_large} does not fit {str(dtype).removeprefix('torch.')}; a checkpoint of step {self.step} is "
                "saved: set weights_dtype to float32 and repeat the command, or lower the learning rate in another "
                "output folder"
            )
        tokens = round(self._sum(float(self.stream.num_tokens)))
        result = TrainResult(
            self.output, self.step, self.seconds, tokens, tokens / max(self.seconds, 1e-9), self.log.history
        )
        self.learner.settle()
        if self.is_main:
            report = {
                **asdict(result),
                "folder": self.output.name,
                "settings": {**asdict(self.settings), "warmup_steps": self.settings.num_warmup_steps},
                **self.objective_settings,
                "lora": asdict(self.lora) if self.lora else None,
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "processes": self.accelerator.num_processes,
                "device": _device_name(self.accelerator.device),
            }
            staging = self.output / FINISHED
            remove_leftovers(staging)
            with write_folder_whole(staging, overwrite=True) as folder:
                save_trained(
                    self.network, self.learner.trained, folder, dtype=dtype, base=self.network.name, home=self.output
                )
                (folder / REPORT).write_text(json.dumps(report, indent=1))
            try:
                _publish(staging, self.output)
            except OSError as error:
                raise FewstepError(
                    f"could not move the finished files from {staging} to {self.output}: {error.strerror or error}; "
                    "make room for them and repeat the command"
                ) from error
            shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.network.module.eval()
        prepare_attention(self.network.module, compiled=False)
        return result


def _accelerator(settings: TrainSettings, *, cpu: bool) -> Accelerator:
    # An earlier run in this process may have used another precision, which accelerate would refuse.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulation,
        cpu=cpu,
        # The others wait while the main process evaluates.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == expected, "accelerate did not join the process group"
    return accelerator


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _publish(finished: Path, output: Path) -> None:
    """Move a finished folder's files into `output`; its description comes last: only with it the model is there."""
    for path in sorted(finished.iterdir(), key=lambda path: path.name in DESCRIPTIONS):
        path.replace(output / path.name)
    finished.rmdir()
