"""`kill -9` at file-system events of every writing command: see `kill_events.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parent / "kill_events.py"


def killed(report: Path, *options: str) -> list[dict[str, Any]]:
    """The outcomes; the tool runs apart, as it forks."""
    done = subprocess.run(
        [sys.executable, TOOL, "--json", report, *options], capture_output=True, text=True, timeout=7200
    )
    assert report.exists(), done.stderr[-2000:]
    return json.loads(report.read_text())


def check(outcomes: list[dict[str, Any]]) -> None:
    assert {one["command"]: one["faults"] for one in outcomes if one["faults"]} == {}
    assert all(one["num_killed"] for one in outcomes)


def test_a_kill_at_some_events_of_every_writing_command_loses_nothing(tmp_path: Path) -> None:
    some = ("import --overwrite", "import --overwrite, in two renames", "generate", "eval", "collect", "train")
    check(killed(tmp_path / "report.json", "--per-command", "1", "--seed", "13", "--commands", *some))


@pytest.mark.fuzz
def test_a_kill_at_every_event_of_every_writing_command_loses_nothing(tmp_path: Path) -> None:
    outcomes = killed(tmp_path / "report.json")
    check(outcomes)
    assert sum(one["num_killed"] for one in outcomes) > 200
