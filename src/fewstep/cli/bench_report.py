"""What `fewstep bench` shows: a line for the device, tables of steps and of answers, power and cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.cli.report import note, print_table


def show(figures: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of all variants, as `report` of `measure.bench` gives them."""
    first = figures[0]
    for figure in {figure["dtype"]: figure for figure in figures}.values():
        measured = figure["measured"]
        print(
            f"{first['machine']['gpu'] or first['machine']['cpu']}: reads {measured['read_gb_s']:,.0f} GB/s, copies "
            f"{measured['copy_gb_s']:,.0f} GB/s, multiplies {measured['matrix_tflops']:,.3g} TFLOP/s in "
            f"{figure['dtype']}"
        )
    first_token_s = first["engine_seconds"] + first["answers"]["first_round_seconds"]
    print(
        f"{first['shape'] or first['model']}: loaded in {first['load_seconds']:.1f} s, first tokens after "
        f"{first_token_s:.1f} s more"
    )
    print()
    print_table(
        [
            "decoder",
            "engine",
            "step",
            "batch",
            "block",
            "context",
            "steps",
            "ms",
            "floor ms",
            "of floor",
            "matrix",
            "tok/s",
        ],
        [
            [
                row["decoder"],
                row["engine"],
                row["kind"],
                row["batch_size"],
                row["block_size"] or "",
                row["context"],
                row["num_steps"],
                f"{row['step_ms_median']:.2f}",
                f"{row['floor_ms']:.2f}",
                f"{row['step_ms_median'] / row['floor_ms']:.2f}x",
                f"{row['matrix_share']:.0%}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for figure in figures
            for row in figure["steps"]
        ],
        num_texts=3,
    )
    print()
    print_table(
        [
            "decoder",
            "engine",
            "batch",
            "block",
            "context",
            "answer ms",
            "passes",
            "ms/pass",
            "host ms",
            "tok/s",
            "GB",
            "warm-up s",
        ],
        [
            [
                figure["decoder"],
                figure["engine"],
                figure["batch_size"],
                figure["block_size"] or "",
                figure["context"],
                f"{figure['answers']['answer_ms_median']:.1f}",
                f"{figure['answers']['passes_mean']:.1f}",
                f"{figure['answers']['ms_per_pass']:.2f}",
                _or_none(figure["answers"]["host_ms_per_answer"], ".1f"),
                f"{figure['tokens_per_second']:,.0f}",
                f"{figure['peak_memory_bytes'] / 1e9:.2f}",
                f"{figure['answers']['warm_up_seconds']:.1f}",
            ]
            for figure in figures
        ],
        num_texts=2,
    )
    _show_power(figures)
    for sentence in dict.fromkeys(figure["engine_note"] for figure in figures if figure["engine_note"]):
        note(f"the plain path runs: {sentence}")


def _show_power(figures: Sequence[Mapping[str, Any]]) -> None:
    print()
    for figure in figures:
        answers = figure["answers"]
        power = "power: not reported by this device"
        if answers["watts"] is not None:
            power = f"{answers['watts']:.0f} W, {answers['joules_per_token']:.3g} J per token"
        cost = answers["cost_per_million_tokens"]
        told = power if cost is None else f"{power}; {cost:,.3g} for a million tokens"
        if answers["watts"] is None and cost is None:
            print(told)
            return
        print(f"{figure['decoder']}, engine {figure['engine']}, batch {figure['batch_size']}: {told}")


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
