"""Results are what they were when `golden_tokens.json` was written."""

import json

from golden_tokens import RECORD, cases


def test_every_decoder_gives_the_tokens_steps_and_passes_of_the_record() -> None:
    assert dict(cases()) == json.loads(RECORD.read_text())
