"""Model cards of the bundled models, written from what was measured: every number comes from a file of results.

The results folder is what the recipes gsm_measure.py, gsm_throughput.py, gsm_ablation.py, compare_decoders.py and
`cllm.py shares` wrote (JSON files, and tables that they wrote as Markdown), `report` the `report.json` that the trainer
left beside the weights. A part whose file is missing is left out, and `Sources.missing` names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gsm_tokenizer import MAX_ANSWER_TOKENS, MAX_PROMPT_TOKENS

from fewstep.json_files import read_json
from fewstep.tasks.gsm_symbolic import DRILL_FRACTION, HELD_OUT_TEMPLATES, PROBLEM_SEEDS

Kind = Literal["ar", "teacher", "student", "cllm"]
LOSS_ROWS = 12

_WHAT: dict[Kind, str] = {
    "ar": "A small causal language model, which solves grade-school word problems step by step. It is the model from "
    "which `gsm-teacher` was "
    "adapted, and the autoregressive figure to compare few-step decoding with.",
    "teacher": "A masked-diffusion language model: it sees the whole canvas and fills it block by block, one token a "
    "pass. It was adapted from "
    "`gsm-ar`, and it is the teacher whose decoding `gsm-student` learnt to do in few passes.",
    "student": "A block-causal student of `gsm-teacher`, post-trained on the teacher's own decoding trajectories "
    "(CDLM, arXiv 2511.19269) so "
    "that it finalises many tokens a pass and keeps an exact key/value cache. It is an adapter on `gsm-teacher`.",
    "cllm": "A few-pass causal language model: `gsm-ar` after consistency training on its own Jacobi "
    "trajectories (CLLM, arXiv 2403.00835). Jacobi decoding, its default, finalises several tokens a pass, and the "
    "same tokens as plain autoregressive decoding of these weights. It is an adapter on `gsm-ar`, of which a share is "
    "kept that development problems chose: all of it is faster and less accurate (`recipes/cllm.py shares`).",
}
_TAGS: dict[Kind, list[str]] = {
    "ar": ["autoregressive"],
    "teacher": ["masked-diffusion"],
    "student": ["masked-diffusion", "block-causal", "consistency", "few-step"],
    "cllm": ["autoregressive", "jacobi-decoding", "consistency", "few-step"],
}


@dataclass
class Sources:
    """The results folder; `missing` fills with what was asked for and is not there."""

    folder: Path
    missing: list[str]

    def read(self, name: str) -> Any:
        """The JSON file's value, or None."""
        path = self.folder / name
        if not path.exists():
            self.missing.append(name)
            return None
        return read_json(path)

    def text(self, name: str) -> str | None:
        path = self.folder / name
        if not path.exists():
            self.missing.append(name)
            return None
        return path.read_text(encoding="utf-8")


def card(name: str, kind: Kind, model_folder: Path, report: Mapping[str, Any] | None, sources: Sources) -> str:
    """The README.md of one bundled model."""
    parts = [
        _header(kind),
        f"# {name}\n\n{_WHAT[kind]}",
        _use(name),
        _shape(model_folder),
        _data(),
        _training(kind, model_folder, report, sources),
        *(_comparison(sources) if kind == "cllm" else _figures(sources)),
        *_picture(model_folder, "accuracy.png", "Accuracy over tokens per forward on test problems"),
    ]
    if kind == "student" and (table := sources.text("ablation.md")):
        parts.append(f"## Does the consistency training matter?\n\n{table.strip()}")
        parts += _picture(model_folder, "ablation.png", "Accuracy over tokens per forward of the variants")
    parts += [_limits(sources), "## Licence\n\nApache-2.0, weights and card."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(folder: Path, name: str, says: str) -> list[str]:
    return [f"![{says}]({name})"] if (folder / name).exists() else []


def _header(kind: Kind) -> str:
    base = {"ar": None, "teacher": "gsm-ar", "student": "gsm-teacher", "cllm": "gsm-ar"}[kind]
    lines = ["license: apache-2.0", "language: en", "library_name: fewstep", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["tags:", *(f"- {tag}" for tag in [*_TAGS[kind], "gsm-symbolic"])]
    return "\n".join(["---", *lines, "---"])


def _use(name: str) -> str:
    return (
        "## Use\n\nThe bare question is the prompt; the model's template is applied.\n\n"
        f'```python\nimport fewstep\n\nlm = fewstep.load("{name}")\nout = lm.generate("Tom has 3 apples and buys 4 '
        "more. How many apples "
        'does he have?")\nprint(out.text, out.num_tokens, out.num_forwards)\n```'
    )


def _shape(folder: Path) -> str:
    config = read_json(folder / "config.json")
    rows = [
        ("architecture", config["architectures"][0] if config.get("architectures") else config["model_type"]),
        (
            "layers, width, heads",
            f"{config['num_hidden_layers']}, {config['hidden_size']}, {config['num_attention_heads']}",
        ),
        ("vocabulary", config["vocab_size"]),
        ("role", config.get("role", "autoregressive")),
    ]
    if config.get("role") not in (None, "autoregressive"):
        rows += [("block size", config.get("block_size")), ("context attention", config.get("context_attention"))]
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        settings = read_json(adapter)
        rows.append(
            (
                "adapter",
                f"LoRA, rank {settings['r']}, alpha {settings['lora_alpha']:g}, on "
                f"{settings['base_model_name_or_path']}",
            )
        )
    rows.append(("bytes of weights", f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')):,}"))
    return "## Shape\n\n" + _table(["", ""], rows)


def _data() -> str:
    return (
        "## Data\n\n"
        "GSM-Symbolic word problems (arXiv 2410.05229) drawn with the `reasoning-gym` package (Apache-2.0), their "
        "solutions rendered in "
        f"several styles; {DRILL_FRACTION:.0%} of the rows are single computations. A problem's signature, its "
        "template and all its numbers, "
        f"decides by a hash whether it is for training, development or test. {len(HELD_OUT_TEMPLATES)} templates never "
        "occur in training. "
        f"Problem seeds: development {PROBLEM_SEEDS['dev']:,}, test {PROBLEM_SEEDS['test']:,}, held-out templates "
        f"{PROBLEM_SEEDS['heldout']:,}."
    )


def _training(kind: Kind, folder: Path, report: Mapping[str, Any] | None, sources: Sources) -> str:
    if report is None:
        sources.missing.append(f"report.json of {folder.name}")
        return ""
    settings, processes = report["settings"], report.get("processes")
    launch = f"torchrun --nproc-per-node {processes} " if processes and processes > 1 else "python "
    command = f"{launch}recipes/{report['command']}"
    rows = [
        ("steps", report["steps"]),
        ("real tokens", f"{report['real_tokens']:,}"),
        ("tokens per second", f"{report['tokens_per_second']:,.0f}"),
        ("seconds of training", f"{report['seconds']:.0f}"),
    ]
    if processes:
        rows.append(("devices", processes))
        rows.append(("device hours", f"{report['seconds'] * processes / 3600:.3f}"))
    rows += [
        (
            "optimizer",
            f"AdamW, learning rate {settings['learning_rate']:g}, {settings['schedule']}, {settings['warmup_steps']} "
            "warm-up steps",
        ),
        ("weight decay, clipping", f"{settings['weight_decay']}, {settings['clip_norm']}"),
        ("precision", settings["precision"]),
        *([("device", report["device"])] if "device" in report else []),
        ("seed", settings["seed"]),
    ]
    parts = ["## Training", f"`{command}`", _table(["", ""], rows), "The loss over the run:"]
    return "\n\n".join([*parts, loss_table(report["history"])])


def loss_table(history: Sequence[Mapping[str, float]]) -> str:
    """About a dozen of the logged steps, evenly spread, with all parts of the loss in nats."""
    logged = [line for line in history if "loss" in line]
    parts = ("loss", "distillation", "consistency", "denoising", "autoregressive")
    names = [name for name in parts if name in logged[0]]
    count = min(LOSS_ROWS, len(logged))
    chosen = sorted({round(i * (len(logged) - 1) / max(1, count - 1)) for i in range(count)})
    rows = [[f"{logged[i]['step']:.0f}", *(f"{logged[i][name]:.4f}" for name in names)] for i in chosen]
    return _table(["step", *names], rows)


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(sources: Sources) -> list[str]:
    return [
        part
        for part in (
            _accuracy(sources.read("accuracy.json")),
            _timing(sources.read("timing-cpu.json"), "CPU"),
            _timing(sources.read("timing-cuda.json"), "GPU"),
            _throughput(sources.read("throughput.json")),
        )
        if part
    ]


def _comparison(sources: Sources) -> list[str]:
    """What `compare_decoders.py` and `cllm.py shares` found."""
    parts = []
    if table := sources.text("decoders/comparison.md"):
        about = sources.read("decoders/comparison.json")
        parts.append(
            f"## Decoders side by side\n\n`{about['command']}`, on {_device(about['machine'])}.\n\n{table.strip()}"
        )
    if shares := sources.text("decoders/shares.md"):
        parts.append(f"## How much of the adapter\n\n{shares.strip()}")
    return parts


def _device(machine: Mapping[str, Any] | None) -> str:
    if not machine:
        return "an unknown machine"
    on_cpu = str(machine.get("device", "")).startswith("cpu") or not machine["gpu"]
    return f"{machine['cpu']}, {machine['num_threads']} threads" if on_cpu else str(machine["gpu"])


_SET_TITLES = {"test": "Test problems", "heldout": "Templates never trained on", "dev": "Development problems"}


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    threshold = found["chosen_threshold"]
    lines = [
        "## Accuracy and passes",
        "",
        f"`{found['command']}`, on {_device(found['machine'])}. Intervals are Wilson's, 95 %. Passes count prefill. "
        f"The student's threshold is {threshold}{_gaps(found)}: {found['chosen_on']}. Tokens per second are of a large "
        "batch on one device.",
    ]
    for set_name, title in _SET_TITLES.items():
        rows = [row for row in found["rows"] if row["set"] == set_name]
        if not rows:
            continue
        cells = [
            [
                f"**{row['contender']}**"
                if row["contender"] in ("ar", "teacher", f"student-{threshold}")
                else row["contender"],
                row["n"],
                f"{100 * row['accuracy']:.2f} ({100 * row['accuracy_ci95'][0]:.2f} to "
                f"{100 * row['accuracy_ci95'][1]:.2f})",
                f"{row['num_forwards_mean']:.1f}",
                f"{row['tokens_per_forward']:.2f}",
                "" if row["tokens_per_forward_correct"] is None else f"{row['tokens_per_forward_correct']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in rows
        ]
        header = ["", "problems", "solved, %", "passes", "tokens per forward", "on right answers", "tokens per second"]
        lines += ["", f"### {title}", "", _table(header, cells)]
        said = [comparison_sentence(row) for row in found["comparisons"] if row["set"] == set_name]
        lines += ["", *(f"- {sentence}" for sentence in said)] if said else []
        lines += [
            "- Without early stop the teacher solves the same problems with as many tokens in "
            f"{row['same_outcome_and_length']} of {row['n']}."
            for row in found["without_stopping"]
            if row["set"] == set_name
        ]
    return "\n".join(lines)


def comparison_sentence(row: Mapping[str, Any]) -> str:
    """A paired difference with its interval, by template where templates are known, and McNemar's test."""
    clustered = row["difference_ci95_clustered"]
    low, high = clustered or row["difference_ci95"]
    kind = "clustered by template" if clustered else "by problem"
    contains = "contains 0" if low <= 0 <= high else "does not contain 0"
    return (
        f"{row['first']} less {row['second']}, {row['n']:,} problems: {100 * row['difference']:+.2f} points; its "
        f"interval ({100 * low:+.2f} to {100 * high:+.2f}, paired, {kind}) {contains}; McNemar "
        f"p = {row['mcnemar_p']:.2g}; tokens per forward {row['tokens_per_forward_ratio']:.2f} to 1."
    )


def _gaps(found: Mapping[str, Any]) -> str:
    """ ", 2 gaps", if there is a limit."""
    return "" if found.get("gaps") is None else f", {found['gaps']} gaps"


def _timing(found: Mapping[str, Any] | None, where: str) -> str:
    if found is None:
        return ""
    rows = [
        [
            name,
            f"{one['seconds_median']:.3f}",
            f"{found['over_student'][name]:.1f}x" if name in found["over_student"] else "1x",
            f"{one['num_forwards_mean']:.1f}",
            f"{one['step_ms']:.2f}",
            f"{one['tokens_per_forward']:.2f}",
            f"{one['tokens_per_second']:.1f}",
        ]
        for name, one in found["timings"].items()
    ]
    header = [
        "",
        "seconds, median",
        "over the student",
        "passes",
        "ms a pass",
        "tokens per forward",
        "tokens per second",
    ]
    factors = found["factors"]
    return "\n".join(
        [
            f"## Time at batch 1, {where}",
            "",
            f"`{found['command']}`, on {_device(found['machine'])}; {found['n']} test problems, all models interleaved "
            f"in one run. Student and teacher under the threshold {found['threshold']}{_gaps(found)}.",
            "",
            _table(header, rows),
            "",
            f"The published teacher needs {factors['total']:.1f} times the student's seconds (ratio of the sums): "
            "stopping "
            f"{factors['stopping']:.2f} x caching {factors['caching']:.2f} x fewer passes "
            f"{factors['fewer_passes']:.2f}.",
        ]
    )


def _throughput(found: Mapping[str, Any] | None) -> str:
    if found is None or not found["rows"]:
        return ""
    rows = [
        [
            row["objective"],
            f"{row['real_tokens_per_second'] / 1e6:.3f}",
            f"{row['packing']:.1%}",
            f"{row['flops_per_real_token'] / 1e6:.1f}",
            f"{row['share_of_matmul_rate']:.1%}",
        ]
        for row in found["rows"]
    ]
    header = [
        "objective",
        "M real tokens per second",
        "of a packed row",
        "M operations per token",
        "share of matrix rate",
    ]
    return "\n".join(
        [
            "## Training throughput",
            "",
            f"`{found['command']}`, on one {_device(found['machine'])}, whose matrix rate ({found['matmul']}) measured "
            "in the same run is "
            f"{found['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s. Operations: {found['formula']}; a forward without "
            "gradient counts a third, "
            "and under LoRA frozen weights count 4 instead of 6.",
            "",
            _table(header, rows),
        ]
    )


def _limits(sources: Sources) -> str:
    path = sources.folder / "accuracy.json"
    found = read_json(path) if path.exists() else None
    lines = [
        "## Limits",
        "",
        "- It knows one kind of text: English word problems with their instruction, answered in a few fixed styles. It "
        "is a research model to "
        "show and test decoding, not an assistant.",
        f"- Prompts are at most {MAX_PROMPT_TOKENS} tokens and answers at most {MAX_ANSWER_TOKENS}; positions end at "
        "512.",
        "- Wrong arithmetic looks like right arithmetic. Check what it says.",
    ]
    if found is not None:
        test, heldout = (
            next((row for row in found["rows"] if row["set"] == name and row["contender"] == "teacher"), None)
            for name in ("test", "heldout")
        )
        if test and heldout and heldout["accuracy"] < test["accuracy"]:
            lines.append(
                "- Templates that were not in training are hard for models of this size: the teacher solves "
                f"{100 * heldout['accuracy']:.1f} % of "
                f"them, against {100 * test['accuracy']:.1f} % of the test problems."
            )
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)
