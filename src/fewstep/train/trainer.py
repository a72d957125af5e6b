"""One trainer on accelerate: the same entry under `python`, `torchrun` and `accelerate launch`.

A micro-batch is a pure function of (seed, process, epoch, cursor), and what is random on the device is a function of (seed, step, micro-batch,
process), so that a resumed run repeats an uninterrupted one exactly.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_scheduler

from fewstep.errors import FewstepError
from fewstep.files import remove_leftovers, write_folder_whole
from fewstep.models.attention import compile_layers, prepare_attention, training_mask
from fewstep.models.load import DTYPES
from fewstep.models.masks import Layout
from fewstep.models.network import Network
from fewstep.train.checkpoint import Checkpoints
from fewstep.train.lora import LoRASettings, add_lora, save_trained
from fewstep.train.monitor import CollapseMonitor
from fewstep.train.objectives import Objective
from fewstep.train.run_log import RunLog
from fewstep.train.stream import BatchStream

Evaluate = Callable[[Network, int], Mapping[str, float | str]]
"""Called by the main process at evaluations with the network and the step: figures and texts for the log, by name.

It may raise FewstepError to stop the run. `train.samples.Samples` is one.
"""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run, checked when built.

    `rows` x `row_length` tokens are packed for each process and micro-batch. `max_steps` counts optimizer steps. None
    for `save_every` or `evaluate_every` means never before the end.
    """

    max_steps: int
    rows: int = 16
    row_length: int = 2048
    accumulation: int = 1
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant_with_warmup", "linear"] = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema_decay: float | None = None
    precision: Literal["no", "bf16"] = "no"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int | None = None
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "rows", "row_length", "accumulation", "log_every", "save_every", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FewstepError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise FewstepError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise FewstepError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise FewstepError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}; try 0.999")
        for name, choices in (
            ("schedule", ("cosine", "constant_with_warmup", "linear")),
            ("precision", ("no", "bf16")),
            ("weights_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise FewstepError(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(choices)}")


@dataclass
class TrainResult:
    """What a finished run says of itself; also written as `report.json` beside the weights.

    `real_tokens` are those of all processes, padding left out. `seconds` and `tokens_per_second` are of the training steps, without
    evaluation and saving.
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
    evaluate: Evaluate | None = None,
    monitor: CollapseMonitor | None = None,
    resume: bool = True,
) -> TrainResult:
    """Train `network` (float32 weights, changed in place) and write `output`: a plain folder, or an adapter with `lora`.

    A run that was interrupted resumes from the newest checkpoint in `output`/checkpoints, with the same result as an uninterrupted one.
    `monitor` watches the logged losses, and through `evaluate` the outputs. Under several processes each calls this alike.

    FewstepError if a loss is not finite, if the monitor sees a collapse, if `output` holds a finished model, if a checkpoint is of other
    settings or data, or if the disk is full. KeyboardInterrupt after Ctrl-C: a run on one process first finishes its step and saves a
    checkpoint.
    """
    if (output / "config.json").exists():
        raise FewstepError(f"{output} already holds a model; choose another output folder or remove it")
    run = _Run(network, objective, settings, output, lora, evaluate, monitor)
    if resume:
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


class _PackedForward(nn.Module):
    """Backbone and head in one module, so that a distributed wrapper sees a single forward: logits [S, V] of flat rows."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens_RT: Tensor, positions_RT: Tensor, mask: Any, rows_S: Tensor) -> Tensor:
        module: Any = self.module
        causal_lm = module.get_base_model() if hasattr(module, "get_base_model") else module
        hidden = causal_lm.base_model(
            input_ids=tokens_RT, attention_mask=mask, position_ids=positions_RT, use_cache=False
        ).last_hidden_state
        return causal_lm.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, rows_S))


class _Run:
    """One training run: what is trained, how far it is, and where that is written."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        settings: TrainSettings,
        output: Path,
        lora: LoRASettings | None,
        evaluate: Evaluate | None,
        monitor: CollapseMonitor | None,
    ) -> None:
        self.network, self.objective, self.settings, self.output = network, objective, settings, output
        self.lora, self.evaluate, self.monitor = lora, evaluate, monitor
        self.accelerator = _accelerator(settings, cpu=network.device.type == "cpu")
        self.is_main: bool = self.accelerator.is_main_process
        set_seed(settings.seed)
        network.module.float().train()
        prepare_attention(network.module, compiled=settings.compiled)
        self.trained: nn.Module = add_lora(network, lora) if lora else network.module
        if settings.compiled:
            compile_layers(network.module)
        self.fingerprint = self._fingerprint()  # before the data move to the device
        objective.to(self.accelerator.device)
        self.stream = BatchStream(
            objective,
            rows=settings.rows,
            row_length=settings.row_length,
            seed=settings.seed,
            process=(self.accelerator.process_index, self.accelerator.num_processes),
            device=self.accelerator.device,
        )
        self._prepare()
        self.step = 0
        self.seconds = 0.0
        self.checkpoints = Checkpoints(
            output / "checkpoints", self.accelerator, self.average, fingerprint=lambda: self.fingerprint
        )
        self.log = RunLog(output / "logs", max_steps=settings.max_steps, main=self.is_main)

    def _prepare(self) -> None:
        settings = self.settings
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
        plain = [parameter for parameter in parameters if parameter.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=self.accelerator.device.type == "cuda",
        )
        # accelerate steps the scheduler once a process; the schedule counts those calls.
        processes = self.accelerator.num_processes
        scheduler = get_scheduler(
            settings.schedule,
            optimizer,
            num_warmup_steps=settings.warmup_steps * processes,
            num_training_steps=settings.max_steps * processes,
        )
        self.average: AveragedModel | None = None
        if settings.ema_decay:
            self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
            self.average.to(self.accelerator.device)
        self.packed = _PackedForward(self.trained)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(self.packed, optimizer, scheduler)

    def _fingerprint(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued: everything that changes the result or the log."""
        settings = asdict(self.settings)
        del settings["save_every"], settings["evaluate_every"]
        return {
            "network": self.network.name,
            "role": asdict(self.network.role),
            "settings": settings,
            "lora": asdict(self.lora) if self.lora else None,
            "objective": type(self.objective).__name__,
            **self.objective.fingerprint(),
            "processes": self.accelerator.num_processes,
        }

    # Steps

    def execute(self) -> None:
        """Train from where the run stands to the last step."""
        settings = self.settings
        window = _Window(self.stream.num_tokens)
        with _Interrupt(active=self.accelerator.num_processes == 1) as interrupt, self.log:
            self.log.start(self.step)
            while self.step < settings.max_steps:
                started = time.monotonic()
                parts = self._optimizer_step()
                self.step += 1
                is_last = self.step == settings.max_steps
                saves = (self._due(settings.save_every) or interrupt.wanted) and not is_last
                evaluates = self._due(settings.evaluate_every) or (is_last and settings.evaluate_every is not None)
                if saves or evaluates or is_last or self._due(settings.log_every):
                    figures = self._figures(parts)
                    figures["tokens_per_second"] = self._over_processes(window.rate(self.stream.num_tokens), "sum")
                    self._watch(figures)
                self.log.advance(self.step)
                self.seconds += time.monotonic() - started
                if evaluates:
                    self._evaluate()
                if saves:
                    self._save()
                if interrupt.wanted:
                    raise KeyboardInterrupt(self._interrupted(saves))
                if saves or evaluates:
                    window = _Window(self.stream.num_tokens)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _optimizer_step(self) -> dict[str, Tensor]:
        """All micro-batches of a step; figures averaged over them, on the device."""
        micros = [self._micro_step(micro) for micro in range(self.settings.accumulation)]
        if self.average is not None:
            self.average.update_parameters(self.trained)
        parts = {name: torch.stack([micro[name] for micro in micros]).mean() for name in micros[0]}
        return parts | {"gradient_norm": micros[-1]["gradient_norm"]}

    def _micro_step(self, micro: int) -> dict[str, Tensor]:
        batch = self.stream.next_batch()
        generator = torch.Generator(device=self.accelerator.device)
        key = (self.settings.seed, self.step, micro, self.accelerator.process_index)
        generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
        with self.accelerator.accumulate(self.model), self.accelerator.autocast():
            loss = self.objective.loss(self._forward, batch, generator)
            self.accelerator.backward(loss.total)
            parts = {"loss": loss.total.detach(), **loss.parts}
            if self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
                parts["gradient_norm"] = norm.detach()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
        return parts

    def _forward(
        self, tokens_RT: Tensor, positions_RT: Tensor, layout: Layout, rows_S: Tensor, *, gradient: bool = True
    ) -> Tensor:
        mask = training_mask(layout, compiled=self.settings.compiled)
        if gradient:
            return self.model(tokens_RT, positions_RT, mask, rows_S)
        with torch.no_grad():
            return self.packed(tokens_RT, positions_RT, mask, rows_S)

    # Watching

    def _figures(self, parts: dict[str, Tensor]) -> dict[str, float]:
        """The parts as numbers, averaged over the processes, and the learning rate."""
        values = self.accelerator.reduce(torch.stack(list(parts.values())).float(), "mean").tolist()
        return {**dict(zip(parts, values, strict=True)), "learning_rate": self.scheduler.get_last_lr()[0]}

    def _over_processes(self, value: float, how: Literal["sum", "mean"]) -> float:
        return float(self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), how))

    def _watch(self, figures: dict[str, float]) -> None:
        """Log, and stop on what is not finite, before it can reach a checkpoint."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FewstepError(
                    f"{name} is {value} at step {self.step}; lower the learning rate (now {self.settings.learning_rate}) or look at the data; "
                    "the last checkpoint is kept"
                )
        self.log.figures(self.step, figures)
        if self.monitor is not None:
            self.monitor.observe_loss(figures["loss"], step=self.step)

    def _evaluate(self) -> None:
        """On the main process; what stops it stops the others too."""
        problem: list[str | None] = [None]
        if self.evaluate is not None and self.is_main:
            try:
                with self._averaged(), inference(self.network, compiled=self.settings.compiled):
                    found = self.evaluate(self.network, self.step)
            except FewstepError as error:
                if self.accelerator.num_processes == 1:
                    raise
                problem = [str(error)]
            else:
                self.log.figures(self.step, {name: value for name, value in found.items() if not isinstance(value, str)})
                self.log.texts(self.step, {name: value for name, value in found.items() if isinstance(value, str)})
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise FewstepError(problem[0])

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The trained weights replaced by their moving average, if there is one, and put back after."""
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.trained.state_dict().items()}
        self.trained.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.trained.load_state_dict(own)

    # Files

    def _save(self) -> None:
        run = {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.log.history,
            "monitor": self.monitor.state_dict() if self.monitor else None,
        }
        self.checkpoints.save(self.step, run, self.stream.state_dict())

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        found = self.checkpoints.restore()
        if found is None:
            return
        run, local = found
        self.step, self.seconds, self.log.history = run["step"], run["seconds"], run["history"]
        self.stream.load_state_dict(local)
        if self.monitor is not None and run["monitor"] is not None:
            self.monitor.load_state_dict(run["monitor"])

    def _interrupted(self, saved: bool) -> str:
        if saved:
            return f"interrupted at step {self.step}; the checkpoint is kept, repeat the command to continue"
        return f"interrupted at step {self.step}"

    def finish(self) -> TrainResult:
        """Write the model and its report, then remove the checkpoints."""
        tokens = round(self._over_processes(float(self.stream.num_tokens), "sum"))
        result = TrainResult(
            self.output, self.step, self.seconds, tokens, tokens / max(self.seconds, 1e-9), self.log.history
        )
        if self.is_main:
            if self.average is not None:
                self.trained.load_state_dict(self.average.module.state_dict())
            report = {
                **asdict(result),
                "folder": self.output.name,
                "settings": asdict(self.settings),
                "processes": self.accelerator.num_processes,
            }
            staging = self.output / "finished"
            remove_leftovers(staging)
            with write_folder_whole(staging, overwrite=True) as folder:
                dtype = DTYPES[self.settings.weights_dtype]
                save_trained(self.network, self.trained, folder, dtype=dtype, home=self.output)
                (folder / "report.json").write_text(json.dumps(report, indent=1))
            _publish(staging, self.output)
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


def _publish(finished: Path, output: Path) -> None:
    """Move a finished folder's files into `output`. config.json comes last: with it the model is there, without it not."""
    for path in sorted(finished.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(output / path.name)
    finished.rmdir()


class _Window:
    """Tokens per second of this process since the last time it was asked."""

    def __init__(self, num_tokens: int) -> None:
        self._start, self._num_tokens = time.monotonic(), num_tokens

    def rate(self, num_tokens: int) -> float:
        now = time.monotonic()
        rate = (num_tokens - self._num_tokens) / max(now - self._start, 1e-9)
        self._start, self._num_tokens = now, num_tokens
        return rate


class _Interrupt:
    """Turns the first Ctrl-C into a wish, to be granted between two steps; the second acts at once."""

    def __init__(self, *, active: bool) -> None:
        self.wanted = False
        # With several processes the wish would reach them at different steps; and only a main thread may listen.
        self._active = active and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "_Interrupt":
        if self._active:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, self._before)
