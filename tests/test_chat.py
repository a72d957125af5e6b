"""`fewstep chat`: conversations through a pipe and in a real terminal, on tiny random networks."""

import io
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Result, Run
from helpers.files import read_lines

import fewstep
import fewstep.cli.chat
from fewstep.cli.conversation import Conversation, Turn
from fewstep.cli.forming import Forming
from fewstep.cli.lines import Interrupts, piped_lines
from fewstep.cli.terminal import printable
from fewstep.decode.requests import Event
from fewstep.engine.language_model import LanguageModel
from fewstep.models.load import save_network
from fewstep.models.tiny import tiny_network

Chat = Callable[..., tuple[Result, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of random networks: a block-causal one, a causal one that never ends an answer, one without template."""
    folder = tmp_path_factory.mktemp("models")
    networks = {
        "student": tiny_network("block_causal", head_scale=30.0, max_positions=1024),
        "endless": tiny_network("autoregressive", head_scale=30.0, max_positions=100_000),
        "embedding": tiny_network("embedding", head_scale=30.0),
        "plain": tiny_network("autoregressive", head_scale=30.0),
    }
    with torch.no_grad():
        networks["endless"].module.get_output_embeddings().weight[list(networks["endless"].stop_token_ids)] = 0.0
    networks["plain"].tokenizer.chat_template = None
    for name, network in networks.items():
        save_network(network, folder / name)
    return {name: str(folder / name) for name in networks}


@pytest.fixture
def chat(run: Run, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chat:
    """Hold a conversation of these lines; what was printed, and the report."""

    def hold(*lines: str, model: str = "student", options: tuple[str, ...] = ()) -> tuple[Result, Any]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        chosen = ("--model", models.get(model, model), "--max-new-tokens", "12", *options)
        result = run("chat", *chosen, "--json", report)
        return result, json.loads(report.read_text()) if report.exists() else None

    return hold


def asked(*turns: str) -> list[dict[str, str]]:
    """Questions and answers in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def test_a_model_is_told_the_turns_before_a_question(chat: Chat, models: dict[str, str]) -> None:
    result, report = chat("what is one?", "", "and two?")
    lm = fewstep.load(models["student"])
    first = lm.generate(asked("what is one?"), max_new_tokens=12)
    second = lm.generate(asked("what is one?", first.text, "and two?"), max_new_tokens=12)
    assert result.code == 0
    assert result.out == f"{first.text}\n{second.text}\n"
    assert [(turn["answer"], turn["num_tokens"], turn["num_forwards"]) for turn in report["turns"]] == [
        (one.text, one.num_tokens, one.num_forwards) for one in (first, second)
    ]
    assert report["num_tokens"] == first.num_tokens + second.num_tokens


@pytest.mark.parametrize("case", ["plain", "bundled", "told not to"])
def test_a_model_that_is_no_chat_model_answers_each_question_alone(
    chat: Chat, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(fewstep.cli.chat, "is_bundled", lambda _: case == "bundled")
    model, options = "plain" if case == "plain" else "student", ("--no-remember",) if case == "told not to" else ()
    result, _ = chat("what is one?", "and two?", model=model, options=options)
    lm = fewstep.load(models[model])
    alone = [lm.generate(question, max_new_tokens=12).text for question in ("what is one?", "and two?")]
    assert result.out == "".join(f"{text}\n" for text in alone)
    assert result.err.count("Each question is answered alone") == 1


@pytest.mark.parametrize("option", ["--remember", "--system=x"])
def test_a_model_without_template_cannot_be_told_more(chat: Chat, option: str) -> None:
    result, _ = chat("what?", model="plain", options=(option,))
    assert "no chat template" in result.sentence()


def test_a_system_message_comes_first_and_is_refused_by_a_template_without_one(
    chat: Chat, models: dict[str, str]
) -> None:
    result, _ = chat("what?", options=("--system", "be kind"))
    told = [{"role": "system", "content": "be kind"}, *asked("what?")]
    assert result.out == fewstep.load(models["student"]).generate(told, max_new_tokens=12).text + "\n"
    assert "Only the roles" in chat("what?", model="gsm-student", options=("--system", "x"))[0].sentence()


def test_bundled_models_are_known_by_their_names() -> None:
    assert fewstep.cli.chat.is_bundled("gsm-student")
    assert not fewstep.cli.chat.is_bundled("someone/some-model")


def test_settings_change_between_answers(chat: Chat, models: dict[str, str]) -> None:
    lines = (
        "/set max_new_tokens 4",
        "/set gen_length=5",
        "/set threshold = 0.3",
        "what?",
        "/unset max_new_tokens",
        "/set",
    )
    result, report = chat(*lines)
    expected = fewstep.load(models["student"]).generate(asked("what?"), max_new_tokens=5, threshold=0.3)
    assert result.code == 0
    assert result.out == expected.text + "\n"
    assert report["turns"][0]["settings"] == {"max_new_tokens": 5, "threshold": 0.3}
    assert "threshold is 0.3\n" in result.err
    assert "decoder is block (the model's own)\n" in result.err


def test_settings_that_need_each_other_are_changed_together(chat: Chat, models: dict[str, str]) -> None:
    result, report = chat(f"/set decoder=speculative draft={models['student']} window = 3", "what?", model="plain")
    assert result.code == 0, result.err
    assert report["turns"][0]["settings"] == {
        "max_new_tokens": 12,
        "decoder": "speculative",
        "draft": models["student"],
        "window": 3,
    }


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set threshold 3", "threshold is a probability"),
        ("/set threshold much", "threshold"),
        (
            "/set threshold [1",
            "threshold is not valid YAML: expected ',' or ']', but got '<stream end>' at line 1 column 3\n",
        ),
        ("/set threshold \udcff", "threshold is not valid YAML: special characters are not allowed\n"),
        ("/set treshold 0.5", "did you mean 'threshold'"),
        ("/set decoder blok", "did you mean 'block'"),
        ("/set window 4", "window"),
        ("/set threshold", "needs a value"),
        ("/set decoder jacobi", "has the role block_causal"),
        ("/set max_new_tokens 5000", "positions"),
        ("/set threshold=0.5 temperature=-1", "temperature must be at least 0"),
        ("/unset", "unknown setting"),
        ("/stat", "'/stats'"),
        ("/retry", "no question to ask again"),
        ("/save", "needs the name of a file"),
        ("/save nowhere.jsonl", "no answer to save"),
    ],
)
def test_what_is_refused_changes_nothing_and_fails_a_script(chat: Chat, line: str, told: str) -> None:
    refused, report = chat(line, "what?")
    plain, same = chat("what?")
    assert told in refused.err
    assert (refused.code, plain.code) == (2, 0)
    assert refused.out == plain.out
    assert report["turns"][0]["settings"] == same["turns"][0]["settings"]


def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(chat: Chat) -> None:
    result, report = chat("one?", "x" * 2000, "two?")
    assert "positions" in result.err
    assert [turn["question"] for turn in report["turns"]] == ["one?", "two?"]


def test_retry_asks_again_with_another_seed(chat: Chat, models: dict[str, str]) -> None:
    _, greedy = chat("what?", "/retry")
    assert len(greedy["turns"]) == 1
    assert greedy["num_answers"] == 2
    result, sampled = chat("/set temperature 5", "what?", "/retry", "/retry")
    assert sampled["turns"][0]["settings"]["seed"] == 2
    lm = fewstep.load(models["student"])
    texts = [lm.generate(asked("what?"), max_new_tokens=12, temperature=5.0, seed=seed).text for seed in range(3)]
    assert len(set(texts)) == 3
    assert result.out == "".join(f"{text}\n" for text in texts)


def test_a_conversation_is_saved_and_cleared(chat: Chat, tmp_path: Path, models: dict[str, str]) -> None:
    file, other = tmp_path / "saved.jsonl", tmp_path / "there.jsonl"
    other.write_text("mine\n")
    result, report = chat("one?", f"/save {file}", "two?", f"/save {file}", f"/save {other}", "/clear", "three?")
    texts = result.out.splitlines()
    assert read_lines(file) == [{"messages": asked("one?", texts[0], "two?", texts[1])}]
    assert other.read_text() == "mine\n"
    assert "there already" in result.err
    assert [turn["question"] for turn in report["turns"]] == ["three?"]
    assert texts[2] == fewstep.load(models["student"]).generate(asked("three?"), max_new_tokens=12).text
    chat("one?", "two?", f"/save {tmp_path}/alone.jsonl", options=("--no-remember",))
    assert [len(row["messages"]) for row in read_lines(tmp_path / "alone.jsonl")] == [2, 2]


def test_commands_tell_of_themselves_and_two_slashes_send_one(chat: Chat) -> None:
    result, report = chat("/stats", "//tmp is what?", "/stats", "/help", "one \\", "line", "/quit", "never")
    assert result.code == 0
    assert [turn["question"] for turn in report["turns"]] == ["/tmp is what?", "one \nline"]
    assert all(command.usage in result.err for command in fewstep.cli.chat.COMMANDS.values())
    assert "No question was answered yet." in result.err
    assert "per pass" in result.err


def test_turns_for_which_there_are_no_positions_are_left_out_from_the_oldest() -> None:
    lm = LanguageModel(tiny_network(max_positions=64))
    turns = [
        Turn(
            question=f"q{number}" * 4,
            answer="a" * 8,
            finish_reason="stop",
            num_prompt_tokens=1,
            num_tokens=1,
            num_forwards=1,
            seconds=0,
        )
        for number in range(3)
    ]
    conversation = Conversation(system=None, remembers=True, turns=turns)
    prompt, num_left_out = conversation.prompt(lm, "now?", num_new=20)
    assert num_left_out == 1
    assert [message["content"] for message in prompt] == ["q1" * 4, "a" * 8, "q2" * 4, "a" * 8, "now?"]  # type: ignore[index]
    assert conversation.prompt(lm, "now?", num_new=64) == (asked("now?"), 3)


def test_input_that_is_no_text_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(fewstep.errors.FewstepError, match="not UTF-8"):
        list(piped_lines())


# The answer while it forms


def test_settled_text_and_tokens_ahead_are_drawn_with_masks_between_them() -> None:
    lm = LanguageModel(tiny_network(block_size=4))
    forming = Forming(lm, block_size=4, max_new_tokens=7)
    ids = lm.network.tokenizer.convert_tokens_to_ids(["a", "b", "c"])

    def event(position: int, number: int, step: int) -> Event:
        return Event(position, ids[number], step, 1.0, "abc"[number])

    assert forming.add(event(0, 0, 1)) == "a"
    assert forming.add(event(5, 2, 1)) == ""
    assert forming.drawn().plain == "a░░░░c░"
    assert forming.add(event(1, 1, 2)) == "b"
    assert forming.drawn().plain == "ab░░░c░"
    assert (forming.num_tokens, forming.num_settled, forming.num_forwards) == (3, 2, 2)


def test_tokens_that_may_change_are_drawn_grey_as_the_last_pass_left_them() -> None:
    lm = LanguageModel(tiny_network("embedding"))
    forming = Forming(lm, block_size=1, max_new_tokens=8)
    for step, text in ((1, "axc"), (2, "ab")):
        for position, letter in enumerate(text):
            forming.add(Event(position, 10, step, 0.5, letter, final=False))
    assert forming.drawn().plain == "ab"
    assert {span.style for span in forming.drawn().spans} == {"bright_black"}
    assert (forming.num_tokens, forming.num_forwards) == (0, 2)


def test_a_model_in_embedding_space_answers(chat: Chat, models: dict[str, str]) -> None:
    result, report = chat("what?", "/set steps 2", "/set", "and now?", "/stats", model="embedding")
    lm = fewstep.load(models["embedding"])
    first = lm.generate(asked("what?"), max_new_tokens=12)
    assert result.code == 0
    assert report["turns"][0]["answer"] == first.text
    assert report["turns"][1]["num_forwards"] == 2
    assert "decoder is " in result.err


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tc\x07\x9b\u202e") == "a\\x1b[2Jb\n\tc\\x07\\x9b\\u202e"


# In a terminal


def test_a_second_ctrl_c_interrupts_at_once_and_sigterm_ends() -> None:
    with Interrupts() as interrupts:
        with interrupts.during_answer():
            signal.raise_signal(signal.SIGINT)
            assert interrupts.asked_to_stop
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one is an interrupt")
        assert interrupts.asked_to_stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        handler: Any = signal.getsignal(signal.SIGINT)
        with interrupts.during_answer(), pytest.raises(KeyboardInterrupt):
            handler(signal.SIGTERM, None)
        assert interrupts.terminated


class Terminal:
    """`fewstep chat` in a terminal of its own."""

    def __init__(self, *arguments: str, state: Path) -> None:
        self.seen = ""
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fewstep", "chat", *arguments]
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, command, {**environment, "XDG_STATE_HOME": str(state)})

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str, *, patience_s: float = 60.0) -> str:
        """Read until the text was seen; all that was seen since the last one was typed."""
        deadline_s = time.monotonic() + patience_s
        while text not in self.seen and time.monotonic() < deadline_s:
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._descriptor, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    break
        assert text in self.seen, self.seen
        return self.seen

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(models: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal("--model", models["endless"], "--max-new-tokens", "50000", state=tmp_path)
    yield opened
    try:
        os.kill(opened.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_a_conversation_in_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    """An answer of minutes is stopped, and the next question is asked by going back in the history."""
    terminal.wait_for(">>> ")
    terminal.type("how long?\n")
    terminal.wait_for("passes ·")
    terminal.type("\x03")
    assert "stopped" in terminal.wait_for(">>> ")
    terminal.type("/set max_new_tokens 5\n")
    terminal.wait_for(">>> ")
    terminal.type("\x1b[A\x1b[A\n")
    assert "how long?" in terminal.wait_for("5 tokens in 5 passes")
    terminal.wait_for(">>> ")
    terminal.type("half a quest")
    terminal.wait_for("quest")
    time.sleep(0.2)  # until readline waits for more: it loses a Ctrl-C that comes before
    terminal.type("\x03")
    assert "/quit ends the conversation" in terminal.wait_for(">>> ")
    terminal.type("/stats\n")
    assert "turns of the conversation: 2" in terminal.wait_for(">>> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    history = tmp_path / "fewstep" / "chat_history"
    assert history.read_text().splitlines() == ["how long?", "/set max_new_tokens 5", "how long?", "/stats"]
    assert history.stat().st_mode & 0o077 == 0
