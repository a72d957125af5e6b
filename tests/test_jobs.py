"""Jobs that are shared and resumed: each is done once, and results of other weights or settings are never reused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.errors import FewstepError
from fewstep.measure import jobs as package
from fewstep.measure.jobs import Job, result_path, results, spread, weights_of, work
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network

MADE_BY = {"weights": "a"}


def job(name: str, run: Callable[[], Any] = dict, *needs: str, **settings: Any) -> Job:
    return Job(name=name, made_by={**MADE_BY, **settings}, run=run, needs=needs)


def failing() -> dict[str, Any]:
    raise RuntimeError("out of luck")


def test_a_failing_job_is_reported_and_the_others_are_done_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str, *needs: str) -> Job:
        return job(name, lambda: {"number": len(calls), "name": calls.append(name)}, *needs)

    listed = [counted("late", "early"), job("bad", failing), counted("orphan", "bad"), counted("early")]
    work(listed, tmp_path)
    work(listed, tmp_path)
    assert calls == ["early", "late"]
    assert sorted(results(listed, tmp_path)) == ["early", "late"]
    assert "out of luck" in (tmp_path / "bad.failed").read_text()


def test_what_needs_a_failed_job_by_way_of_others_is_not_waited_for(tmp_path: Path) -> None:
    listed = [job("c", dict, "b"), job("b", dict, "a"), job("a", failing), job("d")]
    found = spread(listed, tmp_path)
    assert found is not None
    assert sorted(found) == ["d"]


@pytest.mark.parametrize(
    ("listed", "sentence"),
    [
        ([job("b", dict, "a"), job("c", dict, "x")], r"^the job b needs a, and there is no job of that name; add it$"),
        (
            [job("a", dict, "b"), job("b", dict, "c"), job("c", dict, "b")],
            r"^the job b needs itself \(b needs c needs b",
        ),
        ([job("a", dict, "a")], r"^the job a needs itself \(a needs a\); take one need out$"),
    ],
)
def test_needs_that_nothing_can_meet_are_refused_before_any_job_is_done(
    tmp_path: Path, listed: list[Job], sentence: str
) -> None:
    for do in (work, spread):
        with pytest.raises(FewstepError, match=sentence):
            do([job("first"), *listed], tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_job_is_begun_after_the_deadline_and_a_failed_one_is_tried_again(tmp_path: Path) -> None:
    good = [job("bad", lambda: {"now": "good"})]
    work(good, tmp_path, deadline_s=0)
    assert not results(good, tmp_path)
    (tmp_path / "bad.failed").write_text("an earlier error")
    found = spread(good, tmp_path)
    assert found is not None
    assert found["bad"]["now"] == "good"
    assert found["bad"]["job_seconds"] >= 0


def test_a_result_of_other_settings_is_refused_and_stays_until_it_is_removed(tmp_path: Path) -> None:
    def with_steps(steps: int) -> Any:
        return spread([job("student", lambda: {"steps": steps}, steps=steps)], tmp_path)

    assert with_steps(350)["student"]["steps"] == 350
    with pytest.raises(FewstepError, match=r"student\.json keeps a result .* \(steps is 350 there and 700 here\)"):
        with_steps(700)
    assert with_steps(350)["student"]["steps"] == 350
    result_path(tmp_path, "student").unlink()
    assert with_steps(700)["student"]["steps"] == 700


def test_changed_weights_in_the_same_folder_are_noticed(tmp_path: Path) -> None:
    save_network(tiny_network("autoregressive"), tmp_path / "model")

    def answered(seed: int) -> Any:
        tiny_network("autoregressive", seed=seed).module.save_pretrained(tmp_path / "model")
        weights = weights_of({"ar": tmp_path / "model"})
        return spread([Job(name="one", made_by={"weights": weights}, run=dict)], tmp_path / "answers")

    assert answered(0) == answered(0)
    with pytest.raises(FewstepError, match=r"\(weights\.ar is \w+ there and \w+ here\)"):
        answered(1)


def test_no_job_goes_without_the_hash_of_its_weights() -> None:
    with pytest.raises(ValueError, match=r"includes the hash of the weights, got \['steps'\]"):
        Job(name="one", made_by={"steps": 4}, run=dict)


def test_a_result_follows_from_what_it_needed(tmp_path: Path) -> None:
    def pair(said: str) -> list[Job]:
        return [job("baseline", lambda: {"said": said}), job("follower", dict, "baseline")]

    spread(pair("yes"), tmp_path)
    for path in tmp_path.glob("baseline.json"):
        path.unlink()
    assert set(spread(pair("yes"), tmp_path) or ()) == {"baseline", "follower"}  # made again, and the same
    result_path(tmp_path, "baseline").unlink()
    with pytest.raises(FewstepError, match=r"follower\.json keeps .* \(needs\.baseline is \w+ there"):
        spread(pair("no"), tmp_path)


def test_a_file_that_is_no_result_is_not_touched(tmp_path: Path) -> None:
    result_path(tmp_path, "one").write_text("[]")
    with pytest.raises(FewstepError, match=r"one\.json holds no kept result; move it away"):
        spread([job("one")], tmp_path)
    assert result_path(tmp_path, "one").read_text() == "[]"


def test_an_interrupt_says_what_is_kept(tmp_path: Path) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"interrupted; results kept in .*: 1; repeat the command to go on"):
        spread([job("one"), job("two", interrupted)], tmp_path)


def test_a_job_that_another_process_holds_is_left_to_it(tmp_path: Path) -> None:
    with package._claimed(tmp_path / "lock") as mine, package._claimed(tmp_path / "lock") as too:
        assert mine
        assert not too


WORKER = """
import json, os, sys
made_by = {"weights": "a"}
result = {"gpu": os.environ["CUDA_VISIBLE_DEVICES"]}
with open(f"{sys.argv[1]}/{os.environ['FEWSTEP_JOBS_WORKER']}.json", "w") as file:
    json.dump({"made_by": made_by, "result": result}, file)
"""


def test_several_gpus_get_a_process_each_and_the_command_itself_gathers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(package, "visible_gpus", lambda: ["4", "7"])
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "worker.py"), str(tmp_path)])
    assert spread([job("0"), job("1")], tmp_path) == {"0": {"gpu": "4"}, "1": {"gpu": "7"}}


def test_a_worker_does_jobs_and_gathers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_JOBS_WORKER", "0")
    monkeypatch.setenv("FEWSTEP_JOBS_DEADLINE", "inf")
    assert spread([job("one")], tmp_path) is None
    assert set(results([job("one")], tmp_path)) == {"one"}
