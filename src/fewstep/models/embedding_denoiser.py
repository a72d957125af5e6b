"""Networks in embedding space as a module in the manner of transformers, and how one is made of another network.

Axes: B = texts, L = positions, T = canvas positions of all texts that are no padding, V = vocabulary, D = hidden width.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from fewstep.errors import FewstepError
from fewstep.models.embedding_space import EmbeddingSpace, channel_losses, unit_rows, warp_of_losses
from fewstep.models.load import load_network, save_network
from fewstep.models.masks import added_to_scores, cached_mask
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import NoisyRows, conditioning_of, noisy_embeddings
from fewstep.models.roles import INVISIBLE

IGNORED = -100
"""The label of a position that is no target, in transformers."""

LEVELS = tuple(i / 24 for i in range(1, 24))
"""At which losses are measured to warp time by them."""

MOST_TOKENS_COMPARED = 4096


def to_embedding_space(network: Network, **fields: Any) -> Network:
    """The same weights in the role `embedding`, with a fresh conditioning; `fields` are those of `EmbeddingSpace`.

    From a network whose rows score the next token a token is read from the row before it, which has learnt that, plus a
    projection of its own row, which begins at zero. Of a network that is in embedding space already the fields are
    changed. Unless a warp is given, time is warped by what single rows tell of their tokens. FewstepError if there is
    no mask token, or for a field that has no meaning.
    """
    role = network.role
    if role.embedding_space is not None:
        return network.with_role(replace(role, embedding_space=replace(role.embedding_space, **fields)))
    mask_token_id = role.mask_token_id if role.mask_token_id is not None else network.tokenizer.mask_token_id
    if mask_token_id is None:
        raise FewstepError(
            f"{network.name} has no mask token, in whose place noise enters; name one in its config.json "
            "(mask_token_id), such as a token that occurs in no text"
        )
    table_VD = network.module.get_input_embeddings().weight
    space = EmbeddingSpace.of_width(table_VD.shape[1], **fields)
    is_causal = role.name == "autoregressive"
    made = network.with_role(
        replace(
            role.playing("autoregressive"),
            name="embedding",
            mask_token_id=mask_token_id,
            jacobi_window=None,
            right_shift_logits=role.scores_next_token,
            context_attention="causal" if is_causal else role.context_attention,
            embedding_space=space,
        )
    )
    return made if "warp" in fields else to_embedding_space(made, warp=channel_warp(made))


def channel_warp(network: Network) -> tuple[float, ...]:
    """The warp under which time is what single rows leave unknown of their tokens, all equally frequent."""
    space = network.role.embedding_space
    assert space is not None
    table_VD = network.module.get_input_embeddings().weight
    kept_V = torch.ones(len(table_VD), dtype=torch.bool, device=table_VD.device)
    kept_V[network.never_drawn] = False
    tokens = kept_V.nonzero()[:, 0]
    chosen = tokens[torch.linspace(0, len(tokens) - 1, min(len(tokens), MOST_TOKENS_COMPARED)).long()]
    return warp_of_losses(LEVELS, channel_losses(unit_rows(table_VD[chosen]), space, LEVELS))


SQUARED_ERROR_WEIGHT = 0.5
"""Of the squared error beside the cross-entropy of the rounding: minus the logarithm of a normal density has it."""


class DenoisingLosses(NamedTuple):
    """Of each row: its loss, and the cross-entropy of its token; of a network that predicts embeddings also the mean
    squared error of its numbers. [S] each.
    """

    loss_S: Tensor
    cross_entropy_S: Tensor
    squared_error_S: Tensor | None


def denoising_losses(logits_SV: Tensor, token_S: Tensor, found_SD: Tensor | None, unit_VD: Tensor) -> DenoisingLosses:
    """What predictions of clean tokens cost; `found_SD`: predicted embeddings, where those are predicted."""
    cross_entropy_S = nn.functional.cross_entropy(logits_SV, token_S, reduction="none")
    if found_SD is None:
        return DenoisingLosses(cross_entropy_S, cross_entropy_S, None)
    squared_error_S = (found_SD.float() - unit_VD[token_S]).pow(2).mean(-1)
    return DenoisingLosses(cross_entropy_S + SQUARED_ERROR_WEIGHT * squared_error_S, cross_entropy_S, squared_error_S)


class EmbeddingDenoiser(nn.Module):
    """A causal-LM backbone of transformers that denoises token embeddings; `module` is the backbone.

    Timesteps are noise levels in [0, 1]: 0 is clean text, 1 is pure noise.
    """

    def __init__(self, network: Network) -> None:
        """FewstepError if the network is not in embedding space."""
        super().__init__()
        if network.role.embedding_space is None:
            raise FewstepError(
                f"{network.name} has the role {network.role.name}; make it a network in embedding space first, with "
                "to_embedding_space or fewstep train embedding"
            )
        self.module = network.module
        self.network = network

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: str = "float32", device: str = "auto", **fields: Any) -> Self:
        """A bundled name, a folder or a hub id. A causal model or a masked-diffusion one becomes a network in embedding
        space, to be trained; `fields`: those of `EmbeddingSpace` that are set. FewstepError if it cannot be.
        """
        network = load_network(name, dtype=dtype, device=device)
        if network.role.embedding_space is None or fields:
            network = to_embedding_space(network, **fields)
        return cls(network)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain folder of safetensors, config.json and the tokenizer, which `from_pretrained` and
        `fewstep.load` read.
        """
        save_network(self.network, folder)

    @property
    def space(self) -> EmbeddingSpace:
        space = self.network.role.embedding_space
        assert space is not None
        return space

    @property
    def config(self) -> PreTrainedConfig:
        return self.module.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.network.tokenizer

    @property
    def device(self) -> torch.device:
        return self.module.device

    def embed(self, token_ids: Tensor) -> Tensor:
        """Clean embeddings of tokens in the space that noise is added in, [..., D], float32."""
        return conditioning_of(self.module).unit(self.module.get_input_embeddings().weight)[token_ids]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        timesteps: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        noisy_embeds: Tensor | None = None,
        step_sizes: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CausalLMOutput:
        """Logits [B, L, V] for the clean token of every canvas position, and with `labels` their mean cross-entropy (of
        a network that predicts embeddings, plus half their mean squared error).

        `input_ids` [B, L]: prompts, then canvases, padded on the right where `attention_mask` [B, L] is 0. The canvas
        begins at the first position whose label is not -100, or without `labels` at the first mask token. Its other
        positions are given ones, and stay clean. `timesteps`: noise levels in [0, 1], [B] or [B, L]; by default drawn
        evenly in warped time. `noisy_embeds` [B, L, D] take the place of labels with noise. `step_sizes` [B]: the time
        that is to be taken at once, see `NoisyRows`. FewstepError without anything to denoise, or for a level
        outside of [0, 1].
        """
        real_BL = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        target_BL = real_BL & (input_ids == self.network.role.mask_token_id if labels is None else labels != IGNORED)
        if not target_BL.any(1).all():
            raise FewstepError("every text needs a position to denoise: a label other than -100, or a mask token")
        if labels is None and noisy_embeds is None:
            raise FewstepError("there is nothing to denoise: give labels, to which noise is added, or noisy_embeds")
        context_B1 = target_BL.int().argmax(1, keepdim=True)
        positions_BL = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        canvas_BL = real_BL & (positions_BL >= context_B1)
        level_BL = self._levels(timesteps, target_BL, generator)
        clean_BL = input_ids if labels is None else torch.where(target_BL, labels, input_ids)
        noisy = self._noisy(canvas_BL, clean_BL, level_BL, noisy_embeds, step_sizes, generator)
        logits_BLV, found_TD = self._score(input_ids, real_BL, context_B1, positions_BL, noisy)
        if labels is None:
            return CausalLMOutput(logits=logits_BLV)
        losses = denoising_losses(
            logits_BLV[target_BL],
            labels[target_BL],
            None if found_TD is None else found_TD[target_BL[canvas_BL]],
            self.embed(torch.arange(self.network.vocab_size)),
        )
        return CausalLMOutput(loss=losses.loss_S.mean(), logits=logits_BLV)

    def _levels(self, timesteps: Tensor | None, target_BL: Tensor, generator: torch.Generator | None) -> Tensor:
        if timesteps is None:
            count = len(target_BL)
            timesteps = self.space.level(torch.rand(count, generator=generator, device=target_BL.device))
        timesteps = timesteps.to(target_BL.device, torch.float32)
        if bool(((timesteps < 0) | (timesteps > 1)).any()):
            raise FewstepError(
                "timesteps must be noise levels in [0, 1], where 1 is pure noise; divide numbered steps by their number"
            )
        level_BL = timesteps if timesteps.dim() == 2 else timesteps[:, None]
        return torch.where(target_BL, level_BL, 0.0)

    def _noisy(
        self,
        canvas_BL: Tensor,
        clean_BL: Tensor,
        level_BL: Tensor,
        noisy_embeds: Tensor | None,
        step_sizes: Tensor | None,
        generator: torch.Generator | None,
    ) -> NoisyRows:
        rows_T, level_T = canvas_BL.flatten().nonzero()[:, 0], level_BL[canvas_BL]
        if noisy_embeds is None:
            clean_TD = self.embed(clean_BL[canvas_BL])
            noise_TD = torch.randn(clean_TD.shape, generator=generator, device=clean_TD.device)
            x_TD = self.space.noised(clean_TD, level_T, noise_TD)
        else:
            x_TD = noisy_embeds.float()[canvas_BL]
        step_BL = torch.zeros_like(level_BL) if step_sizes is None else step_sizes[:, None].expand_as(level_BL).float()
        return NoisyRows(rows_T, (rows_T - 1).clamp(min=0), x_TD, level_T, step_BL[canvas_BL])

    def _score(
        self, input_ids: Tensor, real_BL: Tensor, context_B1: Tensor, positions_BL: Tensor, noisy: NoisyRows
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of all positions, and predicted embeddings of the canvas."""
        network, module = self.network, self.module
        blocks_BL = network.role.blocks(positions_BL, context_B1)
        mask = cached_mask(blocks_BL, blocks_BL.masked_fill(~real_BL, INVISIBLE))
        mask |= torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)  # padding sees itself at least
        hidden_BLD = module.base_model(
            inputs_embeds=noisy_embeddings(module, module.get_input_embeddings()(input_ids), noisy, self.space),
            attention_mask=network.architecture.attention_mask(added_to_scores(mask, network.attention_dtype), None),
            position_ids=positions_BL,
            use_cache=False,
        ).last_hidden_state
        part = conditioning_of(module)
        before_BLD = torch.cat([hidden_BLD[:, :1], hidden_BLD[:, :-1]], 1)
        read_BLD = part.read(hidden_BLD, before_BLD)
        logits_BLV, found_BLD = part.scores(module, read_BLD, self.embed(torch.arange(network.vocab_size)))
        found_TD = None if found_BLD is None else found_BLD.flatten(0, 1)[noisy.rows_S]
        return part.without_ruled_out(logits_BLV), found_TD
