"""Whatever drafts, what is drawn has the distribution of the model: a chi-square test over 20,000 answers."""

from collections.abc import Callable

import pytest
import torch
from helpers.networks import block_draft_of
from test_accelerators import answer_probabilities

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import decode
from fewstep.decode.requests import Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.self_speculative import Cycle, SelfSpeculative
from fewstep.decode.speculative import Speculative
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train.lora import LoRASettings, add_gated_lora

NUM_DRAWS, PROMPT = 20_000, [5, 6, 7]
SAMPLING = Sampling(temperature=0.7, top_k=4)


def target() -> Network:
    return tiny_network("autoregressive", hidden=16, layers=1, head_scale=8, seed=1)


def block_draft() -> tuple[Network, Decoder]:
    network = target()
    draft = block_draft_of(network, hidden=16, layers=1, context_attention="causal")
    return network, Speculative(role=network.role, draft=draft, window=2)


def self_speculative(cycle: Cycle) -> tuple[Network, Decoder]:
    network = add_gated_lora(target(), LoRASettings(rank=4, alpha=4), block_size=4)
    assert network.adapter is not None
    return network, SelfSpeculative(role=network.role, adapter=network.adapter, window=2, cycle=cycle)


@pytest.mark.parametrize("make", [block_draft, lambda: self_speculative("two-pass"), lambda: self_speculative("fused")])
def test_the_distribution_of_answers_is_that_of_the_model(make: Callable[[], tuple[Network, Decoder]]) -> None:
    network, decoder = make()
    asked = [
        Request(prompt_ids=PROMPT, max_new_tokens=3, seed=seed, sampling=SAMPLING, early_stop=False)
        for seed in range(NUM_DRAWS)
    ]
    outputs = decode(network, asked, decoder, batch_size=10_000)
    passes = torch.tensor([output.num_forwards for output in outputs])
    assert len(passes.unique()) > 1, "some guesses are accepted and some are not, or the test shows little"
    place_V = network.vocab_size ** torch.arange(3)
    counts = torch.stack([output.canvas_ids_G for output in outputs]).mul(place_V).sum(1).bincount()
    statistic, cells = 0.0, 0
    for answer, probability in answer_probabilities(network, PROMPT, SAMPLING, 3).items():
        expected = NUM_DRAWS * probability
        cell = int((torch.tensor(answer) * place_V).sum())
        if expected >= 5:
            observed = float(counts[cell]) if cell < len(counts) else 0.0
            statistic += (observed - expected) ** 2 / expected
            cells += 1
    assert cells > 20
    assert torch.special.gammaincc(torch.tensor((cells - 1) / 2.0), torch.tensor(statistic / 2)) > 0.01
