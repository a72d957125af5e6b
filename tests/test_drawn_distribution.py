"""Whatever drafts, what is drawn has the distribution of the model: a chi-square test over 8,000 answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.networks import block_draft_of

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import decode
from fewstep.decode.requests import Request
from fewstep.decode.sampling import Sampling, tempered
from fewstep.decode.self_speculative import Cycle, SelfSpeculative
from fewstep.decode.speculative import Speculative
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train.lora import LoRASettings, add_gated_lora

NUM_DRAWS, PROMPT = 8_000, [5, 6, 7]
SAMPLING = Sampling(temperature=0.7, top_k=4)


def target() -> Network:
    return tiny_network("autoregressive", hidden=16, layers=1, head_scale=8, seed=1)


def causal_draft() -> tuple[Network, Decoder]:
    return target(), Speculative(role=target().role, draft=another(), window=2)


def another() -> Network:
    """A network whose distribution is near that of the target."""
    draft = target()
    with torch.no_grad():
        head = draft.module.get_output_embeddings().weight
        head += 0.3 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    return draft


def block_draft() -> tuple[Network, Decoder]:
    network = target()
    draft = block_draft_of(network, hidden=16, layers=1, context_attention="causal")
    return network, Speculative(role=network.role, draft=draft, window=2)


def self_speculative(cycle: Cycle) -> tuple[Network, Decoder]:
    network = add_gated_lora(target(), LoRASettings(rank=4, alpha=4), block_size=4)
    assert network.adapter is not None
    return network, SelfSpeculative(role=network.role, adapter=network.adapter, window=2, cycle=cycle)


def answer_probabilities(net: Network, prompt: list[int], sampling: Sampling, length: int) -> dict[Any, float]:
    """Every answer of so many tokens that can be drawn -> its probability, by plain forwards."""
    assert sampling.top_k is not None
    found: dict[Any, float] = {(): 1.0}
    for _ in range(length):
        longer: dict[Any, float] = {}
        for answer, probability in found.items():
            with torch.no_grad():
                logits_11V = net.module(torch.tensor([[*prompt, *answer]])).logits[:, -1:]
            kept = tempered(
                logits_11V, torch.tensor([sampling.temperature]), torch.tensor([sampling.top_k]), torch.tensor([1.0])
            ).softmax(-1)[0, 0]
            for token in kept.nonzero()[:, 0].tolist():
                longer[*answer, token] = probability * float(kept[token])
        found = longer
    return found


def deviation(network: Network, counts: torch.Tensor) -> tuple[float, int]:
    """The chi-square statistic of answers counted by `places` against a network's probabilities, and its cells."""
    statistic, cells = 0.0, 0
    for answer, probability in answer_probabilities(network, PROMPT, SAMPLING, 3).items():
        expected = NUM_DRAWS * probability
        if expected >= 5:
            cell = int(places(torch.tensor(answer), network))
            observed = float(counts[cell]) if cell < len(counts) else 0.0
            statistic += (observed - expected) ** 2 / expected
            cells += 1
    return statistic, cells


def places(answers: torch.Tensor, network: Network) -> torch.Tensor:
    """A number for every answer of three tokens."""
    return (answers * network.vocab_size ** torch.arange(3)).sum(-1)


@pytest.mark.parametrize(
    "make", [causal_draft, block_draft, lambda: self_speculative("two-pass"), lambda: self_speculative("fused")]
)
def test_the_distribution_of_answers_is_that_of_the_model(make: Callable[[], tuple[Network, Decoder]]) -> None:
    network, decoder = make()
    asked = [
        Request(prompt_ids=PROMPT, max_new_tokens=3, seed=seed, sampling=SAMPLING, early_stop=False)
        for seed in range(NUM_DRAWS)
    ]
    outputs = decode(network, asked, decoder, batch_size=NUM_DRAWS // 2)
    passes = torch.tensor([output.num_forwards for output in outputs])
    assert len(passes.unique()) > 1, "some guesses are accepted and some are not, or the test shows little"
    counts = places(torch.stack([output.canvas_ids_G for output in outputs]), network).bincount()
    statistic, cells = deviation(network, counts)
    assert cells > 20
    assert torch.special.gammaincc(torch.tensor((cells - 1) / 2.0), torch.tensor(statistic / 2)) > 0.01
    assert deviation(another(), counts)[0] > 10 * cells, "the test tells a draft's distribution from the target's"
