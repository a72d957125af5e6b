"""How fast training is: `python recipes/gsm_throughput.py` writes `throughput.json` for the cards.

Real (unpadded) tokens a second of the trainer itself, objective by objective, and their operations as a share of the
device's measured rate of large matrix products.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe
from stages import BLOCK
from task_options import Many
from torch import bfloat16, compiler, float32

from fewstep.errors import FewstepError
from fewstep.measure.timing import describe_machine, matmul_flops_per_second, write_figures
from fewstep.models.importers.shapes import write_random
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.roles import RoleName
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.corruption import Corruption
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective, Objective
from fewstep.train.operations import FORMULA
from fewstep.train.throughput import measure_training
from fewstep.train.trainer import TrainSettings
from fewstep.train.trajectories import read_table
from fewstep.train.trajectory_table import TrajectoryTable

app = typer.Typer(pretty_exceptions_enable=False)

Made = tuple[Network, Objective, LoRASettings | None]
"""A fresh network, the objective that it is trained on, and the adapter if only one is trained."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained: the teacher's network, or with a `shape` a larger one of random weights."""

    name: str
    make: Callable[[], Made]
    shape: str | None = None


def throughput_cases(
    teacher: str, table: TrajectoryTable, references: Examples, *, device: str, rank: int, shape: str
) -> list[Case]:
    """All that is measured: references are the data of the first two and of those at `shape`, else trajectories too."""

    def network(role: RoleName, weights: str | None = None) -> Network:
        """The teacher in this role, or random weights of a shape with its tokenizer."""
        found = load_network(teacher, dtype="float32", device=device if weights is None else "cpu")
        playing = replace(found.role.playing(role), block_size=BLOCK)
        if weights is None:
            return found.with_role(playing)
        with tempfile.TemporaryDirectory() as folder:
            write_random(weights, Path(folder) / weights)
            module = load_network(Path(folder) / weights, dtype="float32", device=device).module
        return Network(module, playing, found.tokenizer, name=weights)

    def causal(weights: str | None = None) -> Made:
        one = network("autoregressive", weights)
        return one, CausalObjective(one.role, references, one.eos_token_id), None

    def diffusion(weights: str | None = None) -> Made:
        one = network("bidirectional", weights)
        corruption = Corruption(leftward=0.8, frontier=0.5)
        canvases = 3 if one.role.context_attention == "causal" else 1
        objective = MaskedDiffusionObjective(
            one.role, references, one.eos_token_id, corruption=corruption, canvases=canvases
        )
        return one, objective, None

    def cdlm(lora: LoRASettings | None = None, **settings: Any) -> Made:
        one = network("block_causal")
        chosen = CDLMSettings(denoising=0.1, **settings)
        objective = CDLMObjective(one.role, table, one.eos_token_id, references=references, settings=chosen)
        return one, objective, lora

    return [
        Case(name="causal", make=causal),
        Case(name="teacher (masked diffusion)", make=diffusion),
        Case(name="cdlm, full weights", make=cdlm),
        Case(name="cdlm, LoRA", make=partial(cdlm, LoRASettings(rank=rank, alpha=rank))),
        Case(name="cdlm, full weights, without consistency", make=partial(cdlm, consistency=0.0)),
        Case(name=f"causal, {shape}", make=partial(causal, shape), shape=shape),
        Case(name=f"teacher (masked diffusion), {shape}", make=partial(diffusion, shape), shape=shape),
    ]


@app.command()
def main(
    results_folder: Annotated[Path, typer.Option("--results", help="folder for figures")] = Path("results"),
    teacher: str = "gsm-teacher",
    store: Path = Path("runs/gsm/trajectories"),
    device: str = "auto",
    steps: Many = 120,
    rows: Annotated[int, typer.Option(min=1, help="packed rows of a step")] = 48,
    row_length: Many = 2048,
    rank: Many = 32,
    shape: Annotated[str, typer.Option(help="a larger network, trained with random weights as well")] = "smollm2-135m",
    shape_rows: Annotated[int, typer.Option(min=1, help="packed rows of its steps")] = 16,
    only: Annotated[list[str] | None, typer.Option(help="repeatable; the objectives whose names begin so")] = None,
    matmul_size: Many = 8192,
) -> None:
    """Training throughput on real tokens as a share of the device's matrix rate: `throughput.json`."""
    network = load_network(teacher, dtype="float32", device=device)
    place = network.device
    table, references = read_table(store, network)
    if references is None:
        raise FewstepError(f"the trajectories in {store} hold no reference answers to train on")
    everything = throughput_cases(teacher, table, references, device=str(place), rank=rank, shape=shape)
    cases = [case for case in everything if case.name.startswith(tuple(only or ("",)))]
    if not cases:
        raise FewstepError(f"--only names none of {'; '.join(case.name for case in everything)}")
    dtype = bfloat16 if place.type == "cuda" else float32
    rate = matmul_flops_per_second(matmul_size, place, dtype)
    told: dict[str, Any] = {
        "machine": {**describe_machine(), "device": str(place)},
        "matmul": f"{matmul_size}^3 {str(dtype).removeprefix('torch.')}",
        "matmul_flops_per_second": rate,
        "formula": FORMULA,
        "rows": [],
        "failed": [],
    }
    for case in cases:
        compiler.reset()  # each has its graphs to itself, so that none runs into the limit of recompilations
        try:
            packed = rows if case.shape is None else shape_rows
            network, objective, lora = case.make()
            settings = TrainSettings(
                max_steps=steps, rows=packed, row_length=row_length, learning_rate=1e-5, warmup_steps=1,
                log_every=max(1, steps // 6), compiled=place.type == "cuda",
                precision="bf16" if place.type == "cuda" else "no",
            )  # fmt: skip
            row = {"objective": case.name, "shape": case.shape, **measure_training(network, objective, settings, lora)}
            row["share_of_matmul_rate"] = row["flops_per_real_token"] * row["real_tokens_per_second"] / rate
        except (FewstepError, RuntimeError) as error:  # out of memory among them: the others are worth having
            told["failed"].append({"objective": case.name, "error": str(error)[:500]})
            print(f"{case.name} failed: {error}", flush=True)
        else:
            told["rows"].append(row)
            speed, share = row["real_tokens_per_second"] / 1e6, row["share_of_matmul_rate"]
            print(f"{case.name}: {speed:.3f} M real tokens/s, {share:.1%} of {rate / 1e12:.0f} TFLOP/s", flush=True)
        write_figures(results_folder / "throughput.json", told)
    if not told["rows"]:
        raise FewstepError(f"nothing could be trained; {results_folder / 'throughput.json'} says why")


if __name__ == "__main__":
    run_recipe(app)
