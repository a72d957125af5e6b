"""Transformers' own `generate` as a contender: what a causal model takes without this package."""

import time

import torch

from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel, Prompt


def generate_with_transformers(lm: LanguageModel, prompt: Prompt, *, max_new_tokens: int = 256) -> Output:
    """A greedy answer by the stock module's `generate` with its own cache: a pass for each token.

    `lm` must be causal, with its module as transformers loads it. Confidences are not known, and NaN.
    """
    prompt_ids_1T = torch.tensor([lm.encode(prompt)], device=lm.network.device)
    started_s = time.perf_counter()
    found_1T = lm.network.module.generate(
        prompt_ids_1T,
        attention_mask=torch.ones_like(prompt_ids_1T),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(lm.network.stop_token_ids),
        pad_token_id=lm.network.pad_token_id,
    )
    token_ids = found_1T[0, prompt_ids_1T.shape[1] :].tolist()  # which waits for the device
    seconds = time.perf_counter() - started_s
    output = Output(
        token_ids=token_ids,
        num_tokens=len(token_ids),
        num_forwards=len(token_ids),
        seconds=seconds,
        finish_reason="stop" if token_ids[-1] in lm.network.stop_token_ids else "length",
        canvas_ids_G=torch.tensor(token_ids),
        step_G=torch.arange(1, len(token_ids) + 1),
        confidence_G=torch.full((len(token_ids),), torch.nan),
    )
    return lm.with_text(output)
