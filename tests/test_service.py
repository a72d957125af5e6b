"""Requests that come and go at any time get what they get alone, and leave nothing behind."""

import asyncio
import gc
import random
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.networks import network, same
from helpers.services import DECODERS, PROMPTS, alone, asked, model, read, run_in

import fewstep
from fewstep.decode.loop import Loop
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.refusals import (
    PassFailedError,
    QueueFullError,
    StoppingError,
    TimeLimitError,
    TooLargeError,
)
from fewstep.engine.service import Handle, Service
from fewstep.errors import FewstepError
from fewstep.models.network import Network
from fewstep.tasks.gsm_symbolic import problems

LONG = {"max_new_tokens": 40, "early_stop": False}


def nothing_is_left(service: Service) -> None:
    """No request, slot or queue place is taken, in the service, its scheduler or its loops."""
    now = service.statistics()
    assert (now.queued, now.running) == (0, 0)
    scheduler = service._worker._scheduler
    assert not scheduler.busy
    assert not scheduler._turns
    assert not service._mail
    for seats in scheduler._all_seats():
        assert not seats.jobs
        assert not seats.loop.busy
        assert sorted(seats.loop._free) == list(range(seats.loop.num_slots))
        assert bool(seats.loop.state.done_R.all())
    ends = {how: count for how, count in now.requests.items() if how not in ("submitted", "refused")}
    assert sum(ends.values()) == now.requests.get("submitted", 0)


async def settled(service: Service) -> None:
    """Until the scheduler has done all that it was told."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()
    service._worker.tell(lambda scheduler: loop.call_soon_threadsafe(done.set) and None)
    await done.wait()


@pytest.mark.parametrize("name", DECODERS)
def test_requests_that_join_midway_with_mixed_settings_get_what_they_get_alone(name: str) -> None:
    lm, several = model(name), asked(name, 7)
    expected = alone(lm, several)

    async def program(service: Service) -> list[Any]:
        handles = []
        for prompt, settings in several:
            handles.append(await service.submit(prompt, **settings))
            await asyncio.sleep(0.003)
        outputs = [await handle.output() for handle in handles]
        assert [one.slots for one in service.statistics().groups] == [3] * len(service.statistics().groups)
        nothing_is_left(service)
        return outputs

    outputs = run_in(lambda: Service(lm, num_slots=3), program)
    for output, one in zip(outputs, expected, strict=True):
        same(output, one)
        assert output.text == one.text


@pytest.mark.parametrize("num_slots", [1, 5, 8])
def test_a_batch_of_any_size_gives_the_same_tokens(num_slots: int) -> None:
    lm, several = model("block"), asked("block", 8)

    async def program(service: Service) -> list[Any]:
        handles = [await service.submit(prompt, **settings) for prompt, settings in several]
        return [await handle.output() for handle in handles]

    for output, one in zip(run_in(lambda: Service(lm, num_slots=num_slots), program), alone(lm, several), strict=True):
        same(output, one)


def test_updates_tell_every_token_once_and_the_text_as_it_grows() -> None:
    lm = model("block")
    prompt, settings = "what is 2+2?", {"max_new_tokens": 20, "threshold": 0.3}
    stream = lm.stream(prompt, **settings)
    expected = [(event.position, event.token_id, event.step, event.text) for event in stream]

    async def program(service: Service) -> None:
        handle = await service.submit(prompt, **settings)
        updates = await read(handle)
        events = [event for update in updates for event in update.events]
        assert [(event.position, event.token_id, event.step, event.text) for event in events] == expected
        assert "".join(update.delta for update in updates) == handle.text == (await handle.output()).text
        assert await read(handle) == []
        assert handle.num_prompt_tokens == len(lm.encode(prompt))

    run_in(lambda: Service(lm), program)


def test_the_forming_text_has_a_placeholder_for_each_open_position() -> None:
    lm = model("block")

    async def program(service: Service) -> list[str]:
        handle = await service.submit("x=1, y=2", max_new_tokens=12, threshold=0.3, early_stop=False)
        forming = []
        async for _ in handle:
            shown = handle.forming_text("\0")
            last = max(handle.final)
            assert shown.count("\0") == last + 1 - len(handle.final)
            assert shown.startswith(handle.text)
            forming.append(shown)
        return forming

    forming = run_in(lambda: Service(lm), program)
    assert any("\0" in one for one in forming)
    assert "\0" not in forming[-1]


@pytest.mark.parametrize("kind", ["text", "raw", "messages", "ids"])
def test_a_prompt_is_a_text_messages_or_ids(kind: str) -> None:
    lm = model("autoregressive")
    prompt: Any = {"messages": [{"role": "user", "content": "ab"}], "ids": [5, 6, 7]}.get(kind, "ab")
    expected = lm.generate("ab", raw=kind == "raw", max_new_tokens=6)

    async def program(service: Service) -> Any:
        return await (await service.submit(prompt, raw=kind == "raw", max_new_tokens=6)).output()

    output = run_in(lambda: Service(lm), program)
    if kind == "ids":
        assert len(output.token_ids) > 0
    else:
        same(output, expected)


def test_stop_texts_end_an_answer_and_free_its_slot() -> None:
    lm = model("autoregressive")
    whole = lm.generate("ab", max_new_tokens=40, early_stop=False)
    stop = lm.network.tokenizer.decode(whole.token_ids[5:7])
    expected = lm.generate("ab", max_new_tokens=40, early_stop=False, stop=stop)

    async def program(service: Service) -> None:
        handle = await service.submit("ab", max_new_tokens=40, early_stop=False, stop=stop)
        updates = await read(handle)
        output = await handle.output()
        same(output, expected)
        assert output.finish_reason == "stop"
        assert "".join(update.delta for update in updates) == output.text == expected.text
        nothing_is_left(service)

    run_in(lambda: Service(lm), program)


def test_an_infill_is_a_request_with_a_canvas() -> None:
    lm = model("diffusion")
    mask = lm.network.role.mask_token_id
    expected = lm.infill("ab", "cd", num_tokens=5, block_size=8)

    async def program(service: Service) -> Any:
        ids = [*lm.encode_part("ab")]
        handle = await service.submit(ids, canvas=[mask] * 5 + lm.encode_part("cd"), block_size=8)
        return await handle.output()

    output = run_in(lambda: Service(lm), program)
    assert output.token_ids == expected.token_ids
    assert output.num_tokens == 5


def test_the_bundled_student_and_the_causal_model_answer_together() -> None:
    lms = {name: fewstep.load(name, dtype="float32", device="cpu") for name in ("gsm-student", "gsm-ar")}
    questions = [problem.question for problem in problems("test", 3)]
    several = [(name, question, {"max_new_tokens": 24}) for name in lms for question in questions]
    several.append(("gsm-ar", questions[0], {"max_new_tokens": 24, "decoder": "speculative", "draft": "gsm-student"}))

    async def program(service: Service) -> None:
        handles = [await service.submit(question, model=name, **settings) for name, question, settings in several]
        for handle, (name, question, settings) in zip(handles, several, strict=True):
            output = await handle.output()
            assert output.text == lms[name].generate(question, engine="off", **settings).text
        assert {group.model for group in service.statistics().groups} == set(lms)

    run_in(lambda: Service(lms, num_slots=2), program)


# Giving up


@pytest.mark.parametrize("name", ["block", "diffusion", "speculative"])
@pytest.mark.parametrize("stage", ["at once", "queued", "begun", "midway", "completed", "twice"])
def test_a_request_is_cancelled_at_every_stage(name: str, stage: str) -> None:
    lm = model(name)
    shared = DECODERS[name][0]
    (prompt, settings), *others = asked(name, 3)
    settings = {**settings, **LONG} if name != "diffusion" else {**settings, "max_new_tokens": 40}
    expected, rest = alone(lm, [(prompt, settings)])[0], alone(lm, others)

    async def program(service: Service) -> None:
        blocker = None
        if stage == "queued":
            blocker = await service.submit("a", **shared, **(LONG if name != "diffusion" else {"max_new_tokens": 60}))
        handle = await service.submit(prompt, **settings)
        later = [await service.submit(*[each], **options) for each, options in others]
        if stage in ("begun", "midway", "twice"):
            for _ in range(1 if stage == "begun" else 3):
                await anext(handle)
        if stage == "completed":
            same(await handle.output(), expected)
        handle.cancel()
        if stage == "twice":
            handle.cancel()
        output = await handle.output()
        if stage == "completed":
            same(output, expected)
        elif output.finish_reason == "cancelled":  # or it was faster
            assert output.token_ids == expected.token_ids[: output.num_tokens]
            assert output.num_tokens < len(expected.token_ids)
        if stage in ("at once", "queued"):
            assert output.num_forwards <= expected.num_forwards
        if blocker is not None:
            blocker.cancel()
        for one, right in zip(later, rest, strict=True):
            same(await one.output(), right)
        await settled(service)
        nothing_is_left(service)

    run_in(lambda: Service(lm, num_slots=1), program)


def test_two_hundred_requests_of_mixed_length_a_third_cancelled_midway() -> None:
    """All others get what they get alone, and no slot, queue place or memory is lost."""
    lms = {name: model(name) for name in ("block", "autoregressive", "diffusion", "jacobi")}
    several = [(name, *one) for name in lms for one in 5 * asked(name, 10)]
    chance = random.Random(0)
    chance.shuffle(several)
    cancelled = set(chance.sample(range(200), 60))
    expected: dict[Any, Any] = {}
    for i, (name, prompt, settings) in enumerate(several):
        key = (name, prompt, tuple(sorted(settings.items())))
        if i not in cancelled and key not in expected:
            expected[key] = lms[name].generate(prompt, **settings)

    async def client(service: Service, i: int) -> None:
        name, prompt, settings = several[i]
        await asyncio.sleep(i * 0.002)
        if i in cancelled:
            async with await service.submit(prompt, model=name, **settings) as handle:
                for _ in range(i % 4):
                    await anext(handle, None)
            assert (await handle.output()).finish_reason in ("cancelled", "stop", "length")
            return
        handle = await service.submit(prompt, model=name, **settings)
        if i % 2:
            await read(handle)
        same(await handle.output(), expected[name, prompt, tuple(sorted(settings.items()))])

    async def program(service: Service) -> None:
        await asyncio.gather(*(client(service, i) for i in range(200)))
        await settled(service)
        nothing_is_left(service)
        now = service.statistics()
        assert now.requests["submitted"] == 200
        assert now.requests["completed"] >= 140
        assert now.cache_bytes <= now.memory_bytes

    run_in(lambda: Service(lms, num_slots=4), program, seconds=120)


@pytest.mark.parametrize("rounds_of_the_event_loop", [0, 1, 3])
def test_a_client_that_is_gone_while_it_submits_leaves_nothing(rounds_of_the_event_loop: int) -> None:
    async def program(service: Service) -> None:
        task = asyncio.create_task(service.submit("ab", max_new_tokens=200, early_stop=False))
        for _ in range(rounds_of_the_event_loop):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await service.drain(5)
        await settled(service)
        nothing_is_left(service)

    run_in(lambda: Service(model("autoregressive")), program)


@pytest.mark.parametrize("how", ["task", "garbage"])
def test_a_client_that_is_gone_frees_its_slot(how: str) -> None:
    lm = model("autoregressive")

    async def program(service: Service) -> None:
        async def client() -> None:
            async for _ in await service.submit("ab", max_new_tokens=200, early_stop=False):
                began.set()

        began = asyncio.Event()
        if how == "task":
            task = asyncio.create_task(client())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
        else:
            handle = await service.submit("ab", max_new_tokens=200, early_stop=False)
            await anext(handle)
            del handle
        gc.collect()
        assert await service.drain(5)
        nothing_is_left(service)
        assert service.statistics().requests["cancelled"] == 1

    run_in(lambda: Service(lm), program)


@pytest.mark.parametrize("stage", ["queued", "running"])
def test_a_request_over_its_time_ends_with_what_is_final_and_frees_its_slot(stage: str) -> None:
    lm = model("autoregressive")
    expected = lm.generate("ab", max_new_tokens=200, early_stop=False)

    async def program(service: Service) -> None:
        blocker = await service.submit("a", max_new_tokens=200, early_stop=False) if stage == "queued" else None
        handle = await service.submit("ab", max_new_tokens=200, early_stop=False, time_limit_s=0.05)
        with pytest.raises(TimeLimitError, match=r"was not answered within its 0\.05 seconds") as late:
            await handle.output()
        with pytest.raises(TimeLimitError):
            await read(handle)
        partial = late.value.output
        assert partial.finish_reason == "cancelled"
        assert partial.token_ids == expected.token_ids[: partial.num_tokens]
        if blocker is not None:
            assert partial.num_tokens == 0
            blocker.cancel()
        assert await service.drain(5)
        nothing_is_left(service)
        assert service.statistics().requests["timed_out"] == 1

    with mock.patch.object(Network, "score", autospec=True, side_effect=slowly(0.005)):
        run_in(lambda: Service(lm, num_slots=1), program)


def slowly(seconds: float) -> Any:
    score = Network.score

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return score(*arguments, **options)

    return slow


# Limits


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    lm = model("autoregressive")

    async def program(service: Service) -> None:
        first = await service.submit("a", max_new_tokens=100, early_stop=False)
        await anext(first)
        waiting = [await service.submit("ab", max_new_tokens=4) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting, as many as may; try again in about") as full:
            await service.submit("ab")
        assert full.value.retry_after_s >= 1
        assert service.statistics().queued == 2
        first.cancel()
        for handle in waiting:
            await handle.output()
        await (await service.submit("ab", max_new_tokens=4)).output()
        assert service.statistics().requests["refused"] == 1

    run_in(lambda: Service(lm, num_slots=1, max_queued=2), program)


def test_a_request_that_could_never_fit_is_refused_with_what_would() -> None:
    lm = model("autoregressive")

    async def program(service: Service) -> None:
        with pytest.raises(TooLargeError, match=r"takes up 199 positions .* hold (\d+); shorten the prompt") as refused:
            await service.submit([5] * 100, max_new_tokens=99)
        holds = int(str(refused.value).split(" hold ")[1].split(";")[0])
        assert 64 <= holds < 199
        fits = await service.submit([5] * 20, max_new_tokens=holds - 20)
        assert len((await fits.output()).canvas_ids_G) == holds - 20
        with pytest.raises(TooLargeError):
            await service.submit([5] * 20, max_new_tokens=holds - 19)

    run_in(lambda: Service(lm, memory_bytes=90_000), program)


def test_with_memory_for_one_loop_at_a_time_groups_wait_for_each_other_in_turn() -> None:
    lms = {name: model(name) for name in ("block", "autoregressive")}
    pairs = zip(asked("block", 6), asked("autoregressive", 6), strict=True)
    several = [(name, *one) for pair in pairs for name, one in zip(lms, pair, strict=True)]
    expected = [lms[name].generate(prompt, **settings) for name, prompt, settings in several]

    async def program(service: Service) -> None:
        handles = [await service.submit(prompt, model=name, **settings) for name, prompt, settings in several]
        for handle, one in zip(handles, expected, strict=True):
            same(await handle.output(), one)
            now = service.statistics()
            assert now.cache_bytes <= now.memory_bytes
        nothing_is_left(service)

    run_in(lambda: Service(lms, num_slots=4, memory_bytes=200_000), program)


def test_settings_and_prompts_that_cannot_be_are_refused_at_once() -> None:
    lm = model("block")

    async def program(service: Service) -> None:
        for prompt, settings, sentence in [
            ("", {}, "the prompt is empty"),
            ("ab", {"treshold": 0.5}, "unknown setting 'treshold'; did you mean 'threshold'"),
            ("ab", {"max_new_tokens": 500}, "exceed the 256 positions"),
            ("ab", {"decoder": "jacobi"}, "the role block_causal"),
            ("ab", {"model": "other"}, "unknown model 'other'"),
            ("ab", {"time_limit_s": 0}, "time_limit_s must be above 0"),
            ("ab", {"model": ["block"]}, "model must be text"),
            ("ab", {"canvas": 3}, "canvas must be list of integer"),
            ("ab", {"canvas": [1.5]}, "every value of canvas must be an integer"),
            ([5, 900], {}, "has embeddings for 64 tokens"),
            (3, {}, "the prompt must be text or a list of messages"),
        ]:
            with pytest.raises(FewstepError, match=sentence):
                await service.submit(prompt, **{"max_new_tokens": 9, **settings})
        assert service.statistics().requests == {"refused": 11}
        assert await service.drain(1)

    run_in(lambda: Service(lm), program)
    with pytest.raises(FewstepError, match="unknown limit 'num_slot' of a service; did you mean 'num_slots'"):
        Service(lm, num_slot=3)
    with pytest.raises(FewstepError, match="num_slots must be at least 1"):
        Service(lm, num_slots=0)
    odd: list[Any] = [{}, None, 3, "gsm-student", [lm], {"a": 3}, {3: lm}, lm.network]
    for models in odd:
        with pytest.raises(FewstepError, match="a service needs a model"):
            Service(models)


# Sharing


def test_turns_of_a_conversation_reuse_what_is_cached_and_long_prompts_come_in_pieces() -> None:
    lm = model("autoregressive")
    messages = [{"role": "user", "content": "how many of them are left in the box"}]

    async def program(service: Service) -> None:
        for _ in range(3):
            handle = await service.submit(messages, max_new_tokens=6)
            output = await handle.output()
            same(output, lm.generate(messages, max_new_tokens=6))
            messages.extend(
                [{"role": "assistant", "content": output.text}, {"role": "user", "content": "and how many not?"}]
            )
        now = service.statistics()
        assert now.prompt_tokens == now.prefilled + now.reused
        assert now.reused > 2 * 36
        assert now.passes >= 3 * 6

    run_in(lambda: Service(lm, num_slots=2, prefill_rows=16), program)


def test_strictly_answers_in_bfloat16_are_the_same_in_any_company() -> None:
    lm, several = model("shifted block"), asked("shifted block", 7)
    lm.network.module.to(torch.bfloat16)

    async def program(service: Service) -> None:
        expected = [await (await service.submit(prompt, **settings)).output() for prompt, settings in several]
        handles = [await service.submit(prompt, **settings) for prompt, settings in several]
        for handle, one in zip(handles, expected, strict=True):
            output = await handle.output()
            same(output, one)
            assert torch.equal(output.confidence_G, one.confidence_G)
        assert service.statistics().reused == 0

    run_in(lambda: Service(lm, num_slots=3, strict=True), program)


def test_the_strict_refuse_what_depends_on_time() -> None:
    lm = model("self-speculative")

    async def program(service: Service) -> None:
        with pytest.raises(FewstepError, match="set the cycle to two-pass or fused"):
            await service.submit("ab", max_new_tokens=5, cycle="auto", window=4)

    run_in(lambda: Service(lm, strict=True), program)


# Ends and errors


def test_draining_finishes_what_is_there_and_refuses_the_rest() -> None:
    lm = model("autoregressive")
    expected = lm.generate("ab", max_new_tokens=30)

    async def program(service: Service) -> None:
        handles = [await service.submit("ab", max_new_tokens=30) for _ in range(3)]
        drained = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError, match="is being stopped"):
            await service.submit("ab")
        assert await drained
        for handle in handles:
            assert handle.done
            same(await handle.output(), expected)
        await service.stop()
        await service.stop()
        with pytest.raises(StoppingError):
            await service.submit("ab")

    run_in(lambda: Service(lm, num_slots=1), program)


def test_stopping_cancels_what_is_there_and_ends_the_thread() -> None:
    lm = model("autoregressive")

    async def program(service: Service) -> None:
        handles = [await service.submit("ab", max_new_tokens=200, early_stop=False) for _ in range(3)]
        await anext(handles[0])
        assert not await service.drain(0.01)
        await service.stop()
        assert {(await handle.output()).finish_reason for handle in handles} == {"cancelled"}
        assert not service._worker._thread.is_alive()

    with mock.patch.object(Network, "score", autospec=True, side_effect=slowly(0.005)):
        run_in(lambda: Service(lm, num_slots=1), program)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("shapes do not match\nand more"), r"failed \(RuntimeError: shapes do not match\); try again"),
        (torch.OutOfMemoryError("out of memory"), r"from now on 2 requests share a pass; try again"),
    ],
)
def test_an_error_inside_a_pass_fails_its_requests_and_the_service_goes_on(error: Exception, sentence: str) -> None:
    lms = {name: model(name) for name in ("block", "autoregressive")}
    several = asked("block", 4)
    expected, other = alone(lms["block"], several), lms["autoregressive"].generate("ab", max_new_tokens=30)
    score, failing = Network.score, [True]

    def fails_once(self: Network, *arguments: Any, **options: Any) -> Any:
        if self.module is lms["block"].network.module and failing and failing.pop():
            raise error
        return score(self, *arguments, **options)

    async def program(service: Service) -> None:
        untouched = await service.submit("ab", model="autoregressive", max_new_tokens=30)
        handles = [await service.submit(prompt, model="block", **settings) for prompt, settings in several]
        failed = 0
        for handle, one in zip(handles, expected, strict=True):
            await handle._mail.end()
            if handle._mail.output is not None:
                same(handle._mail.output, one)  # it came after the pass
                continue
            failed += 1
            with pytest.raises(PassFailedError, match=sentence) as failure:
                await handle.output()
            assert failure.value.__cause__ is error
        assert failed >= 1
        same(await untouched.output(), other)
        for (prompt, settings), one in zip(several, expected, strict=True):
            same(await (await service.submit(prompt, model="block", **settings)).output(), one)
        nothing_is_left(service)
        assert service.statistics().requests["failed"] == failed

    with mock.patch.object(Network, "score", autospec=True, side_effect=fails_once):
        run_in(lambda: Service(lms, num_slots=4), program)


@pytest.mark.parametrize("prompt", [[10**12], [-1, 5], [2**70], b"abc", 5])
def test_a_prompt_that_is_none_is_refused_in_a_sentence(prompt: Any) -> None:
    async def program(service: Service) -> None:
        with pytest.raises(FewstepError, match=r"none for the id|the prompt must be text"):
            await service.submit(prompt, max_new_tokens=4)

    run_in(lambda: Service(model("block")), program)


def test_a_tokenizer_that_fails_ends_its_own_request_alone() -> None:
    lm, other = model("block"), model("autoregressive")

    async def program(service: Service) -> None:
        with mock.patch.object(type(lm.answer_text()), "add", side_effect=RuntimeError("no such token")):
            broken = await service.submit("what is 2+2?", model="block", stop="never", max_new_tokens=12)
            whole = await service.submit("what is 2+2?", model="other", max_new_tokens=12)
            assert (await whole.output()).num_tokens > 0
            with pytest.raises(PassFailedError, match="could not be turned into text"):
                await broken.output()
        nothing_is_left(service)

    run_in(lambda: Service({"block": lm, "other": other}), program)


def test_a_policy_that_cannot_be_compared_fails_its_own_request_alone() -> None:
    def rule(confidence: Any, width: Any = None) -> Any:
        return confidence >= 0.5

    async def program(service: Service) -> None:
        first = await service.submit("what is 2+2?", policy=rule, width=torch.ones(2), max_new_tokens=12)
        with pytest.raises(Exception, match="Boolean value of Tensor"):
            await service.submit("what is 2+2?", policy=rule, width=torch.ones(2), max_new_tokens=12)
        await first.output()
        await (await service.submit("what is 2+2?", max_new_tokens=12)).output()

    run_in(lambda: Service(model("block")), program)


def test_a_loop_for_which_the_device_has_no_memory_gets_fewer_slots() -> None:
    lm, several, made = model("block"), asked("block", 4), []
    expected, begin = alone(lm, several), Loop.__init__

    def too_many(self: Loop, *arguments: Any, num_slots: int, **options: Any) -> None:
        made.append(num_slots)
        if num_slots > 2:
            raise torch.OutOfMemoryError("no memory")
        begin(self, *arguments, num_slots=num_slots, **options)

    async def program(service: Service) -> None:
        handles = [await service.submit(prompt, **settings) for prompt, settings in several]
        for handle, one in zip(handles, expected, strict=True):
            same(await handle.output(), one)
        assert made == [8, 4, 2]

    with mock.patch.object(Loop, "__init__", too_many):
        run_in(lambda: Service(lm, num_slots=8), program)


def test_a_slow_reader_stalls_nobody_and_gets_few_updates() -> None:
    lm = model("autoregressive")

    async def program(service: Service) -> None:
        slow = await service.submit("ab", max_new_tokens=100, early_stop=False)
        first = await anext(slow)
        others = [await service.submit("what is 2+2?", max_new_tokens=20) for _ in range(4)]
        for handle in others:
            await handle.output()
        await slow._mail.end()  # it has not read meanwhile
        rest = await read(slow)
        assert len(rest) == 1
        assert sum(len(update.events) for update in (first, *rest)) == (await slow.output()).num_tokens
        assert first.delta + rest[0].delta == (await slow.output()).text

    run_in(lambda: Service(lm), program)


def test_an_idle_service_sleeps() -> None:
    lm = model("autoregressive")

    async def program(service: Service) -> None:
        await (await service.submit("ab", max_new_tokens=4)).output()
        await asyncio.sleep(0.05)
        with mock.patch.object(service._worker._scheduler, "round", side_effect=AssertionError("a round")):
            before = time.process_time()
            await asyncio.sleep(0.3)
            assert time.process_time() - before < 0.1

    run_in(lambda: Service(lm), program)


def test_statistics_count_what_was_done() -> None:
    lm, several = model("block"), asked("block", 5)
    expected = alone(lm, several)

    async def program(service: Service) -> None:
        handles = [await service.submit(prompt, **settings) for prompt, settings in several]
        for handle in handles:
            await handle.output()
        now = service.statistics()
        assert now.requests == {"submitted": 5, "completed": 5}
        assert now.tokens == sum(output.num_tokens for output in expected)
        assert now.prompt_tokens == now.prefilled + now.reused == sum(len(lm.encode(prompt)) for prompt, _ in several)
        assert max(output.num_forwards for output in expected) <= now.passes
        assert sum(now.accepted.values()) == sum(output.num_forwards for output in expected)
        for summary in (now.queue_s, now.first_token_s, now.request_s):
            assert summary.count == summary.buckets[float("inf")] == 5
            assert 0 < summary.p50_s <= summary.p90_s <= summary.p99_s
        assert now.tokens_per_second > 0
        (group,) = now.groups
        assert (group.decoder, group.slots, group.running) == ("block", 8, 0)
        assert 0 < group.cache_bytes == now.cache_bytes < now.memory_bytes

    run_in(lambda: Service(lm), program)


def test_a_service_belongs_to_one_event_loop() -> None:
    service = Service(model("autoregressive"))

    async def ask() -> Handle:
        return await service.submit("ab", max_new_tokens=2)

    asyncio.run(ask())  # left behind with its loop closed
    with pytest.raises(FewstepError, match="belongs to the event loop in which it began"):
        asyncio.run(ask())
    asyncio.run(service.stop())
    assert service._worker.ended


def test_another_event_loop_is_told_so_instead_of_waiting_for_ever() -> None:
    async def program(service: Service) -> None:
        handle = await service.submit("ab", max_new_tokens=200, early_stop=False)
        released = threading.Event()
        service._worker.tell(lambda scheduler: [] if released.wait() else None)  # the request stays open meanwhile
        for wrong in (service.stop, service.drain, handle.output):

            def elsewhere(wrong: Any = wrong) -> None:
                async def attempt() -> None:
                    await wrong()

                asyncio.run(asyncio.wait_for(attempt(), 5))

            with pytest.raises(FewstepError, match="belongs to the event loop"):
                await asyncio.to_thread(elsewhere)
        released.set()
        assert (await handle.output()).finish_reason != "cancelled"
        await service.stop()
        await asyncio.to_thread(lambda: asyncio.run(service.stop()))  # nothing happens the second time

    run_in(lambda: Service(model("autoregressive")), program)


def test_a_policy_that_fails_by_its_settings_fails_its_own_request_alone() -> None:
    def rule(confidence: Any, column: float = 0.0) -> Any:
        return confidence >= confidence.gather(1, column.long())  # type: ignore[attr-defined]

    def reading(confidence: Any, most: float = 1.0) -> Any:
        return confidence >= confidence.topk(int(most)).values[:, -1:]  # of two requests there are two numbers

    async def program(service: Service) -> None:
        whole = await service.submit("what is 2+2?", policy=rule, column=1, max_new_tokens=40, early_stop=False)
        with pytest.raises(FewstepError, match=r"the policy .* fails with these settings \(\w+: .*out of bounds"):
            await service.submit("what is 2+2?", policy=rule, column=99, max_new_tokens=12)
        with pytest.raises(FewstepError, match=r"the policy .* fails with these settings"):
            await service.submit("what is 2+2?", policy=reading, most=3, max_new_tokens=12)
        assert (await whole.output()).num_tokens > 0
        assert service.statistics().requests.get("failed", 0) == 0
        nothing_is_left(service)

    run_in(lambda: Service(model("block")), program)


def test_a_model_without_a_decoder_cannot_be_served() -> None:
    lm = LanguageModel(network(), mock.Mock())

    async def program(service: Service) -> None:
        with pytest.raises(FewstepError, match="answers without a decoder"):
            await service.submit(PROMPTS[0])

    run_in(lambda: Service(lm), program)
