"""From noise to text in embedding space: samplers, time grids, and the settings of both.

All positions of a canvas begin as noise and become plain together, in as many passes as one likes. A sampler says where
the rows go from one noise level to the next, once the network has said what it takes the clean text for; every choice
among wordings is made by the noise at the beginning, so that even one pass commits to one. `embedding_generator` runs
them.

Axes: D = hidden width, N = steps.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.decode.declarations import Details
from fewstep.decode.sampling import Sampling
from fewstep.errors import FewstepError
from fewstep.models.embedding_space import EmbeddingSpace
from fewstep.models.roles import Role
from fewstep.values import Count, Share, check_fields

# --- samplers: from one noise level to the next ---


class Rows(NamedTuple):
    """Rows of any shape [..., D] between two noise levels.

    `x`: noisy embeddings at `level`; `clean`: what the network takes their tokens' embeddings for; `next_level`: where
    they go; `fresh`: standard normal numbers of this step, times the temperature. Levels are [..., 1].
    """

    x: Tensor
    level: Tensor
    next_level: Tensor
    clean: Tensor
    fresh: Tensor


def euler(rows: Rows, sigma: float, churn: float) -> Tensor:
    """Straight on towards the clean text, as a step of the flow's differential equation (arXiv 2210.02747).

    With x_s = (1 - s) x0 + s sigma eps and the prediction in the place of x0, x_e = (e / s) x_s + (1 - e / s) x0.
    """
    kept = rows.next_level / rows.level
    return kept * rows.x + (1 - kept) * rows.clean


def shortcut(rows: Rows, sigma: float, churn: float) -> Tensor:
    """A step of the same form, by a network that knows the length of the step and learnt to give the mean of what many
    short steps would have found on the way (arXiv 2410.12557).
    """
    return euler(rows, sigma, churn)


def stochastic(rows: Rows, sigma: float, churn: float) -> Tensor:
    """On to a level below the next one, then back to it with fresh noise (arXiv 2206.00364).

    `churn` 0 is `euler`; 1 goes all the way to the clean text, and is `consistency`.
    """
    below = rows.next_level * (1 - churn)
    x = euler(rows._replace(next_level=below), sigma, churn)
    kept = (1 - rows.next_level) / (1 - below).clamp_min(1e-6)
    added = ((rows.next_level * sigma) ** 2 - (kept * below * sigma) ** 2).clamp_min(0).sqrt()
    return kept * x + added * rows.fresh


def consistency(rows: Rows, sigma: float, churn: float) -> Tensor:
    """The clean text at once, then noise of the next level upon it: multistep consistency sampling (arXiv
    2303.01469).
    """
    return (1 - rows.next_level) * rows.clean + rows.next_level * sigma * rows.fresh


SamplerName = Literal["euler", "stochastic", "consistency", "shortcut"]

SAMPLERS: Mapping[SamplerName, Callable[[Rows, float, float], Tensor]] = {
    "euler": euler,
    "stochastic": stochastic,
    "consistency": consistency,
    "shortcut": shortcut,
}


def step_size(sampler: SamplerName, space: EmbeddingSpace, now: Tensor, then: Tensor) -> Tensor:
    """The step size that the network is given, between two times: a consistency function goes all the way to 0, a
    shortcut one step, and the others ask for the clean text's distribution. A step that is shorter than those of the
    training is given as none.
    """
    if sampler in ("euler", "stochastic"):
        return torch.zeros_like(now)
    size = now if sampler == "consistency" else now - then
    if space.most_steps is None:
        return torch.zeros_like(now)
    return torch.where(size * space.most_steps >= 1 - 1e-4, size, 0.0)


# --- time grids ---

GridName = Literal["warped", "uniform", "cosine"]


def grid(name: GridName, space: EmbeddingSpace, num_steps: int) -> tuple[Tensor, Tensor]:
    """Noise levels and times from pure noise to clean text, [N + 1] each.

    `warped`: equal steps of time, as in training; `uniform`: equal steps of the noise level; `cosine`: short steps near
    pure noise, where tokens are decided.
    """
    share_N = torch.arange(num_steps, -1, -1) / num_steps
    if name == "warped":
        return space.level(share_N), share_N
    level_N = share_N if name == "uniform" else (math.pi / 2 * share_N).sin()
    return level_N, space.time(level_N)


# --- settings ---

FEW_STEPS = 4
"""Steps of a network that was trained to take long ones, unless they are given."""

DENOISER_STEPS = 32
"""Steps of a network that knows no step sizes, unless they are given."""

CHURN = 0.5
"""Of the stochastic sampler, unless it is given."""


def check_draws_nothing(sampling: Sampling) -> None:
    """FewstepError if it says from which tokens to draw."""
    if sampling.filtered:
        raise FewstepError("a model in embedding space draws no tokens; leave out top_k and top_p")


@dataclass(frozen=True, kw_only=True)
class EmbeddingSampling:
    """How a text is made from noise. FewstepError if a setting has no meaning.

    `steps`: passes. By default 4 for a network that was trained to take long steps, else 32.
    """

    steps: Annotated[
        Count | None,
        "Passes from noise to text.",
        Details(
            aliases=("num_inference_steps",),
            default=f"{FEW_STEPS}, or {DENOISER_STEPS} for a model that was not trained for few",
        ),
    ] = None
    sampler: Annotated[
        SamplerName | None,
        "How a text goes from noise level to noise level: euler, stochastic, consistency or shortcut.",
        Details(default="shortcut for a model that was trained to take long steps, else euler"),
    ] = None
    guidance: Annotated[
        Annotated[float, Ge(0), Le(1000)], "Scale of classifier-free guidance by a second forward without the prompt."
    ] = 0.0
    grid: Annotated[GridName, "Noise levels of the passes: warped as in training, uniform or cosine."] = "warped"
    churn: Annotated[
        Share | None, "Share of each step's noise that the stochastic sampler draws anew.", Details(default=f"{CHURN}")
    ] = None
    canvas_length: Annotated[
        Count | None,
        "Length of the canvas, the positions for the answer that the network sees.",
        Details(default="max_new_tokens"),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.churn is not None and self.sampler != "stochastic":
            raise FewstepError("churn belongs to the sampler stochastic; set that too, or leave it out")

    def for_role(self, role: Role) -> "EmbeddingSampling":
        """With what the network decides. FewstepError for a setting that it was not trained for."""
        space = role.embedding_space
        assert space is not None
        if self.guidance and not space.guided:
            raise FewstepError(
                "guidance needs a model that was also trained without its prompts (fewstep train embedding "
                "--without-prompt 0.1); leave it out"
            )
        trained = space.most_steps is not None
        return replace(
            self,
            steps=self.steps or (FEW_STEPS if trained else DENOISER_STEPS),
            sampler=self.sampler or ("shortcut" if trained else "euler"),
        )

    def note(self, space: EmbeddingSpace) -> str | None:
        """What is worth saying of steps that the network was not trained for, in a sentence."""
        if self.steps is None:
            return None
        if space.most_steps is None:
            if self.steps >= FEW_STEPS:
                return None
            return (
                f"the model was not trained to take long steps, and {self.steps} {'is' if self.steps == 1 else 'are'} "
                f"few for it; take about {DENOISER_STEPS}, or train it for few steps (fewstep train embedding "
                "--objective shortcut)"
            )
        if self.steps <= space.most_steps:
            return None
        return (
            f"{self.steps} steps are more than the {space.most_steps} that the model was trained to take; it takes "
            "them as a model does that knows no step sizes"
        )
