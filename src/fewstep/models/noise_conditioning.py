"""What a stock causal-LM module needs beside its layers to denoise token embeddings.

The prompt's rows enter as usual and never see the canvas, so that they are computed once. A row of the canvas enters as
what its noisy embedding says of the token (`NoiseConditioning.rows`), plus what tells it of the noise level and of the
step that is to be taken at once.

Axes: R = packed rows or requests, T = positions, N = all positions together, S = rows of canvases, V = vocabulary,
D = hidden width, F = features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fewstep.errors import FewstepError
from fewstep.models.architectures import adjust_logits
from fewstep.models.embedding_space import EmbeddingSpace, evidence, rounding, unit_rows

PART = "noise"
"""Under which name the conditioning stands in the module: a stock class that loads the weights passes it over."""

NUM_WAVES = 6
SHORTEST_STEP = 64
"""Steps shorter than one in so many look alike to the network."""


class NoisyRows(NamedTuple):
    """Rows of canvases in a packed forward.

    `rows_S`: their flat places. `before_S`: the places of the rows that score them, one earlier where logits are
    shifted, else the same. `x_SD`: their noisy embeddings. `level_S`: noise levels. `step_S`: by how much time the
    answer is to be taken forward at once; 0 asks for the distribution of the clean token. `guess_SD`: the prediction of
    the last step, for networks that are self-conditioned.
    """

    rows_S: Tensor
    before_S: Tensor
    x_SD: Tensor
    level_S: Tensor
    step_S: Tensor
    guess_SD: Tensor | None = None


class NoiseConditioning(nn.Module):
    """What a network needs to read noisy embeddings and to know the noise level and the step size. It begins with no
    effect of its own.

    With `rows_from="posterior"` a row enters as the mean embedding of the tokens by their probability given the noisy
    row alone (all tokens equally frequent), and the less that says of the token, the more as the mask's embedding. So
    it enters as the mask where nothing is known, and as the token where it is plain, which is what a masked-diffusion
    network was trained on. With `noise` it enters as the noisy embedding itself, scaled to the length of embeddings,
    plus the mask's by the noise level. Either way a linear map of the noisy embedding is added, which begins at zero.
    """

    def __init__(self, space: EmbeddingSpace, width: int, mask_token_id: int, *, shifted: bool) -> None:
        super().__init__()
        self.predicts, self.self_conditioned = space.predicts, space.self_conditioned
        self.mask_token_id = mask_token_id
        last = nn.Linear(width, width)
        self.time_embedding = nn.Sequential(nn.Linear(num_features(), width), nn.SiLU(), last)
        self.raw = nn.Linear(width, width, bias=False)
        self.own = nn.Linear(width, width, bias=False) if shifted else None
        self.guess = nn.Linear(width, width, bias=False) if space.self_conditioned else None
        self.regress = nn.Linear(width, width) if space.predicts == "embeddings" else None
        for layer in (last, self.raw, self.own, self.guess):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(last.bias)
        self.ruled_out_V: Tensor | None
        self.register_buffer("ruled_out_V", None, persistent=False)

    def rule_out(self, ids: Tensor, vocab_size: int) -> None:
        """Tokens that no row can hold: the mask, and rows of the table that no token has."""
        self.ruled_out_V = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)

    def unit(self, table_VD: Tensor) -> Tensor:
        """The clean embeddings of all tokens, [V, D]."""
        return unit_rows(table_VD)

    def without_ruled_out(self, logits_SV: Tensor) -> Tensor:
        return logits_SV if self.ruled_out_V is None else logits_SV.masked_fill(self.ruled_out_V, float("-inf"))

    def rows(self, noisy: NoisyRows, space: EmbeddingSpace, table_VD: Tensor, unit_VD: Tensor) -> Tensor:
        """What the rows enter the network as, [S, D] in float32; `table_VD`: the network's own embeddings."""
        with torch.autocast(noisy.x_SD.device.type, enabled=False):
            table_VD, level_S1 = table_VD.float(), noisy.level_S[:, None]
            mask_D, sigma = table_VD[self.mask_token_id], space.noise_scale
            spread_S1 = ((1 - level_S1) ** 2 + (level_S1 * sigma) ** 2).sqrt()
            scaled_SD = noisy.x_SD / spread_S1.clamp_min(1e-3)
            if space.rows_from == "posterior":
                logits_SV = self.without_ruled_out(evidence(noisy.x_SD, noisy.level_S, unit_VD, space))
                posterior_SV = logits_SV.softmax(-1)
                doubt_S1 = torch.special.entr(posterior_SV).sum(-1, keepdim=True) / math.log(len(table_VD))
                rows_SD = (1 - doubt_S1) * (posterior_SV @ table_VD) + doubt_S1 * mask_D
            else:
                length = table_VD.detach().pow(2).mean().sqrt()
                rows_SD = level_S1 * mask_D + length * scaled_SD
        rows_SD = rows_SD + self.raw(self._cast(scaled_SD)).float()
        rows_SD = rows_SD + self.time_embedding(self._cast(features(noisy.level_S, noisy.step_S, sigma))).float()
        if self.guess is not None and noisy.guess_SD is not None:
            rows_SD = rows_SD + self.guess(self._cast(noisy.guess_SD)).float()
        return rows_SD

    def read(self, own_SD: Tensor, before_SD: Tensor) -> Tensor:
        """The rows that are scored, from the final rows of the positions and, where logits are shifted, of those before
        them.
        """
        return own_SD if self.own is None else before_SD + self.own(own_SD)

    def scores(self, module: PreTrainedModel, read_SD: Tensor, unit_VD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits in float32 [S, V], and of a network that predicts embeddings these [S, D]; else None."""
        if self.regress is not None:
            found_SD = self.regress(read_SD).float()
            return rounding(found_SD, unit_VD), found_SD
        logits_SV = module.get_output_embeddings()(read_SD)
        return adjust_logits(module, logits_SV).float(), None

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.raw.weight.dtype)


def num_features() -> int:
    return 2 * (2 * NUM_WAVES) + 3


def features(level_S: Tensor, step_S: Tensor, sigma: float) -> Tensor:
    """What tells of a noise level and a step size, [S, F]: waves of both, and the level's signal-to-noise ratio."""
    level_S, step_S = level_S.float(), step_S.float()
    size_S = (1 + (SHORTEST_STEP - 1) * step_S).log2() / math.log2(SHORTEST_STEP)
    frequencies = math.pi * 2.0 ** torch.arange(-1, NUM_WAVES - 1, device=level_S.device)
    waves = [f(one_S[:, None] * frequencies) for one_S in (level_S, size_S) for f in (torch.sin, torch.cos)]
    bounded_S = level_S.clamp(1e-3, 1 - 1e-3)
    ratio_S = ((1 - bounded_S) / (bounded_S * sigma)).log() / 4
    return torch.cat([*waves, ratio_S[:, None], size_S[:, None], (step_S > 0).float()[:, None]], -1)


def conditioning_of(module: PreTrainedModel) -> NoiseConditioning:
    """The part of a module that `attach` gave it."""
    found = getattr(module, PART)
    assert isinstance(found, NoiseConditioning)
    return found


def attach(module: PreTrainedModel, space: EmbeddingSpace, mask_token_id: int, *, shifted: bool) -> NoiseConditioning:
    """Give a stock module its conditioning, in its numbers and on its device; one that is there stays.

    FewstepError if the space asks for other parts than the conditioning has.
    """
    if not hasattr(module, PART):
        made = NoiseConditioning(space, module.config.hidden_size, mask_token_id, shifted=shifted)
        module.add_module(PART, made.to(module.device, module.dtype))
    part = conditioning_of(module)
    if (part.self_conditioned, part.predicts) != (space.self_conditioned, space.predicts):
        raise FewstepError(
            "a network in embedding space keeps what it predicts and whether it is self-conditioned: "
            f"{part.predicts}, {part.self_conditioned}; leave these settings out, or start from another model"
        )
    return part


def noisy_embeddings(module: PreTrainedModel, embedded_RTD: Tensor, noisy: NoisyRows, space: EmbeddingSpace) -> Tensor:
    """The embeddings of a packed forward, with noisy rows in their places."""
    part, table_VD = conditioning_of(module), module.get_input_embeddings().weight
    rows_SD = part.rows(noisy, space, table_VD, part.unit(table_VD)).to(embedded_RTD.dtype)
    flat_ND = embedded_RTD.flatten(0, 1).index_copy(0, noisy.rows_S, rows_SD)
    return flat_ND.view_as(embedded_RTD)


def noisy_scores(module: PreTrainedModel, hidden_RTD: Tensor, noisy: NoisyRows) -> tuple[Tensor, Tensor | None]:
    """As `NoiseConditioning.scores`, of the rows of a packed forward."""
    part, flat_ND = conditioning_of(module), hidden_RTD.flatten(0, 1)
    own_SD = flat_ND.index_select(0, noisy.rows_S)
    read_SD = part.read(own_SD, flat_ND.index_select(0, noisy.before_S))
    return part.scores(module, read_SD, part.unit(module.get_input_embeddings().weight))
