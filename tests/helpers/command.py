"""The command line, run in this process or in another."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import fewstep.cli.main


@dataclass(frozen=True)
class Result:
    """Exit code, and what was written to standard output and to standard error."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """The error: exit code 2, and one line that names the program."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.err.startswith("fewstep: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err


Run = Callable[..., Result]
"""`fewstep ARGUMENTS` in this process; the fixture `run` in `conftest.py`."""


def run_fewstep(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        # Looked up at each call: a test may load the module anew.
        fewstep.cli.main.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = stopped.value.code
    return Result(int(code) if code else 0, captured.out, captured.err)


def fewstep_process(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fewstep", *arguments],
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
        # A shell starts what it runs in the background deaf to Ctrl-C, and this may be such a process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
