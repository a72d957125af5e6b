"""How many tokens the passes of a real model finalise, recorded from its answers and replayed with other weights.

A file holds one list for each block that was finalised as a whole: the tokens of its passes, in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.decode.decoder import Decoder
from fewstep.decode.policies import Scheduled, scheduled
from fewstep.decode.requests import Output, Request
from fewstep.errors import FewstepError
from fewstep.json_files import read_json
from fewstep.values import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class AcceptanceSchedule:
    """`blocks`: the tokens that each pass of a block finalised. FewstepError unless each has `block_size` in all."""

    block_size: Count
    blocks: tuple[tuple[Count, ...], ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.blocks:
            raise FewstepError("a schedule needs at least one block")
        for passes in self.blocks:
            if sum(passes) != self.block_size:
                raise FewstepError(
                    f"a schedule for blocks of {self.block_size} tokens has one whose passes finalise {sum(passes)}"
                )

    @property
    def tokens_per_pass(self) -> float:
        return self.block_size * len(self.blocks) / sum(map(len, self.blocks))

    def policies(self, count: int) -> list[Scheduled]:
        """For so many requests, all of whose blocks then go alike: blocks of few passes, of many, and between."""
        ordered = sorted(self.blocks, key=len)
        return [scheduled(ordered[(2 * index + 1) * len(ordered) // (2 * count)]) for index in range(count)]

    def to_json(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "blocks": [list(passes) for passes in self.blocks]}


def check_recordable(decoder: Decoder) -> None:
    """FewstepError for a decoder without blocks."""
    if decoder.block_size == 1:
        raise FewstepError(
            f"the {decoder.name} decoder has no blocks to record a schedule of; choose block or diffusion"
        )


def recorded(decoder: Decoder, answered: Sequence[tuple[Request, Output]]) -> AcceptanceSchedule:
    """Of some answers. FewstepError for a decoder without blocks, or if no answer finalised a whole block."""
    check_recordable(decoder)
    size, blocks = decoder.block_size, list[tuple[int, ...]]()
    for request, output in answered:
        given = len(request.prompt_ids) - decoder.role.first_block_start(len(request.prompt_ids))
        # The first block may hold the end of the prompt; what fills a block behind the end of the text is no answer.
        steps = output.step_G[(-given) % size : output.num_tokens]
        for block in steps[: len(steps) // size * size].view(-1, size).tolist():
            if min(block) > 0:
                blocks.append(tuple(block.count(step) for step in sorted(set(block))))
    if not blocks:
        raise FewstepError(
            f"no answer finalised a whole block of {size} tokens, so there is no schedule to record; ask for longer "
            "answers, or for smaller blocks"
        )
    return AcceptanceSchedule(block_size=size, blocks=tuple(blocks))


def read_schedule(path: Path) -> AcceptanceSchedule:
    """FewstepError naming the file if it holds none."""
    found = read_json(path)
    if not isinstance(found, dict) or not {"block_size", "blocks"} <= found.keys():
        raise FewstepError(f"{path} holds no schedule; record one with bench --record")
    try:
        return AcceptanceSchedule(block_size=found["block_size"], blocks=found["blocks"])
    except FewstepError as error:
        raise FewstepError(f"{path}: {error}") from None
