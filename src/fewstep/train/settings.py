"""The settings of a training run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from fewstep.errors import FewstepError
from fewstep.models.masks import MAX_ROW_LENGTH
from fewstep.values import MOST_INTEGER, Count, check_fields

Steps = Annotated[int, Ge(1), Le(MOST_INTEGER)]
Beta = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run, checked when built.

    `warmup_steps` None: see `num_warmup_steps`. A checkpoint is also saved on Ctrl-C, and before the last evaluation.
    With `evaluate_every` the network is evaluated every so many steps and at the end.
    """

    max_steps: Annotated[Steps, "Optimizer steps."]
    rows: Annotated[Count, "Packed rows of a micro-batch, in each process."] = 16
    row_length: Annotated[Count, "Tokens of a packed row."] = 2048
    accumulation: Annotated[Count, "Micro-batches of an optimizer step."] = 1
    learning_rate: Annotated[float, Gt(0), Le(1e3), "The highest learning rate."] = 1e-3
    schedule: Annotated[
        Literal["cosine", "constant_with_warmup", "linear"], "How the learning rate goes on after the warm-up."
    ] = "cosine"
    warmup_steps: Annotated[
        Annotated[int, Ge(0), Le(MOST_INTEGER)] | None,
        "Steps in which the learning rate rises; by default 100, or in a short run a tenth of all steps.",
    ] = None
    weight_decay: Annotated[float, Ge(0), Le(1e3), "Weight decay of AdamW; norms and biases have none."] = 0.05
    betas: Annotated[tuple[Beta, Beta], "Betas of AdamW."] = (0.9, 0.95)
    clip_norm: Annotated[float, Gt(0), Le(1e30), "A gradient of a larger norm is scaled down to this norm."] = 1.0
    ema_decay: Annotated[
        Annotated[float, Gt(0), Lt(1)] | None,
        "Evaluate and save a moving average of the weights with this decay, such as 0.999; by default none.",
    ] = None
    precision: Annotated[Literal["no", "bf16"], "bf16 computes in bfloat16 and keeps float32 weights."] = "no"
    weights_dtype: Annotated[Literal["float32", "bfloat16"], "Data type of the saved weights."] = "float32"
    compiled: Annotated[bool, "Compile the layers, which makes training faster on a GPU."] = False
    seed: Annotated[int, Ge(0), Lt(1 << 32), "Seed of the order of the examples and of all noise."] = 0
    log_every: Annotated[Steps, "Steps between two lines of the log; a line holds the means over these steps."] = 20
    save_every: Annotated[Steps | None, "Steps between two checkpoints; a finished run removes them."] = 500
    evaluate_every: Annotated[Steps | None, "Steps between two evaluations; by default there are none."] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.row_length > MAX_ROW_LENGTH:
            raise FewstepError(f"row_length is at most {MAX_ROW_LENGTH}, got {self.row_length}; use more rows")

    @property
    def num_warmup_steps(self) -> int:
        """`warmup_steps`; where it is not set 100, or in a short run a tenth of the steps and at least one."""
        return max(1, min(100, self.max_steps // 10)) if self.warmup_steps is None else self.warmup_steps
