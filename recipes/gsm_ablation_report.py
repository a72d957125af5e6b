"""The ablation's table and plot, from the rows that the jobs of gsm_ablation.py left. Axis: S = seeds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gsm_ablation import ALL_THREE, OWN_SEED, VARIANTS

from fewstep.errors import FewstepError
from fewstep.files import write_text_whole
from fewstep.json_files import read_json
from fewstep.measure.contenders import figure, markdown_table
from fewstep.measure.metrics import crossed_interval
from fewstep.measure.plots import plot_accuracy
from fewstep.measure.seeds import at_speed, difference, settings_of, sweep_table
from fewstep.tasks.gsm_symbolic import problems

OTHERS = ("untrained", "teacher-threshold", "teacher-steps")
HEADINGS = (
    "", "trained by", "training tokens", "solved, %", "tokens per forward", "on right answers",
    "minus variant 7, same threshold", "minus variant 7, same speed",
)  # fmt: skip


def markdown(
    rows: Sequence[Mapping[str, Any]], clusters: Sequence[int], threshold: float, about: Mapping[str, Any]
) -> str:
    """The tables: every variant at the main threshold, less variant 7, and the whole sweeps."""
    titles = {row["variant"]: row["title"] for row in rows}
    by_variant = {variant: settings_of(rows, variant) for variant in [*VARIANTS, *OTHERS]}
    reference = by_variant[ALL_THREE].get(threshold)
    speed = float(reference.tokens_per_forward_S.mean()) if reference else math.nan
    num_seeds = max((len(one.correct_SI) for settings in by_variant.values() for one in settings.values()), default=0)
    lines = []
    for variant in [*VARIANTS, "untrained"]:
        one = by_variant[variant].get(threshold)
        if one is None:
            lines.append([variant, VARIANTS[variant].title if variant in VARIANTS else variant, "not there"])
            continue
        tokens = [row["training_tokens"] for row in rows if row["variant"] == variant and "training_tokens" in row]
        cells = [
            variant,
            titles[variant],
            f"{np.mean(tokens):,.0f}" if tokens else "0",
            crossed_interval(one.correct_SI, clusters).in_percent(),
            f"{one.tokens_per_forward_S.mean():.2f}",
            "none right" if one.tokens_per_forward_correct is None else f"{one.tokens_per_forward_correct:.2f}",
        ]
        if variant != ALL_THREE and reference is not None:
            cells.append(difference(one.correct_SI, reference.correct_SI, clusters).in_percent(signed=True))
            same_speed = at_speed(by_variant[variant], speed)
            cells.append(
                "not reached"
                if same_speed is None
                else difference(same_speed, reference.correct_SI, clusters).in_percent(signed=True)
            )
        lines.append(cells)
    under_threshold = {name: settings for name, settings in by_variant.items() if name != "teacher-steps"}
    parts = [
        f"Development problems: {len(clusters)}; seeds: up to {num_seeds}; main threshold {threshold}. Intervals are "
        "95 %, over seeds and problems, clustered by template. Differences are paired by problem and seed; the last "
        f"column compares at {speed:.2f} tokens per forward, the speed of variant 7, interpolated between thresholds.",
        # A line may end before the last heading.
        markdown_table(
            [dict(zip(HEADINGS, line, strict=False)) for line in lines], {name: figure("", name) for name in HEADINGS}
        ),
        "The whole sweeps: solved, % / tokens per forward.",
        sweep_table(under_threshold, "threshold"),
        sweep_table({"teacher-steps": by_variant["teacher-steps"]}, "steps"),
        "\n".join(_said_of_budget(about)),
        f"Command: `{about['command']}`, on {about['machine']['gpu'] or about['machine']['cpu']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _said_of_budget(about: Mapping[str, Any]) -> list[str]:
    """What was equal, and what was not."""
    own = about["own_states"]
    lines = [
        "Every variant has the same initialisation (for one seed, the same fresh LoRA), optimizer and budget: "
        f"{about['steps']} steps of {about['tokens_per_step']:,} packed tokens, LoRA rank {about['lora_rank']}. "
        "Training tokens are real tokens of packed documents (context, noisy and clean response); with references (7 "
        "to 9), half of the documents are references, and half as many are trajectories. The forward without gradient "
        "of the consistency loss is not counted.",
        "The teacher and the untrained weights are decoded in the student's blocks of 32 here, and all by plain "
        "thresholds, without a limit of gaps.",
    ]
    if own:
        lines.append(
            f"The own states of 8: {own['num_records']:,} answers of a preliminary student of variant 7 (seed "
            f"{OWN_SEED}, threshold {about['own_threshold']}), labelled by the teacher, beside the teacher's own; "
            "training that student is not counted."
        )
    return lines


def curves(rows: Sequence[Mapping[str, Any]], clusters: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """For the plot: means over the seeds at each setting, by the variant's name."""
    titles = {row["variant"]: row["title"] for row in rows}
    series: dict[str, list[dict[str, Any]]] = {}
    for variant in [name for name in [*VARIANTS, *OTHERS] if name in titles]:
        line = series[f"{variant} {titles[variant]}" if variant in VARIANTS else titles[variant]] = []
        line += [one.point(clusters) for one in settings_of(rows, variant).values()]
    return series


def write_report(results_folder: Path, threshold: float) -> None:
    """Write `ablation.md`, `ablation.png` and `ablation.svg` beside `ablation.json`, in words at this threshold.

    FewstepError if there is no row yet.
    """
    rows = read_json(results_folder / "ablation.json")
    if not rows:
        raise FewstepError(f"{results_folder / 'ablation.json'} holds no row; run the jobs first")
    # Differences are paired by seed, so all variants speak of the seeds that each of them has finished.
    trained = {row["variant"] for row in rows if row["variant"] in VARIANTS}
    shared = set.intersection(*({row["seed"] for row in rows if row["variant"] == variant} for variant in trained))
    rows = [row for row in rows if row["variant"] not in VARIANTS or row["seed"] in shared]
    clusters = [item.template if item.template is not None else -1 for item in problems("dev", rows[0]["n"])]
    text = markdown(rows, clusters, threshold, read_json(results_folder / "ablation-about.json"))
    write_text_whole(results_folder / "ablation.md", text)
    print(text)
    for path in plot_accuracy(curves(rows, clusters), results_folder / "ablation", title="Development problems"):
        print(path)
