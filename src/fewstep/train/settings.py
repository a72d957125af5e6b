"""What a training run is told."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fewstep.errors import FewstepError
from fewstep.models.masks import MAX_ROW_LENGTH


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run, checked when built.

    `warmup_steps` None: see `num_warmup_steps`. A checkpoint is also saved on Ctrl-C, and before the last evaluation.
    With `evaluate_every` the network is evaluated so often and at the end.
    """

    max_steps: Annotated[int, "Optimizer steps."]
    rows: Annotated[int, "Packed rows of a micro-batch, in each process."] = 16
    row_length: Annotated[int, "Tokens of a packed row."] = 2048
    accumulation: Annotated[int, "Micro-batches of an optimizer step."] = 1
    learning_rate: Annotated[float, "The highest learning rate."] = 1e-3
    schedule: Annotated[
        Literal["cosine", "constant_with_warmup", "linear"], "How the learning rate goes on after the warm-up."
    ] = "cosine"
    warmup_steps: Annotated[
        int | None, "Steps in which the learning rate rises; by default 100, in a short run a tenth."
    ] = None
    weight_decay: Annotated[float, "Weight decay of AdamW; norms and biases have none."] = 0.05
    betas: Annotated[tuple[float, float], "Betas of AdamW."] = (0.9, 0.95)
    clip_norm: Annotated[float, "Largest norm of the gradient, which is cut to it."] = 1.0
    ema_decay: Annotated[
        float | None, "Evaluate and save a moving average of the weights of this decay, such as 0.999; by default none."
    ] = None
    precision: Annotated[Literal["no", "bf16"], "bf16 computes in bfloat16 and keeps float32 weights."] = "no"
    weights_dtype: Annotated[Literal["float32", "bfloat16"], "What the weights are saved in."] = "float32"
    compiled: Annotated[bool, "Compile the layers, which pays on a GPU."] = False
    seed: Annotated[int, "Seed of the order of the examples and of all noise."] = 0
    log_every: Annotated[int, "Steps from one line of the log to the next, which has their means."] = 20
    save_every: Annotated[int | None, "Steps from one checkpoint to the next; they are removed at the end."] = 500
    evaluate_every: Annotated[int | None, "Steps from one evaluation to the next; by default there is none."] = None

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
