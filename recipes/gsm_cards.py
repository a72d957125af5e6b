"""Model cards of the bundled models: `cards/card.md.j2`, filled with what was measured.

The results folder is what the recipes gsm_measure.py, gsm_throughput.py, gsm_ablation.py, compare_decoders.py,
`cllm.py shares` and `draft.py measure` wrote (JSON files, and tables that they wrote as Markdown; those of
`draft.py measure` are `DRAFT_FILES` in the folder draft), `report` the `report.json` that the trainer left beside the
weights. A part whose file is missing is left out, and `Sources.missing` names it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gsm_tokenizer import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fewstep.json_files import read_json, read_text
from fewstep.measure.compare import comparison_sentence
from fewstep.tasks.gsm_symbolic import DRILL_FRACTION, HELD_OUT_TEMPLATES, PROBLEM_SEEDS
from fewstep.train.run_log import losses

Kind = Literal["ar", "teacher", "student", "cllm", "draft"]
DRAFT_FILES = ("test", "test-bfloat16", "heldout", "dev")


@dataclass
class Sources:
    """The results folder; `missing` fills with what was asked for and is not there."""

    folder: Path
    missing: list[str]

    def read(self, name: str) -> Any:
        """The value of a JSON file, the text of another; None if it is not there."""
        path = self.folder / name
        if not path.exists():
            self.missing.append(name)
            return None
        return read_json(path) if path.suffix == ".json" else read_text(path).strip()


def card(name: str, kind: Kind, model_folder: Path, report: Mapping[str, Any] | None, sources: Sources) -> str:
    """The README.md of one bundled model."""
    if report is None:
        sources.missing.append(f"report.json of {model_folder.name}")
    adapter = model_folder / "adapter_config.json"
    values: dict[str, Any] = {
        "config": read_json(model_folder / "config.json"),
        "adapter": read_json(adapter) if adapter.exists() else None,
        "weight_bytes": sum(path.stat().st_size for path in model_folder.glob("*.safetensors")),
        "pictures": {path.name for path in model_folder.glob("*.png")},
        "accuracy": sources.read("accuracy.json"),
        "ablation": sources.read("ablation.md") if kind == "student" else None,
    }
    if kind == "cllm":
        values |= {
            "decoders_table": sources.read("decoders/comparison.md"),
            "decoders": sources.read("decoders/comparison.json"),
            "shares": sources.read("decoders/shares.md"),
        }
    elif kind == "draft":
        values |= {"drafting": [one for name in DRAFT_FILES if (one := sources.read(f"draft/{name}.json"))]}
    else:
        values |= {
            "timings": {"CPU": sources.read("timing-cpu.json"), "GPU": sources.read("timing-cuda.json")},
            "throughput": sources.read("throughput.json"),
        }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "cards"), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    text = environment.get_template("card.md.j2").render(
        name=name, kind=kind, report=report, comparison_sentence=comparison_sentence,
        drill_fraction=DRILL_FRACTION, num_held_out=len(HELD_OUT_TEMPLATES), seeds=PROBLEM_SEEDS,
        max_prompt=MAX_PROMPT_TOKENS, max_answer=MAX_ANSWER_TOKENS, **losses(report), **values,
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
