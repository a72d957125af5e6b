"""What answers with networks in embedding space, and such a network with `generate` in the manner of transformers."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.decode.embedding import EmbeddingSampler, EmbeddingSampling, check_embedding_request, sampler_for
from fewstep.decode.generator import Generator, answer
from fewstep.decode.requests import Output, Record, Request
from fewstep.decode.sampling import Sampling
from fewstep.engine.choice import Engines
from fewstep.engine.manner import Manner
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.models.embedding_model import EmbeddingDenoiser
from fewstep.models.network import Network


class Samplers:
    """Makes the samplers of one network in embedding space."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._engines = Engines(network)

    def __call__(
        self,
        settings: GenerationSettings,
        requests: Sequence[Request],
        *,
        batch_size: int = 32,
        record: Record | None = None,
        listeners: Sequence[Any] = (),
        kept: Generator | None = None,
    ) -> EmbeddingSampler:
        """A sampler for these requests; each listener is called after a round, with the sampler."""
        if record is not None:
            raise FewstepError(
                "nothing is recorded of a model in embedding space, whose tokens change until the last pass"
            )
        sampling = self._sampling(settings)
        note = self._note(sampling)
        if note is not None:
            warnings.warn(note, stacklevel=2)
        made = sampler_for(
            self._engines.without_decoder(settings.engine).network,
            sampling,
            requests,
            batch_size=batch_size,
            kept=kept,
            fixed_temperature=_temperature(settings),
        )
        made.listeners = list(listeners)
        return made

    def manner(self, settings: GenerationSettings) -> Manner:
        """How it answers. FewstepError for a setting that has no meaning in embedding space."""
        sampling = self._sampling(settings).for_role(self.network.role)
        choice = self._engines.without_decoder(settings.engine)
        return Manner(
            decoder=str(sampling.sampler),
            rule={"threshold": None, "gaps": None, "block_size": None},
            engine=choice.engine,
            note=self._note(sampling) or choice.note,
            computed_in=choice.network.dtype,
            told={**vars(sampling), "temperature": _temperature(settings)},
        )

    def checker(self, settings: GenerationSettings) -> Callable[[Request], object]:
        """What raises FewstepError for a request that cannot be answered."""
        sampling = self._sampling(settings)
        return lambda request: check_embedding_request(self.network, sampling, request)

    def _sampling(self, settings: GenerationSettings) -> EmbeddingSampling:
        sampling = settings.embedding_sampling()
        sampling.for_role(self.network.role)
        return sampling

    def _note(self, sampling: EmbeddingSampling) -> str | None:
        assert self.network.role.embedding_space is not None
        return sampling.note(self.network.role.embedding_space)


def _temperature(settings: GenerationSettings) -> float:
    return 1.0 if settings.temperature is None else settings.temperature


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
