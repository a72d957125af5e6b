"""Settings of the whole suite, and the command line as a fixture."""

from functools import partial

import pytest
import torch
from helpers.command import Run, run_fewstep

# Tiny networks gain nothing from threads, and on a busy machine threads spend their time waiting for each other.
torch.set_num_threads(1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `fewstep ARGUMENTS` in this process."""
    monkeypatch.setenv("COLUMNS", "300")
    return partial(run_fewstep, capsys)
