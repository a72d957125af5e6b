"""Random networks whose texts vary, their decoders, requests to them, and when two outputs are the same."""

from dataclasses import replace
from typing import Any

import torch

from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.block import Block
from fewstep.decode.decoder import Decoder
from fewstep.decode.diffusion import Diffusion
from fewstep.decode.policies import Policy, Threshold
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.models.network import Network
from fewstep.models.tiny import tiny_network
from fewstep.train.lora import LoRASettings, add_gated_lora

BLOCK = 4
DREAM = {"right_shift_logits": True, "context_attention": "causal"}


def lively(role: Any, **options: Any) -> Network:
    """Random weights, large enough that tokens and confidences vary along a text."""
    net = tiny_network(role, head_scale=20, **options)
    with torch.no_grad():
        for weight in net.module.base_model.parameters():
            if weight.dim() == 2:
                weight.mul_(10)
    return net


def network(role: Any = "block_causal", **options: Any) -> Network:
    """A lively network with blocks of `BLOCK` positions. `role` may be a shifted one."""
    unshifted = role.removeprefix("shifted ")
    options = options if unshifted == role else DREAM | options
    return lively(unshifted, block_size=BLOCK, **options)


def disturbed(net: Network, share: float = 0.2) -> Network:
    """The same network, its weights changed in place by a share of their deviation: it agrees with `net` sometimes."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for weight in net.module.base_model.parameters():
            weight.add_(share * weight.std(correction=0) * torch.randn_like(weight))
    return net


def block_draft_of(target: Network, **options: Any) -> Network:
    """A block-causal network of the target's own weights, which guesses right now and then."""
    draft = tiny_network("block_causal", **options)
    draft.module.load_state_dict(target.module.state_dict())
    return draft


def with_random_adapter(block_size: int, seed: int = 0, *, base: Network | None = None) -> Network:
    """A causal network with a random gated adapter, whose guesses are nearly all wrong; `base` is changed in place."""
    base = base or tiny_network("autoregressive", head_scale=20)
    network = add_gated_lora(base, LoRASettings(rank=4, alpha=4), block_size=block_size)
    assert network.adapter is not None
    torch.manual_seed(seed)
    for name, parameter in network.adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return network


def decoder_of(net: Network, **settings: Any) -> Decoder:
    match net.role.name:
        case "autoregressive":
            return Autoregressive(role=net.role, **settings)
        case "bidirectional":
            return Diffusion(role=net.role, **{"block_size": BLOCK, **settings})
        case _:
            return Block(role=net.role, **{"policy": Threshold(at_least=0.3), **settings})


def requests(count: int = 8, **options: Any) -> list[Request]:
    """Prompts of 1 to 22 tokens, limits of 9 to 23."""
    return [
        Request(
            prompt_ids=[5 + (7 * i + 3 * j) % 50 for j in range(1 + 3 * i)],
            **{"max_new_tokens": 9 + 2 * i, "seed": i, **options},
        )
        for i in range(count)
    ]


def mixed(policies: list[Policy | None], samplings: list[Sampling]) -> list[Request]:
    """Requests of which no two have the same settings, in an order in which they leave at different times."""
    return [
        replace(
            request,
            policy=policies[i % len(policies)],
            sampling=samplings[(i + i // 4) % len(samplings)],
            seed=i % 3,
            early_stop=i % 5 != 0,
            stop_token_ids=None if i % 2 else (1, 7 + i, 20 + i),
        )
        for i, request in enumerate(requests(8))
    ]


def use_as_end_of_text(net: Network, token_id: int) -> None:
    net.tokenizer.eos_token = net.tokenizer.convert_ids_to_tokens(token_id)


def same(one: Output, other: Output) -> None:
    assert one.token_ids == other.token_ids
    assert one.num_forwards == other.num_forwards
    assert torch.equal(one.canvas_ids_G, other.canvas_ids_G)
    assert torch.equal(one.step_G, other.step_G)
    torch.testing.assert_close(one.confidence_G, other.confidence_G)
