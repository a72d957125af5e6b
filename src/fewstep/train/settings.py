"""What a training run is told."""

from dataclasses import dataclass
from typing import Literal

from fewstep.errors import FewstepError
from fewstep.models.masks import MAX_ROW_LENGTH


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run, checked when built.

    `rows` x `row_length` tokens are packed for each process and micro-batch. `max_steps` counts optimizer steps; over
    the first `warmup_steps` (None: see `num_warmup_steps`) the learning rate rises. A checkpoint is saved every
    `save_every` steps, on Ctrl-C, and before the last evaluation. With `evaluate_every` the network is evaluated so
    often and at the end; with None it is not.
    """

    max_steps: int
    rows: int = 16
    row_length: int = 2048
    accumulation: int = 1
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant_with_warmup", "linear"] = "cosine"
    warmup_steps: int | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    ema_decay: float | None = None
    precision: Literal["no", "bf16"] = "no"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int | None = 500
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
            value = getattr(self, name)
            if value is not None and value < 0:
                raise FewstepError(f"{name} must not be negative, got {value}")
        if self.row_length > MAX_ROW_LENGTH:
            raise FewstepError(f"row_length is at most {MAX_ROW_LENGTH}, got {self.row_length}; use more rows")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FewstepError(f"betas lie between 0 and 1, got {self.betas}; try 0.9 0.95")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise FewstepError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}; try 0.999")
        for name, choices in (
            ("schedule", ("cosine", "constant_with_warmup", "linear")),
            ("precision", ("no", "bf16")),
            ("weights_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise FewstepError(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(choices)}")

    @property
    def num_warmup_steps(self) -> int:
        """`warmup_steps`; where it is not set 100, or in a short run a tenth of the steps and at least one."""
        return max(1, min(100, self.max_steps // 10)) if self.warmup_steps is None else self.warmup_steps
