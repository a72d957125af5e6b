"""A pass, from plan to accept, reads no value on the host: such a read would wait for the device, and no CUDA graph
could hold it. Shown on fake tensors, which have shapes and no values, so that every read raises.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import pytest
import torch
from golden_tokens import medusa_heads, tiny
from helpers.networks import mixed, network, with_random_adapter
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from fewstep.decode.admission import positions_needed
from fewstep.decode.decoder import DRAWINGS, Accepted, Decoder, Shape
from fewstep.decode.loop import Loop, run_pass
from fewstep.decode.policies import DreamSchedule, EntropyBelow, Factor, FixedCount, Margin
from fewstep.decode.registry import DECODERS
from fewstep.decode.sampling import Sampling
from fewstep.decode.speculative import Speculative
from fewstep.decode.state import State
from fewstep.engine.language_model import LanguageModel
from fewstep.models.cache import KVCache
from fewstep.models.network import Network, Scores

SAMPLINGS = [Sampling(), Sampling(temperature=0.8), Sampling(temperature=1.5, top_k=9)]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "block": ("block_causal", {"threshold": 0.3, "gaps": 1}),
    "block, shifted": ("shifted block_causal", {"threshold": 0.3}),
    **{
        f"block, {type(policy).__name__}": ("block_causal", {"policy": policy})
        for policy in (EntropyBelow(), Margin(), Factor(), FixedCount(num_tokens=2))
    },
    "diffusion": ("bidirectional", {"steps": 9, "block_size": 8}),
    "diffusion, guided": ("bidirectional", {"threshold": 0.3, "cfg_scale": 0.5}),
    "diffusion, origin": ("shifted bidirectional", {"order": "origin", "steps": 9}),
    "diffusion, random": ("bidirectional", {"order": "random"}),
    "diffusion, Dream": ("shifted bidirectional", {"policy": DreamSchedule(alg="entropy", num_steps=9, alg_temp=0.4)}),
    "autoregressive": ("autoregressive", {}),
    "jacobi": ("autoregressive", {"decoder": "jacobi", "window": 5, "ngram": 2}),
    "jacobi, fixed": ("autoregressive", {"decoder": "jacobi", "window": 5, "fixed_windows": True}),
    "lookahead": ("autoregressive", {"decoder": "lookahead", "window": 4}),
    "prompt-lookup": ("autoregressive", {"decoder": "prompt-lookup"}),
    "medusa": ("autoregressive", {"decoder": "medusa", "window": 12}),
    "medusa, typical": ("autoregressive", {"decoder": "medusa", "window": 12, "typical": 0.3}),
    "speculative": ("autoregressive", {"decoder": "speculative", "window": 3}),
    "speculative, block draft": ("autoregressive", {}),
    "self-speculative": ("autoregressive", {"decoder": "self-speculative", "window": 4, "branches": 3}),
    "self-speculative, auto": ("autoregressive", {"decoder": "self-speculative", "window": 4, "cycle": "auto"}),
    "self-speculative, two-pass": ("autoregressive", {"decoder": "self-speculative", "window": 4, "cycle": "two-pass"}),
}


def case(name: str) -> tuple[Network, Decoder]:
    role, settings = CASES[name]
    if name.startswith("self-speculative"):
        net = with_random_adapter(8)
    elif name.startswith("medusa"):
        lm = tiny("autoregressive")
        return lm.network, lm.decoder(heads=medusa_heads(), **settings)
    else:
        net = network(role)
    if name.startswith("speculative"):
        draft = network("block_causal" if name.endswith("block draft") else "autoregressive")
        return net, Speculative(role=net.role, draft=draft, window=3)
    return net, LanguageModel(net).decoder(**settings)


class OnFakes:
    """Runs passes, each kind once more on fake tensors, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def __call__(
        self,
        networks: Mapping[str, Network],
        decoder: Decoder,
        state: State,
        caches: Mapping[str, KVCache],
        shape: Shape,
    ) -> tuple[Accepted[State], Scores]:
        result = run_pass(networks, decoder, state, caches, shape)  # first: what is constant is copied once
        if (shape.kind, shape.drawing) not in self.seen:
            self.seen.add((shape.kind, shape.drawing))
            with torch.inference_mode(False), torch.no_grad():
                mode = FakeTensorMode(allow_non_fake_inputs=True)
                fakes = {name: faked(cache, mode) for name, cache in caches.items()}
                like = state.map(lambda field: mode.from_tensor(field.clone()))
                with mode:
                    accepted, _ = run_pass(networks, decoder, like, fakes, shape)
            sizes = {name: field.shape for name, field in accepted.state.tensors().items()}
            assert sizes == {name: field.shape for name, field in state.tensors().items()}
        return result


def faked(cache: KVCache, mode: FakeTensorMode) -> KVCache:
    fake = copy(cache)
    for name, value in vars(cache).items():
        if isinstance(value, Tensor):
            setattr(fake, name, mode.from_tensor(value.clone()))
    return fake


def test_every_registered_decoder_has_a_case() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(DECODERS)


@pytest.mark.parametrize("name", CASES)
def test_no_pass_of_a_decoder_waits_for_the_host(name: str) -> None:
    net, decoder = case(name)
    samplings = SAMPLINGS[:1] if decoder.traits.greedy_only else SAMPLINGS
    asked = mixed([None], samplings)[:3]
    checked, length = OnFakes(), max(positions_needed(decoder, request) for request in asked)
    loop = Loop(net, decoder, num_slots=3, length=length, run_pass=checked)
    for request in asked:  # a greedy one, then one that samples beside it, then one that samples from the best
        loop.submit(request)
        for _ in range(3):
            loop.step()
    assert {drawing for _, drawing in checked.seen} == set(DRAWINGS[: len(samplings)])


@pytest.mark.parametrize("read", ["item", "tolist", "__bool__", "nonzero"])
def test_a_read_of_a_value_raises_on_fake_tensors(read: str) -> None:
    with FakeTensorMode() as mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        getattr(mode.from_tensor(torch.ones(1)), read)()
