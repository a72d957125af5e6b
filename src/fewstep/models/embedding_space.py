"""The space that noise is added in: token embeddings of one length, noise levels, and the time that is warped onto
them.

A text's point is x0, the embeddings of its tokens, each scaled to the length sqrt(D), so that a coordinate is 1 in root
mean square. At the noise level s, from 0 (clean) to 1 (pure noise), its row stands at

    x_s = (1 - s) x0 + s sigma eps,    eps ~ N(0, I)

which is the straight path of flow matching (arXiv 2210.02747) with a larger noise. In a large vocabulary most levels
teach nothing: the tokens are either plain to see or lost. So samplers and training go by a time u in [0, 1], and
`warp` says which level stands at it, such that equal steps of time cost equally (CDCD, arXiv 2211.15089).

Axes: S = rows, V = vocabulary, D = hidden width, K = knots.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.values import Count, check_fields, shown

NOISE_PER_WIDTH = 7 / 16
"""The noise that texts of width 256 were learnt best with is 7; what it hides grows with the square root of the
width.
"""

NUM_KNOTS = 33

UNIFORM = (0.0, 1.0)
"""The warp under which time is the noise level itself."""

Predicts = Literal["tokens", "embeddings"]
RowsFrom = Literal["posterior", "noise"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpace:
    """What a network of the role `embedding` knows of noise. FewstepError if a field has no meaning.

    `noise_scale`: sigma. `warp`: noise levels at times evenly spaced from 0 to 1. `predicts`: distributions of tokens,
    or embeddings that are rounded to tokens (Diffusion-LM, arXiv 2205.14217). `rows_from`: what a noisy row enters the
    network as, see `NoiseConditioning`. `self_conditioned`: the network was trained to be given its last prediction
    (arXiv 2208.04202). `most_steps`: the network was trained to take steps of 1 / most_steps and longer at once; None:
    it knows no step sizes. `guided`: it was also trained without its prompts, so that it can be guided.
    """

    noise_scale: Annotated[float, Gt(0), Le(1e4)]
    warp: tuple[float, ...] = UNIFORM
    predicts: Predicts = "tokens"
    rows_from: RowsFrom = "posterior"
    self_conditioned: bool = False
    most_steps: Count | None = None
    guided: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "the embedding space")
        rises = all(one < other for one, other in zip(self.warp, self.warp[1:], strict=False))
        if len(self.warp) < 2 or self.warp[0] != 0 or self.warp[-1] != 1 or not rises:
            raise FewstepError(
                f"warp must rise from 0 to 1, got {list(self.warp)[:8]}; leave it out to spread time evenly"
            )

    @classmethod
    def of_width(cls, width: int, **fields: Any) -> "EmbeddingSpace":
        """With the noise that suits embeddings of so many numbers, unless it is given."""
        given: dict[str, Any] = {"noise_scale": NOISE_PER_WIDTH * math.sqrt(width), **fields}
        return cls(**given)

    @classmethod
    def from_config(cls, found: Any) -> "EmbeddingSpace":
        """From what `to_config` made. FewstepError for anything else."""
        if not isinstance(found, Mapping) or not found.keys() <= cls.__dataclass_fields__.keys():
            raise FewstepError(
                f"embedding_space must hold {', '.join(cls.__dataclass_fields__)} and nothing else, got "
                f"{shown(found)}; take its entry in config.json from the model's source again"
            )
        if "noise_scale" not in found:
            raise FewstepError(
                "embedding_space has no noise_scale; take its entry in config.json from the model's source again"
            )
        given: dict[str, Any] = dict(found)
        return cls(**given)

    def to_config(self) -> dict[str, Any]:
        return {**asdict(self), "warp": list(self.warp)}

    def level(self, time: Tensor) -> Tensor:
        """The noise level at each time in [0, 1], of any shape; straight between two knots."""
        knots_K = torch.tensor(self.warp, device=time.device, dtype=torch.float32)
        place = time.float().clamp(0, 1) * (len(knots_K) - 1)
        below = place.floor().clamp(max=len(knots_K) - 2)
        low, high = knots_K[below.long()], knots_K[below.long() + 1]
        return low + (place - below) * (high - low)

    def time(self, level: Tensor) -> Tensor:
        """The inverse of `level`."""
        knots_K = torch.tensor(self.warp, device=level.device, dtype=torch.float32)
        level = level.float().clamp(0, 1)
        below = (torch.searchsorted(knots_K, level, right=True) - 1).clamp(0, len(knots_K) - 2)
        low, high = knots_K[below], knots_K[below + 1]
        return (below + (level - low) / (high - low)) / (len(knots_K) - 1)

    def noised(self, clean_SD: Tensor, level_S: Tensor, noise_SD: Tensor) -> Tensor:
        """x_s of each row at its level."""
        level_S1 = level_S[:, None]
        return (1 - level_S1) * clean_SD + level_S1 * self.noise_scale * noise_SD


def unit_rows(table_VD: Tensor) -> Tensor:
    """Each row scaled to the length sqrt(D), in float32; a row of zeros stays one."""
    table_VD = table_VD.detach().float()
    length_V1 = table_VD.norm(dim=-1, keepdim=True)
    return torch.where(length_V1 > 0, table_VD * (table_VD.shape[-1] ** 0.5 / length_V1.clamp_min(1e-12)), 0.0)


def rounding(found_SD: Tensor, unit_VD: Tensor) -> Tensor:
    """Logits [S, V] of the tokens that predicted embeddings [S, D] round to, in float32: all embeddings have one
    length, so the nearest is that of the largest product.
    """
    with torch.autocast(found_SD.device.type, enabled=False):
        return found_SD.float() @ unit_VD.T / found_SD.shape[-1] ** 0.5


def warp_of_losses(levels: Sequence[float], losses: Sequence[float], *, uniform: float = 0.1) -> tuple[float, ...]:
    """The warp under which the loss grows evenly with time: time is the share of the loss that a level has reached
    (CDCD, arXiv 2211.15089). A share `uniform` of the time goes by the level itself, so that none is passed over.

    `losses`: measured at these rising levels; what falls again with a higher level counts as unchanged.
    """
    level_K = torch.tensor([0.0, *levels, 1.0], dtype=torch.float64)
    loss_K = torch.tensor([0.0, *losses, losses[-1]], dtype=torch.float64).cummax(0).values
    if not loss_K[-1] > 0:
        return UNIFORM
    time_K = (1 - uniform) * loss_K / loss_K[-1] + uniform * level_K
    wanted = torch.linspace(0, 1, NUM_KNOTS, dtype=torch.float64)
    above = torch.searchsorted(time_K, wanted).clamp(1, len(time_K) - 1)
    low, high = time_K[above - 1], time_K[above]
    share = ((wanted - low) / (high - low)).clamp(0, 1)
    warped = level_K[above - 1] + share * (level_K[above] - level_K[above - 1])
    return (0.0, *(round(one, 6) for one in warped[1:-1].tolist()), 1.0)


def channel_losses(
    unit_VD: Tensor, space: EmbeddingSpace, levels: Sequence[float], *, rows: int = 512, seed: int = 0
) -> list[float]:
    """What is left unknown of a token, in nats, when its row alone is seen at each level and all tokens are equally
    frequent: no network is needed for it.
    """
    generator = torch.Generator().manual_seed(seed)
    unit_VD = unit_VD.cpu()
    tokens_S = torch.randint(len(unit_VD), (rows,), generator=generator)
    noise_SD = torch.randn((rows, unit_VD.shape[1]), generator=generator)
    losses = []
    for level in levels:
        x_SD = space.noised(unit_VD[tokens_S], torch.full((rows,), level), noise_SD)
        logits_SV = evidence(x_SD, torch.full((rows,), level), unit_VD, space)
        losses.append(float(torch.nn.functional.cross_entropy(logits_SV, tokens_S)))
    return losses


LEAST_LEVEL = 0.02
"""Below it a row shows its token plainly, and its evidence would grow without end."""


def evidence(x_SD: Tensor, level_S: Tensor, unit_VD: Tensor, space: EmbeddingSpace) -> Tensor:
    """Log-likelihood of each token [S, V] given its noisy row alone, up to a constant of the row.

    From log N(x_s; (1 - s) e_v, s^2 sigma^2 I), where all e_v have one length.
    """
    level_S1 = level_S.clamp_min(LEAST_LEVEL)[:, None]
    scale_S1 = (1 - level_S1) / (level_S1 * space.noise_scale) ** 2
    return (scale_S1 * x_SD) @ unit_VD.T
