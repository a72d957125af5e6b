"""Closed, full and broken standard streams, and signals: what a command leaves behind, and how it ends."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fewstep.cli.generate import _read_prompt
from fewstep.cli.interruption import Termination, one_voice
from fewstep.errors import FewstepError


def shell(line: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in which `fewstep` is this one; the exit code is that of its first program."""
    return subprocess.run(
        ["bash", "-c", f'fewstep() {{ "{sys.executable}" -m fewstep "$@"; }}; {line}'],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize(
    "line",
    [
        "fewstep --version | true; exit ${PIPESTATUS[0]}",
        "fewstep --version >&-",
        "fewstep --help <&- >&- 2>&-",
        "fewstep --version 2>/dev/full",
        "fewstep --help | true; exit ${PIPESTATUS[0]}",
    ],
)
def test_a_closed_standard_output_is_no_error(line: str) -> None:
    done = shell(line)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("line", ["fewstep --help", "fewstep --version"])
def test_a_full_standard_output_is_one_sentence(line: str) -> None:
    done = shell(f"{line} >/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "fewstep: could not write to standard output: No space left on device; files that were asked for are written\n"
    )


def test_a_closed_standard_error_does_not_print_into_standard_output() -> None:
    done = shell("fewstep merge nothing --output x 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_character_that_the_encoding_lacks_is_shown_escaped() -> None:
    done = shell("fewstep --help", PYTHONIOENCODING="ascii", COLUMNS="80")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_a_closed_standard_input_is_no_prompt() -> None:
    done = shell("fewstep generate <&-")
    assert done.returncode == 2
    assert done.stderr == "fewstep: the prompt is empty; give some text\n"


@pytest.mark.parametrize("deaf", [False, True], ids=["", "deaf to Ctrl-C"])
def test_sigterm_does_what_ctrl_c_does(deaf: bool) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.default_int_handler)
    try:
        with Termination() as termination, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert termination.arrived
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_who_handles_ctrl_c_gets_the_first_sigterm_and_no_other() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with Termination():
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGTERM]


def test_outside_the_main_thread_nobody_listens() -> None:
    entered = []

    def enter() -> None:
        with Termination():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [signal.SIG_DFL]


def test_of_several_processes_only_the_first_speaks_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left, one_voice(patience_s=0):
            raise KeyboardInterrupt
        assert left.value.code == 130
        with pytest.raises(FewstepError, match="of its own"), one_voice(patience_s=0):
            raise FewstepError("of its own")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the launcher ends it while it waits
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(KeyboardInterrupt), one_voice(patience_s=0):
        raise KeyboardInterrupt


def test_a_prompt_is_the_same_however_its_lines_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("a\nb\n", "a\r\nb\r\n", "\ufeffa\r\nb\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text, newline=""))
        assert _read_prompt(None) == "a\nb"
