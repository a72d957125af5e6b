"""A network in embedding space with `generate` in the manner of transformers."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.decode.embedding import EmbeddingSampling
from fewstep.decode.embedding_generator import sampler_for
from fewstep.decode.generator import answer
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.errors import FewstepError
from fewstep.models.embedding_denoiser import EmbeddingDenoiser


class EmbeddingModel(EmbeddingDenoiser):
    """A network in embedding space that generates: `EmbeddingModel.from_pretrained(folder).generate(prompt_ids)`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
        *,
        num_inference_steps: int = 1,
        max_new_tokens: int = 256,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        temperature: float = 1.0,
        batch_size: int = 32,
        **settings: Any,
    ) -> Tensor:
        """Prompts with their answers [B, L], padded on the right with the pad token; end-of-text included.

        `input_ids`: ids of one prompt or of several, padded where `attention_mask` is 0 on either side. `seed`: of all
        texts, which then differ by their prompts alone, or of each. `settings`: sampler, guidance, grid, churn and
        canvas_length. FewstepError for a prompt that leaves no room, or a setting without meaning.

        Unlike `LanguageModel`, whose number of steps follows from the network, this takes one step unless more are
        asked for, as pipelines of one-step models do. A warning says if the network was not trained for so few steps,
        or for so many.
        """
        prompts = _prompts(input_ids, attention_mask)
        sampling = EmbeddingSampling(steps=num_inference_steps, **settings)
        note = sampling.note(self.space)
        if note is not None:
            warnings.warn(note, stacklevel=2)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise FewstepError(f"{len(prompts)} prompts need one seed or as many, got {len(seeds)}")
        requests = [
            Request(
                prompt_ids=prompt, max_new_tokens=max_new_tokens, seed=one, sampling=Sampling(temperature=temperature)
            )
            for prompt, one in zip(prompts, seeds, strict=True)
        ]
        outputs = answer(sampler_for(self.network, sampling, requests, batch_size=batch_size), requests)
        return self._joined(prompts, outputs)

    def _joined(self, prompts: Sequence[list[int]], outputs: Sequence[Output]) -> Tensor:
        rows = [[*prompt, *output.token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
        longest, pad = max(map(len, rows)), self.network.pad_token_id
        return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self.device)


def _prompts(input_ids: Any, attention_mask: Tensor | None) -> list[list[int]]:
    """Ids of each prompt without padding."""
    if isinstance(input_ids, Tensor):
        rows = input_ids[None] if input_ids.dim() == 1 else input_ids
        if attention_mask is None:
            return [row.tolist() for row in rows]
        masks = attention_mask.bool().view(rows.shape)
        return [row[mask].tolist() for row, mask in zip(rows, masks, strict=True)]
    ids = list(input_ids)
    return [ids] if not ids or isinstance(ids[0], int) else [list(one) for one in ids]
