"""`fewstep serve` as a process: its start, its stop, its extra; and load that is put on a server."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.command import Run, fewstep_process
from helpers.networks import network
from helpers.serving import held, running

import fewstep
from fewstep.cli import extras
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.measure.serving import Load, streamed_here
from fewstep.models.load import save_network
from fewstep.serve.catalogue import Entry, Served, load_all
from fewstep.serve.server import Server

MESSAGES = [{"role": "user", "content": "what is 2+2?"}]
LONG = {"messages": MESSAGES, "stream": True, "max_tokens": 200, "early_stop": False, "threshold": 1.0}
"""Asks for 200 passes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "student"
    save_network(network("block_causal"), path)
    return path


class Process:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        command = ["serve", f"{folder},name=s", "--port", str(port), *options]
        self.process = fewstep_process(*command)
        assert self.process.stderr is not None
        self.lines: list[dict[str, Any]] = []
        listening = json.loads(self.process.stderr.readline())
        assert listening["event"] == "listening", listening
        self.url = listening["url"]
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=self._read, daemon=True).start()
        ends = time.monotonic() + 20
        while not self._answers():
            assert time.monotonic() < ends
            time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))

    def _answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health").status_code == 200
        except httpx2.ConnectError:
            return False

    def wait_for(self, event: str) -> None:
        """Until the log tells of it."""
        ends = time.monotonic() + 20
        while not any(line["event"] == event for line in self.lines):
            assert time.monotonic() < ends, self.lines
            time.sleep(0.01)

    def stream(self) -> Any:
        return httpx2.stream("POST", f"{self.url}/v1/chat/completions", json=LONG, timeout=60)


def test_a_killed_server_can_be_started_again_at_once_and_sigterm_lets_running_answers_finish(folder: Path) -> None:
    killed = Process(folder)
    with killed.stream() as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(killed.process.pid, signal.SIGKILL)
        with pytest.raises(httpx2.HTTPError):
            list(lines)
    killed.process.wait(10)
    again = Process(folder, port=killed.port)
    try:
        _stops_in_peace(again)
    finally:
        again.process.kill()


def _stops_in_peace(server: Process) -> None:
    other_blocks = {"messages": MESSAGES, "max_tokens": 4, "block_size": 8}
    assert httpx2.post(f"{server.url}/v1/chat/completions", json=other_blocks, timeout=60).status_code == 200
    with server.stream() as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(10) == 0
    warning, *events = [line["event"] for line in server.lines if line["event"] != "request"]
    assert "trained in blocks of 4" in warning
    assert events == ["draining", "stopped"]


def test_a_server_that_drains_refuses_new_requests_and_finishes_the_running_one() -> None:
    passes = threading.Semaphore(1)  # the answer begins, and cannot end before the test wants it to
    with (
        running({"held": held(network("block_causal"), passes)}) as made,
        httpx2.stream("POST", f"{made.url}/v1/chat/completions", json=LONG, timeout=60) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        made.server.draining = True  # as a signal makes it
        refused = made.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["error"]["code"] == "stopping"
        assert made.get("/ready").status_code == 503
        assert made.get("/health").status_code == 200
        passes.release(1000)
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_taken_port_a_wrong_host_and_two_equal_names_are_told(run: Run, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in run("serve", folder, "--port", port).sentence()
    assert "no address of this machine" in run("serve", folder, "--host", "not.a.host.invalid").sentence()
    assert "another name" in run("serve", folder, folder, "--port", 0).sentence()
    assert "--port" in run("serve", folder, "--port", 70000).sentence()
    assert "no setting" in run("serve", f"{folder},tresholt=1").sentence()


def test_without_the_extra_one_sentence_names_it(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS["serve"], "fastapi", "fastapi_that_is_not_there")
    assert "pip install 'fewstep[serve]'" in run("serve", folder).sentence()


# Load


def test_load_is_measured_and_answers_under_it_are_those_alone(run: Run, tmp_path: Path) -> None:
    report, questions = tmp_path / "report.json", tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"what is {one}+{one}?"}) + "\n" for one in range(3)))
    with running({"block": LanguageModel(network("block_causal"))}, max_concurrent=4) as made:
        options = ["--max-tokens", 16, "--input", questions, "--check", "--json", report, "--cut", 0.3]
        model = ["--model", "block,threshold=0.4"]
        result = run("bench-serve", made.url, *model, *options, "--concurrency", "1,4", "--requests", 12)
        assert result.code == 0, result.err
        loads = json.loads(report.read_text())["loads"]
        assert [one["concurrency"] for one in loads] == [1, 4]
        for one in loads:
            assert one["completed"] + one["cut"] == one["n"] == 12
            assert one["cut"] > 0
            assert (one["different"], one["failed"], one["refused"]) == (0, 0, 0)
            assert 0 < one["first_text_ms"]["p50"] <= one["answer_ms"]["p50"] <= one["answer_ms"]["p99"]
            assert one["tokens_per_second"] > 0
        assert run("bench-serve", made.url, *model, *options, "--rate", "40", "--duration", 0.3).code == 0
        assert run("bench-serve", made.url + "/v1", *model, *options, "--concurrency", "1", "--requests", 1).code == 0
        told = run("bench-serve", made.url, "--model", "gone", *options).sentence()
        assert "status 404: no model 'gone' here" in told
        assert "{" not in told
        made.wait_until_idle()


def test_what_a_model_does_without_a_server_stands_beside_it() -> None:
    lm, prompts = LanguageModel(network("block_causal")), ["what is 1+1?", "what is 2+2?"]
    row = streamed_here(lm, prompts, max_new_tokens=16, threshold=0.4)
    outputs = [lm.generate(prompt, max_new_tokens=16, threshold=0.4) for prompt in prompts]
    num_tokens, num_forwards = (sum(getattr(one, name) for one in outputs) for name in ("num_tokens", "num_forwards"))
    assert row["tokens_per_forward"] == num_tokens / num_forwards
    assert row["tokens_per_second"] * row["wall_seconds"] == pytest.approx(num_tokens)
    assert 0 < row["first_text_ms"]["p50"] <= row["answer_ms"]["p99"]


def test_load_on_nothing_and_contradictions_are_told(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
    assert "did not answer" in run("bench-serve", f"http://127.0.0.1:{port}/v1").sentence()
    assert "not both" in run("bench-serve", "--rate", 1, "--concurrency", 1).sentence()
    assert "no address" in run("bench-serve", "localhost").sentence()
    assert "numbers" in run("bench-serve", "--concurrency", "1,x").sentence()
    with pytest.raises(FewstepError, match="either concurrency or rate"):
        Load(num_requests=1)


# What is served


def test_adapters_of_one_base_share_its_weights() -> None:
    for order in (("gsm-teacher", "gsm-student"), ("gsm-student", "gsm-teacher")):
        catalogue = load_all([Served(model=name, name=name) for name in order], fewstep.load)
        assert catalogue[None].name == order[0]
        teacher, student = (catalogue[name].lm.network for name in ("gsm-teacher", "gsm-student"))
        assert student.base is teacher
        assert teacher.name == "gsm-teacher"
    alone = load_all([Served(model="gsm-student", name="s")], fewstep.load)["s"]
    assert alone.lm.network.base is None
    assert alone.card()["fewstep"]["bundled"]
    assert not alone.card()["fewstep"]["multi_turn"]


def test_a_run_file_names_models_and_settings_that_options_override(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.serve import run as serving

    made: list[Server] = []
    monkeypatch.setattr(serving, "run_server", lambda server, _: made.append(server))
    monkeypatch.setenv("FEWSTEP_API_KEY", "from the environment")
    config = tmp_path / "serve.yaml"
    config.write_text(f"models: ['{folder},name=one,threshold=0.5', '{folder},name=two']\nport: 0\nmax_queued: 3\n")
    assert run("serve", "--config", config, "--max-queued", 4).code == 0
    assert list(made[0].catalogue.entries) == ["one", "two"]
    assert made[0].catalogue["one"].settings == {"threshold": 0.5}
    assert (made[0].settings.max_queued, made[0].settings.api_key) == (4, "from the environment")
    config.write_text("modles: [a]\n")
    assert "did you mean 'models'" in run("serve", "--config", config).sentence()


def test_settings_of_the_operator_hold_unless_a_request_sets_others() -> None:
    lm = LanguageModel(network("block_causal"))
    entry = Entry(name="s", lm=lm, settings={"threshold": 0.2, "max_new_tokens": 7}, created=1)
    with running({}, entries=[entry]) as made:
        for fields, expected in (({}, {"threshold": 0.2}), ({"threshold": 0.9}, {"threshold": 0.9})):
            answer = made.chat("what is 2+2?", **fields).json()
            alone = lm.generate("what is 2+2?", max_new_tokens=7, **expected)
            assert answer["choices"][0]["message"]["content"] == alone.text
            assert answer["usage"]["fewstep"]["num_forwards"] == alone.num_forwards
