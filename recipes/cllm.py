"""A causal model that answers in fewer passes: consistency training on its own Jacobi trajectories (CLLM).

    python recipes/cllm.py STAGE                                   on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/cllm.py STAGE              on two

Stages, in order: `trajectories` (the model's Jacobi decoding, every state kept), `student` (CLLM, an adapter), `shares`
(how much of it to keep), `medusa` (heads on the frozen model) and `draft` (a small model), which
`recipes/compare_decoders.py` sets beside it, and `bundle`. `medusa` and `draft` train on the token tables of
`recipes/gsm.py data`. Each writes a folder under --runs; `trajectories` skips what is there, training resumes. The
bundled `gsm-cllm` is `bundle --source gsm-cllm-0.85` after the defaults of the others.

Any causal model can be the source, such as SmolLM2: `--runs runs/smollm --source runs/smollm/ar`, with `--name cllm`
for the student, as `smollm.py report` calls it, and `--data runs/smollm/data` for heads and draft. Its 49,152 tokens
leave room for fewer --rows on 80 GB: 24, and 16 for heads.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import gsm
import typer
from stages import Runs, accuracy, device, fresh_network, gpu_settings, is_there, worker
from word_problems import GSM8K, MAX_ANSWER, keep_solved, load_examples, prompt_rows

from fewstep.decode.jacobi import Jacobi
from fewstep.engine.language_model import load
from fewstep.errors import FewstepError
from fewstep.files import write_folder_whole, write_whole
from fewstep.json_files import read_json, write_json_whole
from fewstep.measure.compare import compare
from fewstep.measure.evaluate import Report, evaluate
from fewstep.measure.timing import this_command
from fewstep.models.load import load_network
from fewstep.models.medusa import MedusaHeads
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.causal_records import collect_jacobi, read_jacobi_table
from fewstep.train.cllm import CLLMObjective, CLLMSettings, Labels, Noise
from fewstep.train.lora import LoRASettings
from fewstep.train.medusa import MedusaObjective, MedusaSettings
from fewstep.train.objectives import CausalObjective
from fewstep.train.trainer import train

app = typer.Typer(pretty_exceptions_enable=False)
Source = Annotated[str, typer.Option(help="the causal model: a bundled name or a folder")]
Data = Annotated[Path, typer.Option(help="token tables of recipes/gsm.py or smollm.py")]

RUNS, DATA = Path("runs/cllm"), Path("runs/gsm/data")


@app.command()
def trajectories(
    runs: Runs = RUNS,
    source: Source = "gsm-ar",
    name: str = "jacobi",
    gsm8k: GSM8K = None,
    prompts: Annotated[int, typer.Option(help="of GSM-Symbolic")] = 32_768,
    gsm8k_prompts: Annotated[int, typer.Option(help="of GSM8K's training problems, if they are given")] = 0,
    window: int = 16,
    batch_size: int = 1024,
    shard_size: Annotated[
        int, typer.Option(help="prompts in a file; larger than a batch, so that slots refill")
    ] = 4096,
    solved: Annotated[bool, typer.Option(help="keep only what the model solves")] = True,
    most_repetition: Annotated[
        float | None, typer.Option(help="reject answers more repetitive than this share")
    ] = None,
    seed: int = 9,
) -> None:
    """Decode training problems in Jacobi windows, and keep every state."""
    network = load_network(source, device=device())
    rows, answers = prompt_rows(network.tokenizer, prompts, seed, gsm8k=gsm8k, gsm8k_count=gsm8k_prompts)
    report = collect_jacobi(
        network,
        rows,
        runs / name,
        Jacobi(role=network.role, window=window),
        max_new_tokens=MAX_ANSWER,
        batch_size=batch_size,
        settings={"decoder": Jacobi.name, "max_new_tokens": MAX_ANSWER, "keep": "solved" if solved else "all"},
        most_repetition=most_repetition,
        keep=keep_solved(network.tokenizer, answers, solved=solved),
        seed=seed,
        shard_size=shard_size,
        worker=worker(),
    )
    print(report, flush=True)


@app.command()
def student(
    runs: Runs = RUNS,
    source: Source = "gsm-ar",
    name: str = "gsm-cllm",
    store: str = "jacobi",
    steps: int = 2180,
    rows: int = 48,
    row_length: int = 2048,
    learning_rate: float = 1e-3,
    rank: Annotated[int, typer.Option(help="of the adapters; 0 trains all weights")] = 24,
    consistency: float = 1.0,
    autoregressive: float = 10.0,
    labels: Labels = "trajectory",
    noise: Noise = "uniform",
    augmented: float = 0.0,
    seed: int = 0,
    dev: int = 500,
) -> None:
    """Train the model to jump from every state of a window to its fixed point."""
    if is_there(runs / name / "config.json"):
        return
    network = load_network(source, dtype="float32", device=device())
    table, references = read_jacobi_table(runs / store, network)
    network = network.with_role(replace(network.role, jacobi_window=table.window))
    objective = CLLMObjective(
        network.role,
        table,
        network.eos_token_id,
        references=references,
        settings=CLLMSettings(
            consistency=consistency, autoregressive=autoregressive, labels=labels, noise=noise, augmented=augmented
        ),
    )
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(50, steps),
        log_every=50, evaluate_every=steps, seed=seed,
    )  # fmt: skip
    lora = LoRASettings(rank=rank, alpha=rank) if rank else None
    train(network, objective, settings, runs / name, lora=lora, evaluate=accuracy(dev))


@app.command()
def medusa(
    runs: Runs = RUNS,
    data: Data = DATA,
    source: Source = "gsm-ar",
    name: str = "medusa",
    heads: int = 3,
    steps: int = 1500,
    rows: int = 48,
    row_length: int = 2048,
    learning_rate: float = 1e-3,
    dev: int = 200,
) -> None:
    """Train heads on the frozen model, then let it answer development problems with them."""
    if is_there(runs / name / "medusa.json"):
        return
    network = load_network(source, dtype="float32", device=device())
    objective = MedusaObjective(
        network.role, load_examples(data), network.eos_token_id, settings=MedusaSettings(heads=heads)
    )
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(50, steps),
        log_every=50,
    )  # fmt: skip
    train(network, objective, settings, runs / name, heads=MedusaHeads.of(network, heads))
    if worker()[0] == 0:
        answer = accuracy(dev, decoder="medusa", heads=str(runs / name))
        print(answer(load_network(source, device=device()), steps), flush=True)


@app.command()
def draft(
    runs: Runs = RUNS,
    data: Data = DATA,
    source: Source = "gsm-ar",
    name: str = "draft",
    layers: int = 2,
    steps: int = 2000,
    rows: int = 48,
    row_length: int = 2048,
    learning_rate: float = 2e-3,
    dev: int = 200,
) -> None:
    """Train a model of the bundled shape with few layers and the source's vocabulary from scratch, to draft for it."""
    if is_there(runs / name / "config.json"):
        return
    network = fresh_network(name, device(), layers=layers, like=load_network(source, device="cpu"))
    objective = CausalObjective(network.role, load_examples(data), network.eos_token_id)
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(200, steps),
        log_every=100, evaluate_every=steps,
    )  # fmt: skip
    train(network, objective, settings, runs / name, evaluate=accuracy(dev))


@app.command()
def shares(
    runs: Runs = RUNS,
    results: Annotated[Path, typer.Option(help="folder for shares.md")] = Path("results/decoders"),
    source: Source = "gsm-ar",
    name: str = "gsm-cllm",
    share: Annotated[list[float], typer.Option()] = [0.7, 0.8, 0.85, 0.9, 1.0],  # noqa: B006
    dev: int = 1000,
    batch_size: int = 100,
) -> None:
    """Write parts of the adapter as NAME-SHARE, and what development problems say of each.

    Between the base and the fully trained weights (weight-space interpolation, arXiv 2109.01903) accuracy is traded for
    tokens per pass.
    """
    if worker()[0] != 0:
        return
    items = problems("dev", dev)

    def answers(folder: str | Path) -> Report:
        return evaluate(load(folder, device=device()), items, batch_size=batch_size)

    baseline = answers(source)
    lines = []
    for part in share:
        folder = runs / f"{name}-{part}"
        write_share(runs / name, folder, part)
        report = answers(folder)
        lines.append(f"- {report.tokens_per_forward:.2f} tokens a pass: {compare(report, baseline).sentence()}")
        print(lines[-1], flush=True)
    with write_whole(results / "shares.md") as temporary:
        temporary.write_text("\n".join([f"`{this_command()}`", "", *lines, ""]), encoding="utf-8")


def write_share(adapter: Path, target: Path, share: float) -> None:
    """A copy of an adapter's folder that adds only a share of it to the base: its alpha is what scales it."""
    if not (adapter / "adapter_config.json").exists():
        raise FewstepError(f"{adapter} is no adapter, so there is no part of it; train with a --rank above 0")
    with write_folder_whole(target, overwrite=True) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("logs", "checkpoints"))
        config = read_json(folder / "adapter_config.json")
        config["lora_alpha"] *= share
        write_json_whole(folder / "adapter_config.json", config)


@app.command()
def bundle(
    runs: Runs = RUNS,
    source: Annotated[str, typer.Option(help="folder of the adapter, or of a part of it")] = "gsm-cllm",
    name: str = "gsm-cllm",
) -> None:
    """Put the finished adapter among the models that ship with the package."""
    gsm.bundle(runs / source, name, base="gsm-ar")


if __name__ == "__main__":
    app()
