"""How much memory the slots of a service may take, and how long they are."""

from dataclasses import dataclass

from fewstep.decode.admission import bytes_of_slot
from fewstep.decode.decoder import Decoder, whole_blocks
from fewstep.decode.loop import CACHE_LENGTH_BUCKET
from fewstep.engine.choice import Choice
from fewstep.engine.refusals import TooLargeError
from fewstep.models.network import Network

SHORTEST_SLOT = 256
"""Slots are this long, or twice, four times ... as long; with a scratch slot."""

DEFAULT_SHARE = 0.5
"""Of the memory that is free when a service begins, its slots take up at most this much unless it is told."""

UNKNOWN_MEMORY = 1 << 32
"""Taken to be free where the system does not tell."""


@dataclass(frozen=True)
class MemoryLimit:
    """What all slots may take up. `strict`: slots of one length are always `num_slots` together."""

    num_bytes: int
    num_slots: int
    strict: bool = False

    def slot_for(self, choice: Choice, decoder: Decoder, positions: int) -> tuple[int, int]:
        """The length of slots for requests of so many positions, and the bytes of one: one of few lengths, or the
        shortest possible near the limit.

        TooLargeError if the limit could never hold such a slot, with what it could hold.
        """
        for length in (self._bucket(choice.network, decoder, positions), _shortest(positions)):
            slot_bytes = _bytes(choice, decoder, length)
            if self.slots_within(self.num_bytes, slot_bytes):
                return length, slot_bytes
        raise self._too_large(choice, decoder, positions)

    def slots_within(self, num_bytes: int, slot_bytes: int) -> int:
        """How many slots so many bytes hold, at most `num_slots`."""
        fits = min(self.num_slots, num_bytes // slot_bytes)
        return fits if fits == self.num_slots or not self.strict else 0

    def _bucket(self, network: Network, decoder: Decoder, positions: int) -> int:
        longest = _shortest(network.max_positions + decoder.traits.pass_length + decoder.block_size)
        length = SHORTEST_SLOT
        while length - 1 < positions:
            length *= 2
        return max(min(length - 1, longest), _shortest(positions))

    def _too_large(self, choice: Choice, decoder: Decoder, positions: int) -> TooLargeError:
        together = self.num_slots if self.strict else 1
        short, longer = (_bytes(choice, decoder, _shortest(one)) * together for one in (1, 1025))
        per_position = (longer - short) / (_shortest(1025) - _shortest(1))
        holds = _shortest(1) + int((self.num_bytes - short) // per_position) + 1
        holds = max(0, holds // CACHE_LENGTH_BUCKET * CACHE_LENGTH_BUCKET - 1)
        at_most = holds + 1 - decoder.traits.pass_length
        advice = (
            f"shorten the prompt or ask for fewer tokens, for at most {at_most} together"
            if at_most > 1
            else "give the service more memory"
        )
        return TooLargeError(
            f"the request takes up {positions} positions of {choice.network.name}, and the "
            f"{self.num_bytes / 1e6:.3g} MB that slots may take "
            f"hold {holds}{f' in each of {together} slots' if together > 1 else ''}; {advice}"
        )


def _bytes(choice: Choice, decoder: Decoder, length: int) -> int:
    return bytes_of_slot(choice.network, decoder, length, choice.companions)


def _shortest(positions: int) -> int:
    """The length of the shortest slot for so many positions, as the loop rounds it."""
    return whole_blocks(positions + 1, CACHE_LENGTH_BUCKET) - 1
