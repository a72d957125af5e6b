"""Hostile options, run files, rows and folders, given to every command: see `hostile_inputs.py`.

`make test` draws some of the cases; `make fuzz` (FEWSTEP_FUZZ=all) runs each.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fewstep import json_files
from fewstep.errors import FewstepError
from fewstep.json_files import numbered_rows, read_text

TOOL = Path(__file__).parent / "hostile_inputs.py"
PER_KIND = 6


def test_every_hostile_input_is_taken_or_refused_in_one_sentence(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    everything = os.environ.get("FEWSTEP_FUZZ") == "all"
    some = ["--workers", "2"] if everything else ["--per-kind", str(PER_KIND), "--workers", "1"]
    # The tool runs apart, as it forks.
    done = subprocess.run([sys.executable, TOOL, "--json", report, *some], capture_output=True, text=True, timeout=7200)
    assert report.exists(), done.stderr[-2000:]
    found = json.loads(report.read_text())
    assert found["faults"] == [], done.stdout
    assert sum(found["counts"].values()) >= (5000 if everything else 5 * PER_KIND)


@pytest.mark.parametrize("read", [read_text, lambda path: list(numbered_rows(path))])
def test_a_pipe_without_a_writer_and_a_device_without_an_end_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read
) -> None:
    monkeypatch.setattr(json_files, "PATIENCE_S", 0.1)
    monkeypatch.setattr(json_files, "MOST_BYTES", 1 << 20)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FewstepError, match="pipe into which nothing is written"):
        read(tmp_path / "pipe")
    with pytest.raises(FewstepError, match="does not end within 1 MiB"):
        read(Path("/dev/zero"))


def test_rows_come_through_a_pipe_whose_writer_begins_later(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    rows = [{"n": n, "text": "x" * 1000} for n in range(200)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    writer = threading.Timer(0.2, lambda: pipe.write_text(text))
    writer.start()
    assert [row for _, row in numbered_rows(pipe)] == rows
    writer.join()
