"""Many requests at once: an asynchronous face of the scheduler, for a server or any other program with an event loop.

One thread runs the networks; what it tells goes to the event loop, once a round. It makes decoders too, between two
rounds: a draft may have to be loaded for one, and loading changes settings of torch on which passes depend. Prompts are
encoded in a second thread, so that neither the event loop nor a pass waits for that.
"""

import asyncio
import functools
import itertools
import math
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any

from annotated_types import Gt

from fewstep.decode.admission import check_request, positions_needed
from fewstep.decode.own_policies import check_runs
from fewstep.decode.requests import Event, Output, Record
from fewstep.decode.sharing import Sharing
from fewstep.engine.jobs import Job, News
from fewstep.engine.language_model import LanguageModel, Prompt
from fewstep.engine.memory_limit import DEFAULT_SHARE, UNKNOWN_MEMORY, MemoryLimit
from fewstep.engine.refusals import PassFailedError, QueueFullError, StoppingError
from fewstep.engine.scheduler import Scheduler
from fewstep.engine.settings import GenerationSettings
from fewstep.engine.statistics import Recorder, Statistics
from fewstep.errors import FewstepError, suggestion
from fewstep.models.load import free_memory
from fewstep.values import Count, check_fields, fitted, shown

UNKNOWN_RETRY_S = 1.0
"""When to try again, where no request has ended yet."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Limits of a service. FewstepError for a value that is none.

    `num_slots`: requests that share the passes of one group. `max_queued`: requests that may wait for a slot.
    `memory_bytes`: what all slots may take up; by default half of what is free on the device. `time_limit_s`: of a
    request from its submission, unless it brings its own. `prefill_rows`, `reuse_prefixes` and `strict`: as in
    `Sharing`; strictly no prefix is reused, and the plain path runs the passes.
    """

    num_slots: Count = 8
    max_queued: Count = 256
    memory_bytes: Annotated[int, Gt(0)] | None = None
    time_limit_s: Annotated[float, Gt(0)] | None = None
    prefill_rows: Count = 256
    reuse_prefixes: bool = True
    strict: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def sharing(self) -> Sharing:
        """How requests share a loop."""
        reuses = self.reuse_prefixes and not self.strict
        return Sharing(prefill_rows=self.prefill_rows, reuse_prefixes=reuses, strict=self.strict)


@dataclass(frozen=True)
class Update:
    """What is new of an answer: tokens that became final, in the order in which they did, each with its text; and what
    the text of the answer has grown by.
    """

    events: tuple[Event, ...]
    delta: str


class Handle:
    """One request of a service: iterate over its updates, or await its output.

    An update holds all that is new since the last one: a slow reader gets fewer and larger ones, and nothing waits for
    it. `text` only grows; it is that of the final tokens before the first open position. A handle that nobody holds any
    more, or that `async with` leaves, cancels its request.
    """

    def __init__(self, job: Job, mail: "Mailbox", cancel: Callable[[int], None]) -> None:
        self.number = job.number
        self.num_prompt_tokens = len(job.request.prompt_ids)
        self.text = ""
        self.final: dict[int, Event] = {}
        """Every token that is final, by position: those behind an open position too, in the order of their steps."""
        self._model = job.model
        self._answer = job.model.answer_text(job.stop)
        self._mail = mail
        self._over = False  # whether all was taken
        self._abandon = weakref.finalize(self, cancel, job.number)
        self._abandon.atexit = False

    async def __aenter__(self) -> "Handle":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[Update]:
        return self

    async def __anext__(self) -> Update:
        """The next update. The error of a request that failed or was not answered in time."""
        while not self._over:
            await self._mail.something()
            events, output = self._mail.take()
            self._over = self.done
            update = self._update(events, output)
            if update.events or update.delta:
                return update
        if self._mail.error is not None:
            raise self._mail.error
        raise StopAsyncIteration

    async def output(self) -> Output:
        """The whole answer, with its text; of a cancelled request what was final. The error of one that has none."""
        await self._mail.end()
        if self._mail.error is not None:
            raise self._mail.error
        assert self._mail.output is not None
        return self._mail.output

    def cancel(self) -> None:
        """Give the request up; nothing happens if it has ended."""
        self._abandon()

    @property
    def done(self) -> bool:
        """Whether its output, or its error, is there."""
        return self._mail.ended

    def forming_text(self, placeholder: str = "_") -> str:
        """The text of all tokens that are final up to the last one of these, with a placeholder for each open one."""
        decode = self._model.network.tokenizer.decode
        parts, run = [], list[int]()
        for position in range(max(self.final, default=-1) + 1):
            if position in self.final:
                run.append(self.final[position].token_id)
                continue
            parts += [decode(run, skip_special_tokens=True), placeholder]
            run = []
        return "".join([*parts, decode(run, skip_special_tokens=True)])

    def _update(self, events: Sequence[Event], output: Output | None) -> Update:
        decode = self._model.network.tokenizer.decode
        events = tuple(replace(event, text=str(decode([event.token_id]))) for event in events)
        for event in events:
            self.final[event.position] = event
            self._answer.add(event.position, event.token_id)
        text = self._answer.text if output is None else output.text
        delta = text[len(self.text) :] if text.startswith(self.text) else ""
        self.text += delta
        return Update(events, delta)


class Mailbox:
    """What was told of a request and not taken yet; used in the event loop alone."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.output: Output | None = None
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._taken, self._changed, self._ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def put(self, news: News) -> None:
        """More of the answer, or its end."""
        self._events += news.events
        self.job = news.job or self.job
        self.output, self.error = news.output, news.error
        if news.job or news.ends:
            self._taken.set()
        if news.ends:
            self._ended.set()
        if news.ends or news.events:
            self._changed.set()

    def take(self) -> tuple[list[Event], Output | None]:
        """The events since the last call, and the output if it is there."""
        events, self._events = self._events, []
        if not self.ended:
            self._changed.clear()
        return events, self.output

    async def taken(self) -> Job:
        """The request, once it is checked and queued. The error of one that is refused."""
        await self._set(self._taken)
        if self.job is None:
            assert self.error is not None
            raise self.error
        return self.job

    async def something(self) -> None:
        """Until there is something to take, or the end."""
        await self._set(self._changed)

    async def end(self) -> None:
        """Until the end."""
        await self._set(self._ended)

    async def _set(self, event: asyncio.Event) -> None:
        if not event.is_set() and self._loop is not asyncio.get_running_loop():
            raise FewstepError("a handle belongs to the event loop of its service; await it there")
        await event.wait()


Command = Callable[[Scheduler], list[News] | None]
"""What the event loop asks the scheduler's thread to do."""


class Worker:
    """The thread in which the scheduler runs. `deliver` is called in it, with the news of a round."""

    def __init__(self, scheduler: Scheduler, deliver: Callable[[list[News]], None], died: Callable[[], None]) -> None:
        self._scheduler, self._deliver, self._died = scheduler, deliver, died
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fewstep-service", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self, command: Command) -> None:
        """From any thread, at any time."""
        self._inbox.put(command)

    def stop(self) -> None:
        """End after what was told before; from any thread."""
        self._inbox.put(None)

    def join(self) -> None:
        self._thread.join()

    @property
    def ended(self) -> bool:
        """Whether it was started and runs no more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._once():
                pass
        finally:
            self._scheduler.close()
            self._died()

    def _once(self) -> bool:
        """Do what was told, then a round; wait while there is nothing to do. False once it is to stop."""
        news: list[News] = []
        for command in self._commands():
            if command is None:
                return False
            news += command(self._scheduler) or []
        news += self._scheduler.round()
        self._scheduler.statistics()
        if news:
            self._deliver(news)
        return True

    def _commands(self) -> list[Command | None]:
        commands: list[Command | None] = []
        try:
            if not self._scheduler.busy:
                commands.append(self._inbox.get())
            while True:
                commands.append(self._inbox.get_nowait())
        except queue.Empty:
            return commands


class Service:
    """Answers requests as they come, with one or several models whose loops share the memory limit.

    `models`: one, or several by name. `limits`: those of `ServiceSettings`, by keyword. Used in one event loop:

        async with Service(fewstep.load("gsm-student")) as service:
            handle = await service.submit("What is 2 + 3?", max_new_tokens=64)
            async for update in handle:
                print(update.delta, end="")
            output = await handle.output()

    Leaving `async with` stops it.
    """

    def __init__(self, models: LanguageModel | Mapping[str, LanguageModel], **limits: Any) -> None:
        known = list(ServiceSettings.__dataclass_fields__)
        for name in limits:
            if name not in known:
                raise FewstepError(f"unknown limit {name!r} of a service; {suggestion(name, known)}")
        self.settings = ServiceSettings(**limits)
        self.models = _by_name(models)
        device = next(iter(self.models.values())).network.device
        memory_bytes = self.settings.memory_bytes or int((free_memory(device) or UNKNOWN_MEMORY) * DEFAULT_SHARE)
        self._memory_limit = MemoryLimit(memory_bytes, self.settings.num_slots, strict=self.settings.strict)
        self._recorder = Recorder(memory_bytes)
        self._numbers = itertools.count()
        self._queued: set[int] = set()  # those that are being checked among them
        self._mail: dict[int, Mailbox] = {}
        self._stopping = False
        self.failed = False
        """Whether its thread has ended by itself, so that it answers nothing any more."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._encoder = ThreadPoolExecutor(1, "fewstep-encode")
        self._worker = Worker(
            Scheduler(self._memory_limit, self.settings.sharing, self._recorder), self._post, self._post_end
        )

    async def __aenter__(self) -> "Service":
        self._start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def submit(
        self,
        prompt: Prompt | Sequence[int],
        *,
        model: str | None = None,
        raw: bool = False,
        canvas: Sequence[int] | None = None,
        record: Record | None = None,
        time_limit_s: float | None = None,
        **settings: Any,
    ) -> Handle:
        """Queue a request: a text, messages or token ids, with settings as those of `LanguageModel.generate`.

        `model`: one of several by its name. `canvas`: ids with mask ids to fill, for infilling. `record`: what the
        output keeps of distributions; such requests share passes, on the plain path. `time_limit_s`: of this request.

        FewstepError if it cannot be answered: a `QueueFullError` if too many wait, a `StoppingError` once the service
        is being stopped, a `TooLargeError` if the memory limit could never hold it.
        """
        self._start()
        self._check_open()
        submitted_s = time.monotonic()
        if len(self._queued) >= self.settings.max_queued:
            self._recorder.ended("refused")
            raise QueueFullError(len(self._queued), self._retry_after_s())
        number = next(self._numbers)
        self._queued.add(number)
        self._idle.clear()
        try:
            named = self._model(model)
            ids = None if canvas is None else fitted(_listed(canvas), tuple[int, ...], "canvas")
            encode = functools.partial(_ids, self.models[named], prompt, raw=raw)
            prompt_ids = await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
            self._check_open()
        except BaseException as error:
            self._forget(number, refused=isinstance(error, FewstepError))
            raise
        known: dict[str, Any] = {"number": number, "submitted_s": submitted_s, "time_limit_s": time_limit_s}
        known |= {"canvas": ids, "record": record}
        mail = self._mail[number] = Mailbox()
        self._worker.tell(lambda scheduler: self._take(scheduler, named, prompt_ids, settings, **known))
        try:
            return Handle(await mail.taken(), mail, self._cancel)
        except asyncio.CancelledError:
            self._cancel(number)
            raise

    def statistics(self) -> Statistics:
        """What the service has done and does now; from any thread."""
        return self._recorder.snapshot(len(self._queued))

    async def drain(self, time_limit_s: float | None = None) -> bool:
        """Take no more requests, and wait until those that are there have ended; False if they did not in time.

        FewstepError in another event loop than that of the service.
        """
        fitted(time_limit_s, float | None, "time_limit_s")
        self._check_loop()
        self._stopping = True
        self._settle()
        try:
            await asyncio.wait_for(self._idle.wait(), time_limit_s)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Take no more requests, cancel those that are there, and free all memory. Nothing happens the second time.

        FewstepError in another event loop than that of the service, unless that one is closed.
        """
        if self._loop is None or self._worker.ended:
            self._stopping = True
            return
        if not self._loop.is_closed():  # else there is nobody to hear of the requests
            self._check_loop()
            self._stopping = True
            for number in list(self._mail):
                self._cancel(number)
            await self.drain()
        self._worker.stop()
        await asyncio.get_running_loop().run_in_executor(None, self._worker.join)
        self._encoder.shutdown(wait=False)

    # In the event loop

    def _start(self) -> None:
        self._check_loop()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._worker.start()

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise FewstepError("a service belongs to the event loop in which it began; use it there, or make another")

    def _check_open(self) -> None:
        if self._stopping:
            raise StoppingError("the service is being stopped and takes no more requests; try again once it is back")

    def _retry_after_s(self) -> float:
        """When a place in the queue is likely to be free, in whole seconds."""
        return float(max(1, math.ceil(self._recorder.seconds_per_end() or UNKNOWN_RETRY_S)))

    def _settle(self) -> None:
        if not self._mail and not self._queued:
            self._idle.set()

    def _forget(self, number: int, *, refused: bool) -> None:
        if refused:
            self._recorder.ended("refused")
        self._queued.discard(number)
        self._settle()

    def _model(self, name: str | None) -> str:
        if name is None and len(self.models) == 1:
            return next(iter(self.models))
        if name is None:
            raise FewstepError(f"this service has several models; name one of {', '.join(self.models)}")
        if fitted(name, str, "model") not in self.models:
            raise FewstepError(f"unknown model {name!r}; {suggestion(name, self.models)}")
        return name

    def _deliver(self, news: Sequence[News]) -> None:
        for one in news:
            if one.begun or one.ends:
                self._queued.discard(one.number)
            mailbox = self._mail.get(one.number)
            if mailbox is None:
                continue
            mailbox.put(one)
            if one.ends:
                del self._mail[one.number]
        self._settle()

    def _deliver_end(self) -> None:
        """The worker has ended; nobody may wait for it any longer."""
        self.failed = not self._stopping
        self._stopping = True
        lost = PassFailedError("the service ended before the request was answered; start it again")
        self._deliver([News(number=number, error=lost) for number in list(self._mail)])

    # From any thread

    def _cancel(self, number: int) -> None:
        if number in self._mail:
            self._worker.tell(lambda scheduler: scheduler.cancel(number))

    def _post(self, news: Sequence[News]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, news)
        except RuntimeError:  # the event loop was closed, and nobody can be told any more
            self._worker.stop()

    def _post_end(self) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver_end)

    # In the scheduler's thread

    def _take(self, scheduler: Scheduler, *arguments: Any, **known: Any) -> list[News]:
        try:
            job = self._job(*arguments, **known)
            scheduler.submit(job)
        # Whatever a request made of its settings, it is told of it: a thread that ended here would leave all waiting.
        except Exception as error:
            self._recorder.ended("refused")
            return [News(number=known["number"], error=error)]
        return [News(number=job.number, job=job)]

    def _job(
        self,
        model_name: str,
        prompt_ids: list[int],
        settings: Mapping[str, Any],
        *,
        canvas: tuple[int, ...] | None,
        record: Record | None,
        time_limit_s: float | None,
        **known: Any,
    ) -> Job:
        """The request, checked. FewstepError if it cannot be answered."""
        limits = ServiceSettings(time_limit_s=time_limit_s)
        model = self.models[model_name]
        if self.settings.strict or record is not None:
            settings = {**settings, "engine": "off"}
        chosen = GenerationSettings.of(**settings)
        decoder = model.decoder(**settings)
        request = replace(
            chosen.request(prompt_ids, canvas=None if canvas is None else list(canvas)),
            policy=decoder.policy,
        )
        choice = model.choice(**settings)
        network = choice.network
        self.settings.sharing.check(decoder)
        check_runs(decoder.policy, decoder.block_size, network.vocab_size, network.device)
        positions = positions_needed(decoder, request, check_request(network, decoder, request))
        length, slot_bytes = self._memory_limit.slot_for(choice, decoder, positions)
        if record is not None:  # a hidden row for each position
            slot_bytes += (length + 1) * network.module.config.hidden_size * network.dtype.itemsize
        return Job(
            model=model,
            model_name=model_name,
            decoder=decoder,
            engine=chosen.engine,
            network=network,
            record=record,
            request=request,
            length=length,
            slot_bytes=slot_bytes,
            time_limit_s=limits.time_limit_s or self.settings.time_limit_s,
            stop=chosen.stop,
            **known,
        )


def _by_name(models: Any) -> dict[str, LanguageModel]:
    """FewstepError unless it is a model, or several by name."""
    if isinstance(models, LanguageModel):
        return {models.network.name: models}
    named = dict(models) if isinstance(models, Mapping) else {}
    if not named or not all(isinstance(name, str) and isinstance(one, LanguageModel) for name, one in named.items()):
        raise FewstepError(f"a service needs a model, or several by name; give at least one, got {shown(models)}")
    return named


def _listed(value: Any) -> Any:
    """A sequence as a list; what is none as it is."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def _ids(model: LanguageModel, prompt: Any, *, raw: bool) -> list[int]:
    """Token ids are taken as they are; all else is encoded."""
    if isinstance(prompt, bytes):
        raise FewstepError("the prompt must be text or a list of messages, got bytes; decode them first")
    is_ids = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    if is_ids and all(type(one) is int for one in prompt):
        return list(prompt)
    return model.encode(prompt, raw=raw)
