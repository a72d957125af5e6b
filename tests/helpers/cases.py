"""A network, a decoder and requests of different settings, for every decoder that there is."""

from fewstep.decode.decoder import Decoder
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.lookahead import Lookahead
from fewstep.decode.loop import Loop
from fewstep.decode.medusa import Medusa
from fewstep.decode.policies import Threshold
from fewstep.decode.prompt_lookup import PromptLookup
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.decode.speculative import Speculative
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from helpers.networks import decoder_of, disturbed, mixed, network, with_random_adapter

CASES = [
    *("block", "diffusion", "autoregressive", "jacobi", "prompt-lookup", "speculative"),
    *("lookahead", "medusa", "self-speculative"),
]


def answered_as_they_join(loop: Loop, asked: list[Request]) -> dict[int, Output]:
    """Outputs by number; each request is submitted while those before it are under way."""
    outputs: dict[int, Output] = {}
    for request in asked:
        loop.submit(request)
        outputs.update(loop.step())
    while loop.busy:
        outputs.update(loop.step())
    return outputs


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8),
    Sampling(temperature=1.5, top_k=9),
    Sampling(temperature=0.7, top_p=0.9),
]
RULES = [None, Threshold(at_least=0.2), Threshold(at_least=0.5, gaps=0), Threshold(at_least=0.4, gaps=2)]


def speculative(net: Network) -> Speculative:
    return Speculative(role=net.role, draft=disturbed(network("autoregressive")), window=3)


def case(name: str) -> tuple[Network, Decoder, list[Request]]:
    net = network({"block": "block_causal", "diffusion": "bidirectional"}.get(name, "autoregressive"))
    match name:
        case "block":
            return net, decoder_of(net), mixed(RULES, SAMPLINGS)
        case "diffusion":
            return net, decoder_of(net, policy=Threshold(at_least=0.3), block_size=8), mixed(RULES, SAMPLINGS)
        case "jacobi":
            return net, Jacobi(role=net.role, window=5), mixed([None], SAMPLINGS[:1])
        case "prompt-lookup":
            return net, PromptLookup(role=net.role), mixed([None], SAMPLINGS)
        case "speculative":
            return net, speculative(net), mixed([None], SAMPLINGS)
        case "lookahead":
            return net, Lookahead(role=net.role, window=4, ngram=3), mixed([None], SAMPLINGS[:1])
        case "medusa":
            return net, Medusa(role=net.role, heads=MedusaHeads.of(net, 2), window=6), mixed([None], SAMPLINGS[:1])
        case "self-speculative":
            net = with_random_adapter(6, base=net)
            assert net.adapter is not None
            return net, SelfSpeculative(role=net.role, adapter=net.adapter, window=4), mixed([None], SAMPLINGS)
        case "autoregressive":
            return net, decoder_of(net), mixed([None], SAMPLINGS)
    raise KeyError(name)
