"""Whether a network and a decoder can answer a request, and what a slot for it takes up; on the host."""

from collections.abc import Mapping
from math import prod

from fewstep.decode.decoder import Decoder, whole_blocks
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.steps import begin, check_settings
from fewstep.errors import FewstepError
from fewstep.models.cache import bytes_per_position
from fewstep.models.load import free_memory
from fewstep.models.network import Network


def positions_needed(decoder: Decoder, request: Request, canvas: Canvas | None = None) -> int:
    """The positions that a request takes up: its context, its canvas (made by the decoder if not given) in whole
    blocks, and what a pass reads or writes beyond it.
    """
    canvas = canvas or decoder.canvas(request)
    start = decoder.role.first_block_start(len(request.prompt_ids))
    blocks = whole_blocks(len(request.prompt_ids) + len(canvas.tokens) - start, decoder.block_size)
    return start + blocks + decoder.traits.pass_length - decoder.block_size


def bytes_of_slot(
    network: Network, decoder: Decoder, length: int, companions: Mapping[str, Network] | None = None
) -> int:
    """What a slot of so many positions takes up: its state, and keys and values of the networks that have a cache.

    `companions` stand in the place of those of the decoder.
    """
    pad, num_stops = network.pad_token_id, len(network.stop_token_ids)
    nobody = begin(decoder, [], [], length, pad_token_id=pad, num_stop_tokens=num_stops)
    state = sum(prod(field.shape[1:]) * field.element_size() for field in nobody.tensors().values())
    traits = decoder.traits
    networks = (network, *{**traits.companions, **(companions or {})}.values()) if traits.cached else ()
    return state + (length + 1) * sum(bytes_per_position(each.module.config, each.attention_dtype) for each in networks)


def bytes_of_rows(network: Network, decoder: Decoder, num_rows: int, length: int) -> int:
    """About what a pass takes up for so many rows of a request, in a slot of so many positions."""
    config, itemsize = network.module.config, network.dtype.itemsize
    # In a layer: rows before and after its parts, queries, keys and values, and the two halves of the wide part.
    rows = num_rows * (8 * config.hidden_size + 3 * config.intermediate_size) * itemsize
    attention = 2 * num_rows * length * itemsize
    # Logits as they come, in float32, and what softmax and sorting make of them.
    logits = decoder.traits.pass_length * network.vocab_size * (itemsize + 3 * 4)
    return rows + attention + logits


def check_memory(
    network: Network,
    decoder: Decoder,
    num_slots: int,
    length: int,
    companions: Mapping[str, Network] | None = None,
    *,
    num_rows: int | None = None,
) -> None:
    """FewstepError if so many slots of this length do not fit in the free memory, saying how many do.

    `num_rows`: those of a request in its largest pass. If it is given, what they take up is counted too.
    """
    each, what = bytes_of_slot(network, decoder, length, companions), "keys, values and texts"
    if num_rows is not None:
        each += bytes_of_rows(network, decoder, num_rows, length)
        what += ", and for a pass"
    check_free(network, num_slots, length, bytes_each=each, what=what)


def check_free(network: Network, num_slots: int, length: int, *, bytes_each: int, what: str) -> None:
    """FewstepError if so many slots of this length do not fit in the free memory, saying how many do.

    `bytes_each`: those of a slot, which are taken up by its `what`.
    """
    free = free_memory(network.device)
    if free is None or num_slots * bytes_each <= free:
        return
    most = free // bytes_each
    advice = f"choose a batch size of at most {most}" if most else "not even one fits, so choose a shorter prompt"
    raise FewstepError(
        f"{num_slots} requests of {length} positions at a time take {num_slots * bytes_each / 1e9:.1f} GB for their "
        f"{what}, and {network.device} has {free / 1e9:.1f} GB free; {advice}, or fewer new tokens"
    )


def check_request(network: Network, decoder: Decoder, request: Request) -> Canvas:
    """The request's canvas. FewstepError if the network, or a network that drafts for it, cannot decode it with this
    decoder.
    """
    roles = decoder.traits.roles
    if network.role.name not in roles:
        raise FewstepError(
            f"{network.name} has the role {network.role.name}, which the {decoder.name} decoder cannot run; "
            f"it needs {' or '.join(roles)}"
        )
    if not request.prompt_ids and (decoder.traits.cached or network.role.scores_next_token):
        raise FewstepError("the prompt is empty; give at least one token")
    if request.max_new_tokens < 1:
        raise FewstepError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
    check_settings(decoder, request)
    if decoder.block_size > network.max_positions:  # a pass computes every row of its block, whatever was asked for
        raise FewstepError(
            f"block_size {decoder.block_size} exceeds the {network.max_positions} positions of {network.name}; choose "
            "a smaller one"
        )
    asked = request.max_new_tokens if request.canvas is None else len(request.canvas)
    # A canvas that was set counts as asked for; what it is rounded up to, in whole blocks, does not.
    asked = max(asked, getattr(decoder, "canvas_length", None) or 0)
    networks = (network, *decoder.traits.companions.values())
    for each in networks:  # before a canvas is made, which may be of any size
        _check_positions(each, decoder, len(request.prompt_ids), asked)
    canvas = decoder.canvas(request)
    for each in networks:
        each.check_ids([*request.prompt_ids, *canvas.tokens])
    return canvas


def _check_positions(network: Network, decoder: Decoder, num_given: int, num_new: int) -> None:
    """FewstepError if a text of this length exceeds the network's positions, or what can be computed exactly, or leaves
    no room for the decoder's guesses.
    """
    if num_given + num_new > network.max_positions:
        raise FewstepError(
            f"a prompt of {num_given} tokens and {num_new} new ones exceed the {network.max_positions} positions of "
            f"{network.name}; shorten one of them"
        )
    boundary = network.architecture.long_from
    if boundary is not None and network.architecture.restarts and num_given <= boundary < num_given + num_new:
        raise FewstepError(
            f"a prompt of {num_given} tokens and {num_new} new ones cross the {boundary} positions at which the "
            f"rotary factors of {network.name} (longrope) change; ask for at most {boundary - num_given} new tokens"
        )
    room = network.max_positions - num_given
    if decoder.traits.num_guessed > room:
        raise FewstepError(
            f"the {decoder.name} decoder guesses {decoder.traits.num_guessed} positions ahead, and the prompt leaves "
            f"{room} of the {network.max_positions} of {network.name}; set a smaller window"
        )
