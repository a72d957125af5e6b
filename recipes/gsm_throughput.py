"""How fast training is: `python recipes/gsm_throughput.py` writes `throughput.json` for the cards.

Real (unpadded) tokens a second of the trainer itself, objective by objective, and their operations as a share of the
device's measured rate of large matrix products.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from stages import BLOCK
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole
from fewstep.measure.timing import describe_machine, this_command
from fewstep.models.importers.shapes import write_random
from fewstep.models.load import load_network
from fewstep.models.masks import Layout
from fewstep.models.network import Network
from fewstep.models.roles import RoleName
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.corruption import Corruption
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective, Objective, to_device
from fewstep.train.stream import BatchStream
from fewstep.train.trainer import TrainSettings, train
from fewstep.train.trajectories import read_table

FORMULA = (
    "6 x non-embedding parameters per real token + 6 x vocabulary x width per scored position + 12 x layers x width x "
    "mean visible "
    "keys per real token"
)
BATCHES = 4  # whose work is counted
LORA_FORMULA = (
    "useful operations: as above with 4 instead of 6 for frozen weights, whose gradient nobody needs (an adapter "
    "computed on the weights forms it all the same), and 6 for the adapter's"
)


def matmul_flops_per_second(size: int, device: torch.device, dtype: torch.dtype, repeats: int = 50) -> float:
    """The rate of size x size matrix products: 2 size^3 operations each, the median of five series."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(6):
        seconds = _seconds_of(lambda: [a @ b for _ in range(repeats)], device)
        rates.append(repeats * 2 * size**3 / seconds)
    return statistics.median(rates[1:])  # the first series warms up


def _seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


@dataclass
class Work:
    """What the packed forwards of an objective are made of, counted over batches; with and without gradient apart."""

    real_tokens: int = 0
    scored: int = 0
    visible_keys: int = 0
    real_tokens_without_gradient: int = 0
    scored_without_gradient: int = 0
    visible_keys_without_gradient: int = 0

    def add(self, real_tokens: int, scored: int, visible_keys: int, *, gradient: bool) -> None:
        if gradient:
            self.real_tokens += real_tokens
            self.scored += scored
            self.visible_keys += visible_keys
        else:
            self.real_tokens_without_gradient += real_tokens
            self.scored_without_gradient += scored
            self.visible_keys_without_gradient += visible_keys


def count_work(
    objective: Objective, vocab_size: int, *, rows: int, row_length: int, device: torch.device, batches: int
) -> Work:
    """Replay the first batches with a forward that only counts."""
    stream = BatchStream(objective, rows=rows, row_length=row_length)
    work = Work()
    for number in range(batches):
        batch = stream.next_batch()

        def forward(
            tokens_RT: Tensor,
            positions_RT: Tensor,
            layout: Layout,
            rows_S: Tensor,
            adapted_RT: Tensor | None = None,
            *,
            gradient: bool = True,
            batch: Any = batch,
        ) -> Tensor:
            visible = 0
            real_RT = batch.packed.real_RT.to(device)
            for row in range(len(tokens_RT)):  # one at a time: a dense mask of all rows is large
                visible += int(row_of(layout, row).dense()[0, 0][real_RT[row]].sum())
            work.add(int(real_RT.sum()), len(rows_S), visible, gradient=gradient)
            return torch.zeros(len(rows_S), vocab_size, device=device, requires_grad=gradient)

        objective.loss(forward, to_device(objective.prepare(batch, torch.Generator().manual_seed(number)), device))
    return work


def row_of(layout: Layout, row: int) -> Layout:
    """One packed row of it."""
    parts = {field.name: getattr(layout, field.name) for field in fields(Layout)}
    return replace(layout, **{name: part[row : row + 1] for name, part in parts.items() if part is not None})


def flops_per_token(network: Network, work: Work, *, adapter_parameters: int = 0) -> float:
    """Operations of a training step for each real token, by FORMULA.

    A forward without gradient counts a third: 2 instead of 6, 4 instead of 12. With an adapter, LORA_FORMULA: frozen
    weights and the frozen head take 4, since their own gradient is never formed; attention stays 12.
    """
    config = network.module.config
    embedding = network.module.get_input_embeddings().weight.numel()
    tied = network.module.get_output_embeddings().weight is network.module.get_input_embeddings().weight
    weights = sum(parameter.numel() for parameter in network.module.parameters()) - embedding * (1 if tied else 2)
    width, layers = config.hidden_size, config.num_hidden_layers
    per_weight = 4 if adapter_parameters else 6

    with_gradient = (
        (per_weight * weights + 6 * adapter_parameters) * work.real_tokens
        + per_weight * config.vocab_size * width * work.scored
        + 12 * layers * width * work.visible_keys
    )
    without_gradient = (
        2 * (weights + adapter_parameters) * work.real_tokens_without_gradient
        + 2 * config.vocab_size * width * work.scored_without_gradient
        + 4 * layers * width * work.visible_keys_without_gradient
    )
    return (with_gradient + without_gradient) / work.real_tokens


Made = tuple[Network, Objective, LoRASettings | None]
"""A fresh network, the objective that it is trained on, and the adapter if only one is trained."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained: the teacher's network, or with a `shape` a larger one of random weights."""

    objective: str
    make: Callable[[], Made]
    shape: str | None = None

    @property
    def name(self) -> str:
        return self.objective if self.shape is None else f"{self.objective}, {self.shape}"


def measure_training(
    case: Case,
    *,
    steps: int,
    rows: int,
    row_length: int,
    matmul_rate: float,
) -> dict[str, Any]:
    """Train for some steps by the trainer itself; tokens per second are the median of its windows, the first (which
    compiles) left out.
    """
    network, objective, lora = case.make()
    cuda = network.device.type == "cuda"
    every = max(1, steps // 6)
    settings = TrainSettings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=1e-5, warmup_steps=1, log_every=every,
        compiled=cuda, precision="bf16" if cuda else "no",
    )  # fmt: skip
    config_parameters = sum(parameter.numel() for parameter in network.module.parameters())
    work = count_work(
        objective, network.vocab_size, rows=rows, row_length=row_length, device=network.device, batches=BATCHES
    )
    # Before the adapter's layers replace the plain ones: r x (in + out) for every linear layer but the head.
    head = network.module.get_output_embeddings()
    adapter = sum(
        lora.rank * (layer.in_features + layer.out_features)
        for layer in network.module.modules()
        if lora and isinstance(layer, torch.nn.Linear) and layer is not head
    )
    per_token = flops_per_token(network, work, adapter_parameters=adapter)
    with tempfile.TemporaryDirectory() as folder:
        done = train(network, objective, settings, Path(folder) / "model", lora=lora)
    rates = [line["tokens_per_second"] for line in done.history if "tokens_per_second" in line]
    tokens_per_second = statistics.median(rates[1:] or rates)
    return {
        "objective": case.name,
        "shape": case.shape,
        "parameters": config_parameters,
        "adapter_parameters": adapter,
        "rows": rows,
        "row_length": row_length,
        "packing": work.real_tokens / (BATCHES * rows * row_length),
        "mean_visible_keys": work.visible_keys / work.real_tokens,
        "scored_share": work.scored / work.real_tokens,
        "forward_without_gradient_share": work.real_tokens_without_gradient / work.real_tokens,
        "real_tokens_per_second": tokens_per_second,
        "flops_per_real_token": per_token,
        "formula": LORA_FORMULA if lora else FORMULA,
        "share_of_matmul_rate": per_token * tokens_per_second / matmul_rate,
    }


def throughput_cases(teacher: str, store: Path, *, device: str, rank: int, shape: str) -> list[Case]:
    """All that is measured. References of the store are the data of the first two, and of those at `shape`."""

    def network(role: RoleName, weights: str | Path = teacher) -> Network:
        """The teacher, or other weights with its tokenizer, in this role."""
        found = load_network(teacher, dtype="float32", device=device if weights == teacher else "cpu")
        mask = None if role == "autoregressive" else found.role.mask_token_id
        spec = replace(
            found.role,
            name=role,
            mask_token_id=mask,
            right_shift_logits=found.role.right_shift_logits and mask is not None,
            block_size=BLOCK,
        )
        module = found.module if weights == teacher else load_network(weights, dtype="float32", device=device).module
        return Network(module, spec, found.tokenizer, name=str(weights))

    @cache
    def stored() -> tuple[Any, Examples]:
        table, references = read_table(store, load_network(teacher, dtype="float32", device=device))
        if references is None:
            raise FewstepError(f"the trajectories in {store} hold no reference answers to train on")
        return table, references

    def of_shape(role: RoleName) -> Network:
        with tempfile.TemporaryDirectory() as folder:
            write_random(shape, Path(folder) / shape)
            return network(role, Path(folder) / shape)

    def causal(make: Callable[[RoleName], Network]) -> Made:
        one = make("autoregressive")
        return one, CausalObjective(one.role, stored()[1], one.eos_token_id), None

    def diffusion(make: Callable[[RoleName], Network]) -> Made:
        one = make("bidirectional")
        objective = MaskedDiffusionObjective(
            one.role,
            stored()[1],
            one.eos_token_id,
            corruption=Corruption(leftward=0.8, frontier=0.5),
            canvases=3 if one.role.context_attention == "causal" else 1,
        )
        return one, objective, None

    def cdlm(lora: LoRASettings | None, **settings: Any) -> Made:
        one = network("block_causal")
        table, references = stored()
        objective = CDLMObjective(
            one.role, table, one.eos_token_id, references=references, settings=CDLMSettings(denoising=0.1, **settings)
        )
        return one, objective, lora

    return [
        Case(objective="causal", make=lambda: causal(network)),
        Case(objective="teacher (masked diffusion)", make=lambda: diffusion(network)),
        Case(objective="cdlm, full weights", make=lambda: cdlm(None)),
        Case(objective="cdlm, LoRA", make=lambda: cdlm(LoRASettings(rank=rank, alpha=rank))),
        Case(objective="cdlm, full weights, without consistency", make=lambda: cdlm(None, consistency=0.0)),
        Case(objective="causal", make=lambda: causal(of_shape), shape=shape),
        Case(objective="teacher (masked diffusion)", make=lambda: diffusion(of_shape), shape=shape),
    ]


def main(
    results_folder: Annotated[Path, typer.Option("--results", help="folder for figures")] = Path("results"),
    teacher: str = "gsm-teacher",
    store: Path = Path("runs/gsm/trajectories"),
    device: str = "auto",
    steps: int = 120,
    rows: Annotated[
        int, typer.Option(help="packed rows of a step; the causal objective and the teacher's train on as many")
    ] = 48,
    row_length: int = 2048,
    rank: int = 32,
    shape: Annotated[str, typer.Option(help="a larger network, trained with random weights as well")] = "smollm2-135m",
    shape_rows: Annotated[int, typer.Option(help="packed rows of its steps")] = 16,
    only: Annotated[list[str] | None, typer.Option(help="repeatable; the objectives whose names begin so")] = None,
    matmul_size: int = 8192,
) -> None:
    """Training throughput on real tokens as a share of the device's matrix rate: `throughput.json`."""
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    rate = matmul_flops_per_second(matmul_size, place, dtype)
    told: dict[str, Any] = {
        "command": this_command(),
        "machine": {**describe_machine(), "device": str(place)},
        "matmul": f"{matmul_size}^3 {str(dtype).removeprefix('torch.')}",
        "matmul_flops_per_second": rate,
        "formula": FORMULA,
        "rows": [],
        "failed": [],
    }
    for case in throughput_cases(teacher, store, device=str(place), rank=rank, shape=shape):
        if only and not case.name.startswith(tuple(only)):
            continue
        torch.compiler.reset()  # each has its graphs to itself, so that none runs into the limit of recompilations
        try:
            row = measure_training(
                case,
                steps=steps,
                rows=rows if case.shape is None else shape_rows,
                row_length=row_length,
                matmul_rate=rate,
            )
        except (FewstepError, RuntimeError) as error:  # out of memory among them: the others are worth having
            told["failed"].append({"objective": case.name, "error": str(error)[:500]})
            print(f"{case.name} failed: {error}", flush=True)
        else:
            told["rows"].append(row)
            print(
                f"{case.name}: {row['real_tokens_per_second'] / 1e6:.3f} M real tokens/s, "
                f"{row['share_of_matmul_rate']:.1%} of {rate / 1e12:.0f} TFLOP/s",
                flush=True,
            )
        write_json_whole(results_folder / "throughput.json", told)


if __name__ == "__main__":
    typer.run(main)
