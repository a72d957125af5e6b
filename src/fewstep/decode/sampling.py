"""Drawing tokens: temperature, top-k, top-p, and noise that depends on nothing but (request seed, position, step).

Axes: R = requests, S = scored positions, V = vocabulary.

The noise comes from a counter-based generator (the splitmix64 finaliser over int64, which wraps alike on every
device), so a draw is the same alone and in a batch, on a CPU and on a GPU, and no generator state has to be kept or
captured.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.values import MOST_INTEGER, Temperature, check_fields


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# Increment and the finaliser's factors of Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
_INCREMENT = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


TopK = Annotated[int, Ge(1), Le(MOST_INTEGER)]
"""So many tokens are drawn from."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; None = not set. Temperature 0 is exactly argmax, whatever top-k and top-p say."""

    temperature: Temperature = 0.0
    top_k: TopK | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise FewstepError(f"top_p is a probability in (0, 1], got {self.top_p}; try 0.95")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        return self.top_k is not None or self.top_p is not None


GREEDY = Sampling()


def noise_keys(seed_R: Tensor, positions_RS: Tensor, step: Tensor) -> Tensor:
    """One 64-bit key per (seed, position, step), int64 [R, S]; `step` is [R], or [R, S] if positions differ in it."""
    step_RS = step if step.dim() == 2 else step[:, None]
    return _mix(_mix(_mix(seed_R[:, None] + _INCREMENT) ^ step_RS) + _INCREMENT * (positions_RS + 1))


def uniform(keys: Tensor, count: int) -> Tensor:
    """`count` numbers per key, uniform in the open interval (0, 1), float64 [..., count]."""
    counter = torch.arange(1, count + 1, device=keys.device)
    bits = _mix(keys[..., None] + _INCREMENT * counter)
    return (_shift_right(bits, 11).double() + 0.5) * 2.0**-53


def draw(
    logits_RSV: Tensor,
    keys_RS: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor | None = None,
    top_p_R: Tensor | None = None,
) -> Tensor:
    """Tokens [R, S] drawn by the Gumbel maximum; where the temperature is 0, exactly the argmax."""
    drawn_RS = gumbel_max(tempered(logits_RSV, temperature_R, top_k_R, top_p_R), keys_RS)
    return torch.where(temperature_R[:, None] > 0, drawn_RS, logits_RSV.argmax(-1))


def tempered(
    logits_RSV: Tensor, temperature_R: Tensor, top_k_R: Tensor | None = None, top_p_R: Tensor | None = None
) -> Tensor:
    """Logits of the distribution to draw from, float64, since coarse uniforms cut the tail off; temperature 0 as 1.

    Top-k applies to the tempered distribution, top-p to what it leaves.
    """
    temperature_R11 = temperature_R.double()[:, None, None]
    tempered_RSV = logits_RSV.double() / torch.where(temperature_R11 > 0, temperature_R11, 1.0)
    if top_k_R is None or top_p_R is None:
        return tempered_RSV
    return keep_top(tempered_RSV, top_k_R, top_p_R)


def gumbel_max(logits_RSV: Tensor, keys_RS: Tensor) -> Tensor:
    """A token [R, S] from the softmax of each row of logits."""
    return (logits_RSV + gumbel(uniform(keys_RS, logits_RSV.shape[-1]))).argmax(-1)


def gumbel(noise: Tensor) -> Tensor:
    """Standard Gumbel numbers from numbers uniform in (0, 1)."""
    return -(-noise.log()).log()


def keep_top(logits_RSV: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Logits outside the `top_k_R` best, then outside the smallest set that holds `top_p_R` of the rest, at -inf.

    Tokens equal to the last one kept are kept too. At least one stays.
    """
    descending_RSV = logits_RSV.sort(-1, descending=True).values
    rank_V = torch.arange(logits_RSV.shape[-1], device=logits_RSV.device)
    probability_RSV = descending_RSV.masked_fill(rank_V >= top_k_R[:, None, None], float("-inf")).softmax(-1)
    before_RSV = probability_RSV.cumsum(-1) - probability_RSV
    inside_RSV = (probability_RSV > 0) & ((before_RSV < top_p_R[:, None, None]) | (top_p_R >= 1)[:, None, None])
    last_RS1 = inside_RSV.sum(-1, keepdim=True).clamp(min=1) - 1
    return logits_RSV.masked_fill(logits_RSV < descending_RSV.gather(-1, last_RS1), float("-inf"))


def confidence(logits_RSV: Tensor, tokens_RS: Tensor) -> Tensor:
    """Untempered probability of each token, [R, S]."""
    chosen_RS = logits_RSV.gather(-1, tokens_RS[..., None])[..., 0]
    return (chosen_RS - logits_RSV.logsumexp(-1)).exp()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _FACTORS[0]
    x = (x ^ _shift_right(x, 27)) * _FACTORS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own would repeat the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
