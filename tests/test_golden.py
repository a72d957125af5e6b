"""Results are what they were when `golden_tokens.json` and `golden_losses.json` were written."""

import json

import golden_losses
import golden_tokens
import pytest


def test_every_decoder_gives_the_tokens_steps_and_passes_of_the_record() -> None:
    assert dict(golden_tokens.cases()) == json.loads(golden_tokens.RECORD.read_text())


def test_every_objective_gives_the_losses_of_the_record() -> None:
    """To a thousandth: processors round differently, and 20 steps let that grow."""
    recorded = json.loads(golden_losses.RECORD.read_text())
    found = dict(golden_losses.losses())
    assert found.keys() == recorded.keys()
    for name, values in recorded.items():
        assert found[name] == pytest.approx(values, rel=1e-3), name
