"""Who gets a slot when: the scheduler by itself, without threads."""

from collections.abc import Iterable
from typing import Any

from helpers.networks import network
from helpers.services import model

from fewstep.engine import scheduler as module
from fewstep.engine.jobs import Job, News
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.scheduler import Scheduler
from fewstep.engine.service import Service

LONG = {"max_new_tokens": 40, "early_stop": False}


class Desk:
    """Makes jobs of a service that never starts, and lets its scheduler run."""

    def __init__(self, lms: dict[str, LanguageModel], **limits: Any) -> None:
        self.service = Service(lms, **limits)
        self.scheduler: Scheduler = self.service._worker._scheduler
        self.count = 0
        self.begun: list[int] = []
        self.ended: list[int] = []

    def submit(self, name: str, prompt: str = "ab", **settings: Any) -> int:
        job: Job = self.service._job(
            name,
            self.service.models[name].encode(prompt),
            {**LONG, **settings},
            canvas=None,
            record=None,
            time_limit_s=None,
            number=self.count,
            submitted_s=0.0,
        )
        self.scheduler.submit(job)
        self.count += 1
        return job.number

    def note(self, news: Iterable[News]) -> None:
        for one in news:
            if one.begun:
                self.begun.append(one.number)
            if one.ends:
                self.ended.append(one.number)

    def run(self, num_rounds: int | None = None) -> None:
        """So many rounds, or to the end."""
        while self.scheduler.busy and num_rounds != 0:
            self.note(self.scheduler.round())
            num_rounds = None if num_rounds is None else num_rounds - 1

    @property
    def loops(self) -> list[tuple[str, int, int]]:
        """Decoder, slots and length of each loop."""
        return [
            (group.decoder.name, seats.loop.num_slots, seats.loop.length)
            for group in self.scheduler._groups
            for seats in group.seats
        ]

    @property
    def num_bytes(self) -> int:
        return sum(seats.num_bytes for seats in self.scheduler._all_seats())


def two_models() -> dict[str, LanguageModel]:
    return {name: model(name) for name in ("autoregressive", "block")}


def test_who_waits_for_memory_is_overtaken_by_nobody() -> None:
    desk = Desk(two_models(), num_slots=2, memory_bytes=300_000)
    first = desk.submit("autoregressive")
    desk.run(1)
    waits = desk.submit("block")
    later = [desk.submit("autoregressive") for _ in range(3)]
    desk.run(3)
    assert desk.begun == [first]  # though a slot of its own group is free for the second
    desk.run()
    assert desk.begun == [first, waits, *later]
    assert desk.num_bytes <= 300_000


def test_requests_of_a_group_begin_in_their_order_and_those_of_another_do_not_wait() -> None:
    desk = Desk(two_models(), num_slots=1)
    numbers = [desk.submit(name) for name in ("autoregressive", "autoregressive", "block", "autoregressive", "block")]
    desk.run(1)
    assert desk.begun == [numbers[0], numbers[2]]
    desk.run()
    autoregressive, block = [numbers[0], numbers[1], numbers[3]], [numbers[2], numbers[4]]
    assert [one for one in desk.begun if one in autoregressive] == autoregressive
    assert [one for one in desk.begun if one in block] == block


def test_loops_take_turns() -> None:
    desk = Desk(two_models(), num_slots=4)
    for name in ("autoregressive", "autoregressive", "autoregressive", "block"):
        desk.submit(name)
    desk.run(10)
    passes = [seats.loop.num_passes for seats in desk.scheduler._all_seats()]
    assert passes == [5, 5]


def test_numbers_of_a_policy_share_a_loop_and_other_decoders_do_not() -> None:
    desk = Desk({"block": model("block"), "autoregressive": model("autoregressive")})
    for settings in ({"threshold": 0.3}, {"threshold": 0.9, "gaps": 1}, {"temperature": 0.7}):
        desk.submit("block", **settings)
    desk.submit("block", policy="margin")
    desk.submit("autoregressive")
    desk.submit("autoregressive", decoder="jacobi", window=4)
    desk.submit("autoregressive", decoder="jacobi", window=5)
    desk.submit("autoregressive", engine="off")
    desk.run(1)
    names = [name for name, _, _ in desk.loops]
    assert names == ["block", "block", "autoregressive", "jacobi", "jacobi", "autoregressive"]
    desk.run()


def test_a_slot_is_as_long_as_a_request_needs_or_longer_where_one_is_free() -> None:
    desk = Desk({"autoregressive": LanguageModel(network("autoregressive", max_positions=2048))}, num_slots=2)
    desk.submit("autoregressive", max_new_tokens=400)
    desk.submit("autoregressive", max_new_tokens=20)
    desk.run(1)
    assert desk.loops == [("autoregressive", 2, 511)]
    desk.submit("autoregressive", max_new_tokens=20)
    desk.submit("autoregressive", max_new_tokens=900)
    desk.run(1)
    assert [length for _, _, length in desk.loops] == [511, 255, 1023]


def test_idle_loops_make_room_and_a_small_loop_is_completed_later() -> None:
    desk = Desk(two_models(), num_slots=2, memory_bytes=420_000)  # for three slots
    desk.submit("autoregressive")
    desk.run()
    assert [slots for _, slots, _ in desk.loops] == [2]
    desk.submit("autoregressive")
    desk.run(1)
    desk.submit("block")
    desk.run(1)
    assert [(name, slots) for name, slots, _ in desk.loops] == [("autoregressive", 2), ("block", 1)]
    desk.run()
    desk.submit("block")
    desk.submit("block")
    desk.run(1)
    assert [(name, slots) for name, slots, _ in desk.loops] == [("block", 1), ("block", 1)]
    desk.run()
    assert len(desk.ended) == desk.count


def test_loops_that_nobody_uses_are_given_up_from_a_number_on(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MOST_LOOPS", 3)
    desk = Desk({"autoregressive": model("autoregressive")}, num_slots=1)
    for window in range(2, 9):
        desk.submit("autoregressive", decoder="jacobi", window=window)
        desk.run()
    assert len(desk.loops) == 3
    assert len(desk.scheduler._groups) <= 4


def test_strictly_all_slots_of_a_length_are_there_or_none() -> None:
    desk = Desk(two_models(), num_slots=2, memory_bytes=420_000, strict=True)
    desk.submit("autoregressive")
    waits = desk.submit("block")
    desk.run(2)
    assert waits not in desk.begun
    desk.run()
    assert [(name, slots) for name, slots, _ in desk.loops] == [("block", 2)]
