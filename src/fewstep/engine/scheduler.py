"""Which request decodes when: groups of requests that can share passes, their loops and slots, under one memory limit.

Everything here runs in one thread and knows neither threads nor asyncio: `round` is called again and again, and returns
the news. Requests of one model and decoder, whatever their other settings, are a *group*; a group has a loop for each
length of slots that its requests need.

Fairness: requests get slots in the order in which they came, unless the slots that one waits for are of no use to a
later one. Who waits for memory is overtaken by nobody. Loops take turns, one round each.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import Loop
from fewstep.decode.own_policies import same_kind
from fewstep.decode.requests import Event, Output, Record
from fewstep.decode.sharing import Sharing
from fewstep.engine.choice import EngineSetting
from fewstep.engine.jobs import Job, News
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.memory_limit import MemoryLimit
from fewstep.engine.refusals import PassFailedError, TimeLimitError
from fewstep.engine.statistics import GroupStatistics, Recorder
from fewstep.models.network import Network

MOST_LOOPS = 16
"""Loops that nobody uses are given up from this many on: settings of a decoder can be of any number."""


@dataclass(eq=False)
class Seats:
    """A loop, and whose requests are in it by the loop's numbers."""

    loop: Loop
    num_bytes: int
    jobs: dict[int, Job] = field(default_factory=dict)
    last_used_s: float = 0.0
    counted: tuple[int, int, int] = (0, 0, 0)

    @property
    def num_free(self) -> int:
        return self.loop.num_slots - len(self.jobs)


@dataclass(eq=False)
class Group:
    """Requests that can share passes, with their loops; `most_slots` falls when memory runs out in a pass."""

    model: LanguageModel
    model_name: str
    decoder: Decoder
    engine: EngineSetting
    network: Network
    record: Record | None
    most_slots: int
    num_queued: int = 0
    seats: list[Seats] = field(default_factory=list)

    def takes(self, job: Job) -> bool:
        mine = self.model, self.engine, self.network, self.record
        if mine != (job.model, job.engine, job.network, job.record):
            return False
        return can_share_passes(self.decoder, job.decoder)


def can_share_passes(one: Decoder, other: Decoder) -> bool:
    """Whether they differ at most in the numbers of their policies, which requests bring themselves."""
    if type(one) is not type(other) or not same_kind(one.policy, other.policy):
        return False
    has_policy = any(each.name == "policy" for each in fields(one))  # type: ignore[arg-type]
    return one == (replace(other, policy=one.policy) if has_policy else other)  # type: ignore[type-var]


class Scheduler:
    """Runs jobs to their end. What it is told and what it tells is in the order of the calls."""

    def __init__(self, memory_limit: MemoryLimit, sharing: Sharing, recorder: Recorder) -> None:
        self._memory_limit = memory_limit
        self._sharing = sharing
        self._recorder = recorder
        self._groups: list[Group] = []
        self._queue: dict[int, tuple[Job, Group]] = {}  # by number, in the order of submission
        self._where: dict[int, tuple[Seats, int]] = {}
        self._turns: deque[Seats] = deque()
        self._may_admit = False

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._where)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        group = next((one for one in self._groups if one.takes(job)), None)
        if group is None:
            self._groups = [one for one in self._groups if one.seats or one.num_queued]
            group = Group(
                job.model,
                job.model_name,
                job.decoder,
                job.engine,
                job.network,
                job.record,
                self._memory_limit.num_slots,
            )
            self._groups.append(group)
        group.num_queued += 1
        self._queue[job.number] = job, group
        self._may_admit = True
        self._recorder.ended("submitted")

    def cancel(self, number: int) -> list[News]:
        """Give a job up, wherever it is; one that is not there has ended already."""
        job = self._job(number)
        return [] if job is None else [News(number=number, output=self._withdraw(job, "cancelled"))]

    def round(self) -> list[News]:
        """End what is over its time, give free slots to those that wait, and let one loop do a round."""
        return [*self._expire(), *self._admit(), *self._turn()]

    def statistics(self) -> None:
        """Tell the recorder what is where."""
        self._recorder.groups = [
            GroupStatistics(
                model=group.model_name,
                decoder=group.decoder.name,
                queued=group.num_queued,
                running=sum(len(seats.jobs) for seats in group.seats),
                slots=sum(seats.loop.num_slots for seats in group.seats),
                cache_bytes=sum(seats.num_bytes for seats in group.seats),
            )
            for group in self._groups
        ]

    def close(self) -> None:
        """Free all memory."""
        self._groups, self._queue, self._where = [], {}, {}
        self._turns.clear()

    # Ends before the end

    def _jobs(self) -> Iterator[Job]:
        yield from (job for job, _ in self._queue.values())
        yield from (seats.jobs[number] for seats, number in self._where.values())

    def _job(self, number: int) -> Job | None:
        if number in self._where:
            seats, inside = self._where[number]
            return seats.jobs[inside]
        return self._queue.get(number, (None,))[0]

    def _expire(self) -> list[News]:
        now_s = time.monotonic()
        late = [job for job in self._jobs() if job.deadline_s <= now_s]
        return [
            News(number=job.number, error=TimeLimitError(job.time_limit_s or 0.0, self._withdraw(job, "timed_out")))
            for job in late
        ]

    def _withdraw(self, job: Job, how: str) -> Output:
        """Take the job from the queue or its slot; what was final."""
        self._recorder.ended(how)
        self._may_admit = True
        if job.number in self._queue:
            self._leave_queue(job)
            return job.finished(None, time.monotonic())
        seats, inside = self._leave(job)
        try:
            return job.finished(seats.loop.cancel(inside), time.monotonic())
        except Exception:  # the next round of its loop says what is wrong, to all that are in it
            return job.finished(None, time.monotonic())

    def _leave_queue(self, job: Job) -> None:
        _, group = self._queue.pop(job.number)
        group.num_queued -= 1

    def _leave(self, job: Job) -> tuple[Seats, int]:
        seats, inside = self._where.pop(job.number)
        del seats.jobs[inside]
        if not seats.jobs:
            self._turns.remove(seats)
        self._may_admit = True
        return seats, inside

    # Slots

    def _admit(self) -> list[News]:
        """Give slots to those that wait."""
        if not self._may_admit:
            return []
        self._may_admit = False
        news, in_vain = [], set[tuple[Group, int]]()
        for job, group in list(self._queue.values()):
            if (group, job.length) in in_vain:
                continue
            try:
                seats, must_wait = self._find_seats(job, group)
                if seats is not None:
                    self._sit(job, seats)
                    news.append(News(number=job.number, begun=True))
            except Exception as error:  # what only the loop can tell of a request, or what its decoder raises
                self._leave_queue(job)
                self._recorder.ended("failed")
                news.append(News(number=job.number, error=error))
                continue
            if must_wait:
                break
            if seats is None:
                in_vain.add((group, job.length))
        return news

    def _sit(self, job: Job, seats: Seats) -> None:
        inside = seats.loop.submit(job.request)
        self._leave_queue(job)
        if not seats.jobs:
            self._turns.append(seats)
        seats.jobs[inside] = job
        self._where[job.number] = seats, inside
        self._recorder.begun(len(job.request.prompt_ids), time.monotonic() - job.submitted_s)

    def _find_seats(self, job: Job, group: Group) -> tuple[Seats | None, bool]:
        """A loop with a free slot for the job; if there is none, whether it waits for memory, and all later with it."""
        fitting = [
            seats
            for seats in group.seats
            if (seats.loop.length == job.length if self._memory_limit.strict else seats.loop.length >= job.length)
        ]
        free = [seats for seats in fitting if seats.num_free]
        if free:
            return min(free, key=lambda seats: seats.loop.length), False
        opened = self._open(job, group)
        # Without room for a loop of its own it waits for a slot of another one that fits.
        return opened, opened is None and not fitting

    def _open(self, job: Job, group: Group) -> Seats | None:
        """A new loop of the group with as many slots of this length as it lacks, or as memory allows; idle loops make
        room for it.
        """
        lacking = group.most_slots - sum(one.loop.num_slots for one in group.seats if one.loop.length == job.length)
        if lacking < 1:
            return None
        while True:
            fitting = self._memory_limit.slots_within(self._num_free_bytes(), job.slot_bytes)
            idle = sorted((one for one in self._all_seats() if not one.jobs), key=lambda one: one.last_used_s)
            if fitting >= lacking or not idle:
                break
            self._give_up(idle[0])
        if not fitting:
            return None
        for seats in idle[: max(0, len(list(self._all_seats())) + 1 - MOST_LOOPS)]:
            self._give_up(seats)
        loop = self._allocate(group, min(lacking, fitting), job.length)
        seats = Seats(loop, job.slot_bytes * loop.num_slots)
        group.seats.append(seats)
        return seats

    def _allocate(self, group: Group, num_slots: int, length: int) -> Loop:
        """With fewer slots if the device has no memory for so many. FewstepError if it has none for one."""
        while True:
            try:
                return group.model.loop(
                    group.decoder,
                    group.engine,
                    num_slots=num_slots,
                    length=length,
                    sharing=self._sharing,
                    record=group.record,
                )
            except (RuntimeError, MemoryError) as error:  # what torch raises where memory ends
                if num_slots == 1 or self._memory_limit.strict:
                    raise PassFailedError(
                        f"a slot of {length} positions could not be made ({_first_line(error)}); ask for fewer tokens"
                    ) from error
                num_slots = group.most_slots = num_slots // 2

    def _num_free_bytes(self) -> int:
        return self._memory_limit.num_bytes - sum(seats.num_bytes for seats in self._all_seats())

    def _all_seats(self) -> Iterator[Seats]:
        return (seats for group in self._groups for seats in group.seats)

    def _give_up(self, seats: Seats) -> None:
        """Free the memory of a loop that nobody is in."""
        group = next(group for group in self._groups if seats in group.seats)
        group.seats.remove(seats)
        self._may_admit = True

    # Rounds

    def _turn(self) -> list[News]:
        """One round of the loop whose turn it is."""
        if not self._turns:
            return []
        seats = self._turns[0]
        self._turns.rotate(-1)
        seats.last_used_s = time.monotonic()
        try:
            completed = dict(seats.loop.step())
            return self._tell(seats, completed, seats.loop.events())
        # Whatever a pass raised, its requests are told of it: a thread that ended here would leave all waiting.
        except Exception as error:
            return self._fail(seats, error)

    def _tell(self, seats: Seats, completed: dict[int, Output], events: Sequence[tuple[int, Event]]) -> list[News]:
        now_s = time.monotonic()
        told: dict[int, list[Event]] = {inside: [] for inside in completed}
        stopped, broken = [], dict[int, Exception]()
        for inside, event in events:
            told.setdefault(inside, []).append(event)
            try:
                if seats.jobs[inside].tell(event, now_s):
                    stopped.append(inside)
            # Such as a tokenizer that cannot decode what the network wrote: no business of other requests.
            except Exception as error:
                broken[inside] = error
                stopped.append(inside)
        for inside in dict.fromkeys(stopped):
            if inside not in completed and (output := seats.loop.cancel(inside)) is not None:
                completed[inside] = output
        self._count(seats, len(events))
        news = []
        for inside, found in told.items():
            job, output = seats.jobs[inside], completed.get(inside)
            if output is not None:
                self._leave(job)
                try:
                    output = job.finished(output, time.monotonic())
                except Exception as error:
                    broken[inside] = error
                if inside in broken:
                    self._recorder.ended("failed")
                    lost = PassFailedError(f"the answer could not be turned into text ({_first_line(broken[inside])})")
                    news.append(News(number=job.number, events=tuple(found), error=lost))
                    continue
                self._recorder.ended("completed")
                self._recorder.completed(output, (job.first_token_s or now_s) - job.submitted_s)
            news.append(News(number=job.number, events=tuple(found), output=output))
        return news

    def _count(self, seats: Seats, num_tokens: int) -> None:
        loop = seats.loop
        now = loop.num_passes, loop.num_prefilled, loop.num_reused
        passes, prefilled, reused = (after - before for after, before in zip(now, seats.counted, strict=True))
        seats.counted = now
        self._recorder.worked(passes=passes, prefilled=prefilled, reused=reused, tokens=num_tokens)

    def _fail(self, seats: Seats, error: Exception) -> list[News]:
        """The requests of a loop whose pass raised an error get it; the loop and its memory are given up."""
        group = next(group for group in self._groups if seats in group.seats)
        advice = "try again"
        if _is_out_of_memory(error) and group.most_slots > 1 and not self._memory_limit.strict:
            group.most_slots = max(1, seats.loop.num_slots // 2)
            advice = f"from now on {group.most_slots} requests share a pass; try again"
        told = PassFailedError(
            f"a pass of {group.model.network.name} with the {group.decoder.name} decoder failed "
            f"({_first_line(error)}); {advice}"
        )
        told.__cause__ = error.with_traceback(None)  # its frames would hold the memory of the loop
        failed = list(seats.jobs.values())
        for job in failed:
            self._leave(job)
            self._recorder.ended("failed")
        self._give_up(seats)
        return [News(number=job.number, error=told) for job in failed]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _is_out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "memory" in str(error).lower()
    )
