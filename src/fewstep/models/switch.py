"""One set of weights in several roles: a loaded network with an adapter beside its weights."""

from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.models.checkpoint_files import CONFIG, GATED, VOCABULARIES
from fewstep.models.load import (
    holding,
    load_network,
    load_tokenizer,
    open_checkpoint,
    read_config,
    weights_hash,
    with_gated_adapter,
)
from fewstep.models.network import Network
from fewstep.models.roles import Role
from fewstep.models.shared import beside_adapter, learning_kept
from fewstep.models.vocabulary import end_tokens_named, set_end_tokens


def with_adapter(network: Network, name: str | Path) -> Network:
    """The network, or its base if it has an adapter already, with the adapter of a bundled name, a folder or a hub id.

    Both share all parameters of the base, and can be used in turn: nothing of the base is changed, moved or copied.
    Role and tokenizer are the adapter's. FewstepError if `name` is no adapter, or one of a model with other weights.
    """
    base = network.base or network
    folders = open_checkpoint(name)
    if len(folders) == 1:
        raise FewstepError(f"{name} is no adapter but a model of its own; load it")
    config = read_config(holding(folders, CONFIG))
    gated = getattr(config, GATED, None)
    if gated is not None:
        if base.role.name != "autoregressive":
            raise FewstepError(
                f"the gated adapter {name} drafts for a causal network, and {base.name} has the role {base.role.name}"
            )
        with learning_kept(base.module):
            return with_gated_adapter(base, folders[0], gated)
    _check_base(base, folders[1], str(name))
    with learning_kept(base.module):
        module = beside_adapter(base.module, folders[0])
    tokenizer = load_tokenizer(holding(folders, *VOCABULARIES))
    set_end_tokens(module, [tokenizer.eos_token_id, *end_tokens_named(*reversed(folders))])
    adapted = Network(module, Role.from_config(config), tokenizer, name=str(name))
    adapted.base, adapted.may_round = base, base.may_round
    return adapted


def _check_base(base: Network, named: Path, name: str) -> None:
    """FewstepError unless the base that the adapter names has the weights of this network."""
    belongs_to = load_network(named, dtype=str(base.dtype).removeprefix("torch."), device="cpu")
    if weights_hash(belongs_to) != weights_hash(base):
        raise FewstepError(
            f"the adapter {name} belongs to {named}, and {base.name} has other weights; load that "
            "model, and give it the adapter"
        )
