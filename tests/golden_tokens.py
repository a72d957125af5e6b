"""Writes `golden_tokens.json`, the record that a change of structure leaves every result as it was.

    python tests/golden_tokens.py
    python tests/golden_tokens.py 50 FILE    # more problems, to compare by hand

A case is what one call through `LanguageModel` returns: token ids, the step that finalised each position, and how many
passes there were; of a stream also its events. The record keeps a hash of them, and of no number that is not an
integer. Write it anew only in a change that is meant to alter results, and say so in its message.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers.networks import lively

import fewstep
from fewstep.decode.policies import EntropyBelow, Factor, FixedCount, Margin
from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel
from fewstep.models.medusa import MedusaHeads, save_heads
from fewstep.tasks.gsm_symbolic import problems

RECORD = Path(__file__).with_suffix(".json")
PROMPTS = ["what is 2+2?", "a", "how many of them are left in the box, and how many not?", "x=1, y=2", "say it again"]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 7}

BUNDLED: dict[str, list[dict[str, Any]]] = {
    "gsm-student": [
        {},
        {"threshold": 0.5, "gaps": 1},
        {"policy": Factor(), "seed": 3},
        SAMPLED,
        {"decoder": "diffusion", "threshold": 0.9},
    ],
    "gsm-teacher": [
        {"canvas_length": 24},
        {"steps": 10},
        {"steps": 12, "order": "random", "seed": 5},
        {"steps": 12, "order": "margin", "early_stop": False},
        {"steps": 9, "order": "entropy"},
        {"order": "origin", "steps": 8, "seed": 2},
        {"threshold": 0.8, "gaps": 2},
        {"policy": Margin()},
        {"policy": EntropyBelow(nats=0.5)},
        {"policy": FixedCount(num_tokens=3, order="margin")},
        {"alg": "entropy", "steps": 8, "alg_temp": 0.5, "seed": 4},
        {"alg": "origin", "steps": 8},
        {"steps": 10, "cfg_scale": 1.0},
        {"steps": 10, **SAMPLED},
    ],
    "gsm-ar": [
        {},
        SAMPLED,
        {"decoder": "jacobi", "window": 8},
        {"decoder": "jacobi", "window": 6, "ngram": 2, "fixed_windows": True},
        {"decoder": "lookahead", "window": 4, "ngram": 3},
        {"decoder": "prompt-lookup"},
        {"decoder": "prompt-lookup", **SAMPLED},
        {"decoder": "speculative", "draft": "gsm-cllm", "window": 3},
        {"decoder": "speculative", "draft": "gsm-cllm", "window": 3, **SAMPLED},
        {"decoder": "speculative", "draft": "gsm-student"},
    ],
    "gsm-cllm": [{}, {"decoder": "autoregressive", "temperature": 1.0, "seed": 1}],
    "gsm-draft": [
        {"max_new_tokens": 48},
        {"max_new_tokens": 48, "cycle": "two-pass", "window": 16},
        {"max_new_tokens": 48, "cycle": "fused", "window": 16},
        {"max_new_tokens": 48, "cycle": "fused", "window": 16, **SAMPLED},
    ],
}
TINY: dict[str, list[dict[str, Any]]] = {
    "block_causal": [{"threshold": 0.3}, {"threshold": 0.3, "early_stop": False}, {"threshold": 0.2, **SAMPLED}],
    "bidirectional": [{"steps": 12, "block_size": 8}, {"threshold": 0.3, **SAMPLED}, {"canvas_length": 32}],
    "autoregressive": [{}, SAMPLED, {"decoder": "lookahead"}, {"decoder": "medusa"}, {"decoder": "jacobi"}],
}


def cases(num_problems: int = 1) -> Iterator[tuple[str, str]]:
    """Name and hash of each; bundled models answer so many problems."""
    questions = [problem.question for problem in problems("test", num_problems)]
    for name, several in BUNDLED.items():
        lm = bundled(name)
        for settings in several:
            options = {"max_new_tokens": 16, **settings}
            yield f"{name} {told(settings)}", of_outputs(lm.generate(questions, batch_size=1, **options))
    for role, several in TINY.items():
        lm = tiny(role)
        for settings in several:
            options = {"max_new_tokens": 18, **settings}
            if settings.get("decoder") == "medusa":
                options |= {"heads": medusa_heads(), "window": 12}
            alone = of_outputs([lm.generate(prompt, **options) for prompt in PROMPTS])
            assert of_outputs(lm.generate(PROMPTS, batch_size=5, **options)) == alone
            yield f"tiny {role} {told(settings)}", alone
            yield f"tiny {role} {told(settings)} streamed", of_stream(lm, PROMPTS[0], options)
    lm = bundled("gsm-teacher")
    yield "infilled gap", of_outputs([lm.infill("There are 3 red and ", " cards in the box.", num_tokens=6)])
    yield (
        "infilled answer",
        of_outputs(
            [lm.infill("", " The answer is 320.", num_tokens=12, prompt=questions[0], steps=4, temperature=0.5, seed=3)]
        ),
    )


def of_outputs(outputs: list[Output]) -> str:
    return digest([*integers(output)] for output in outputs)


def of_stream(lm: LanguageModel, prompt: str, settings: dict[str, Any]) -> str:
    stream = lm.stream(prompt, **settings)
    events = [[event.position, event.token_id, event.step] for event in stream]
    assert stream.output is not None
    return digest([events, integers(stream.output), stream.answer_text()])


def integers(output: Output) -> list[Any]:
    return [
        output.token_ids,
        output.num_tokens,
        output.num_forwards,
        output.num_draft_forwards,
        output.finish_reason,
        output.canvas_ids_G.tolist(),
        output.step_G.tolist(),
    ]


def digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(list(told)).encode()).hexdigest()[:16]


def told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


@cache
def bundled(name: str) -> LanguageModel:
    return fewstep.load(name, dtype="float32", device="cpu")


@cache
def tiny(role: Any) -> LanguageModel:
    return LanguageModel(lively(role))


@cache
def medusa_heads() -> str:
    """A folder that is never removed: the system's for temporary files."""
    folder = Path(tempfile.mkdtemp()) / "heads"
    network = tiny("autoregressive").network
    save_heads(MedusaHeads.of(network, 3), folder, network)
    return str(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    num_problems, file = (int(sys.argv[1]), Path(sys.argv[2])) if len(sys.argv) > 1 else (1, RECORD)
    file.write_text(json.dumps(dict(cases(num_problems)), indent=2) + "\n")
