"""The bundled models, from data to student.

    python recipes/gsm.py STAGE                                   on a CPU or one GPU
    torchrun --nproc-per-node 2 recipes/gsm.py STAGE              on two

Stages, in order: `data` (rendered problems as token tables), `ar` (a causal model from scratch), `teacher` (the causal
model adapted to masked diffusion), `trajectories` (the teacher's decoding), `student` (CDLM), `own-states` (that
student's decoding, for a second round with `student --own`), `bundle`. Each writes a folder under --runs;
what is there is left alone, and training that was interrupted resumes.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from stages import (
    BLOCK,
    BlocksLate,
    BlocksVisited,
    Canvases,
    Frontier,
    Late,
    Leftward,
    NumGSM8K,
    NumSymbolic,
    Own,
    Runs,
    Solved,
    Visited,
    accuracy,
    change_json,
    device,
    digits,
    fresh_network,
    gpu_settings,
    is_there,
    worker,
)
from word_problems import GSM8K, MAX_ANSWER, keep_solved, load_examples, make_tables, prompt_rows

from fewstep.decode.decoder import threshold_rule
from fewstep.engine.language_model import LanguageModel
from fewstep.models.load import load_network, save_network
from fewstep.models.names import BUNDLED
from fewstep.models.network import Network
from fewstep.models.roles import ContextAttention, Role
from fewstep.tasks.gsm_symbolic import write_problem_files
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.collect import collect, decode_with, distribution_of, teacher_of
from fewstep.train.corruption import BlockCorruption, Corruption
from fewstep.train.lora import LoRASettings
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective
from fewstep.train.relabel import labelled, labelling_for, of_student
from fewstep.train.trainer import train
from fewstep.train.trajectories import read_table
from fewstep.train.trajectory_table import join

app = typer.Typer(pretty_exceptions_enable=False)
RUNS = Path("runs/gsm")


# --- data ---


@app.command()
def data(runs: Runs = RUNS, examples: int = 3_000_000, workers: int = 32, seed: int = 1) -> None:
    """Render and tokenize training problems and arithmetic drills."""
    make_tables(runs / "data", BUNDLED / "gsm-tokenizer", examples, seed=seed, workers=workers)


@app.command("problems")
def problem_files(folder: Path = BUNDLED / "gsm-symbolic") -> None:
    """Make the bundled problem files again: the same bytes with the same reasoning-gym."""
    write_problem_files(folder)


# --- causal model and teacher ---


@app.command()
def ar(
    runs: Runs = RUNS,
    steps: int = 3000,
    rows: int = 48,
    row_length: int = 2048,
    learning_rate: float = 2e-3,
    dev: int = 500,
) -> None:
    """Train the causal model from scratch."""
    if is_there(runs / "gsm-ar" / "config.json"):
        return
    network = fresh_network("gsm-ar", device())
    objective = CausalObjective(network.role, load_examples(runs / "data"), network.eos_token_id)
    settings = gpu_settings(
        max_steps=steps,
        rows=rows,
        row_length=row_length,
        learning_rate=learning_rate,
        warmup_steps=200,
        log_every=100,
        evaluate_every=steps,
    )
    train(network, objective, settings, runs / "gsm-ar", evaluate=accuracy(dev))


@app.command()
def teacher(
    runs: Runs = RUNS,
    source: str = "gsm-ar",
    name: str = "gsm-teacher",
    context_attention: ContextAttention = "causal",
    steps: int = 3000,
    rows: int = 48,
    row_length: int = 2048,
    learning_rate: float = 1.5e-3,
    shift: bool = True,
    leftward: Leftward = 0.8,
    frontier: Frontier = 0.25,
    late: Late = 0.45,
    visited: Visited = 0.0,
    canvases: Canvases = 3,
    seed: int = 0,
    dev: int = 200,
    threshold: Annotated[
        float | None, typer.Option(help="of the decoding that `dev` problems are answered with")
    ] = None,
    gaps: Annotated[int | None, typer.Option(help="with that threshold")] = None,
) -> None:
    """Adapt a causal model (or continue a teacher) to masked diffusion."""
    if is_there(runs / name / "config.json"):
        return
    network = load_network(runs / source, dtype="float32", device=device())
    given = network.role.mask_token_id
    role = Role(
        name="bidirectional",
        block_size=BLOCK,
        mask_token_id=network.tokenizer.mask_token_id if given is None else given,
        context_attention=context_attention,
        right_shift_logits=shift,
    )
    network = Network(network.module, role, network.tokenizer, name=name)
    objective = MaskedDiffusionObjective(
        role,
        load_examples(runs / "data"),
        network.eos_token_id,
        corruption=Corruption(
            leftward=leftward,
            frontier=frontier,
            late=late,
            late_tokens=digits(network.tokenizer) if late else (),
            visited=visited,
        ),
        canvases=canvases,
    )
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(100, steps),
        log_every=100, evaluate_every=steps, seed=seed,
    )  # fmt: skip
    train(network, objective, settings, runs / name, evaluate=accuracy(dev, threshold=threshold, gaps=gaps))


# --- trajectories and student ---


@app.command()
def trajectories(
    runs: Runs = RUNS,
    source: str = "gsm-teacher",
    name: str = "trajectories",
    gsm8k: GSM8K = None,
    prompts: NumSymbolic = 8192,
    gsm8k_prompts: NumGSM8K = 0,
    batch_size: int = 1024,
    threshold: Annotated[float | None, typer.Option(help="by default one token a pass")] = None,
    gaps: Annotated[int | None, typer.Option(help="with a threshold")] = None,
    solved: Solved = True,
    seed: int = 7,
) -> None:
    """Decode training problems with the teacher."""
    network = load_network(runs / source, device=device())
    rows, answers = prompt_rows(network.tokenizer, prompts, seed, gsm8k=gsm8k, gsm8k_count=gsm8k_prompts)
    distribution = distribution_of(network)
    decoder = LanguageModel(network).decoder(
        max_new_tokens=MAX_ANSWER, block_size=BLOCK, threshold=threshold, gaps=gaps
    )
    report = collect(
        decode_with(network, decoder, max_new_tokens=MAX_ANSWER, batch_size=batch_size, distribution=distribution),
        rows,
        runs / name,
        teacher=teacher_of(network),
        settings={
            "max_new_tokens": MAX_ANSWER,
            **threshold_rule(decoder),
            "early_stop": True,
            "keep": "solved" if solved else "all",
        },
        distribution=distribution,
        seed=seed,
        shard_size=batch_size,
        worker=worker(),
        keep=keep_solved(network.tokenizer, answers, solved=solved),
    )
    print(report, flush=True)


@app.command()
def own_states(
    runs: Runs = RUNS,
    source: str = "gsm-teacher",
    student: str = "gsm-student",
    name: str = "own-states",
    prompts: int = 16384,
    threshold: float = 0.9,
    batch_size: int = 1024,
    seed: int = 8,
) -> None:
    """Let a student decode training problems and the teacher label the states that it visits."""
    network, judge = (load_network(runs / folder, device=device()) for folder in (student, source))
    rows, _ = prompt_rows(network.tokenizer, prompts, seed)
    distribution = distribution_of(judge)
    decoder = LanguageModel(network).decoder(max_new_tokens=MAX_ANSWER, threshold=threshold)
    decoding = decode_with(
        network, decoder, max_new_tokens=MAX_ANSWER, batch_size=batch_size, distribution=distribution
    )
    labelling = labelling_for(judge, network, distribution, MAX_ANSWER)
    report = collect(
        labelled(decoding, judge, labelling),
        rows,
        runs / name,
        teacher=teacher_of(judge),
        settings={
            **threshold_rule(decoder),
            "teacher_canvas_length": labelling.canvas_length,
            **of_student(network),
        },
        stop_token_ids=network.stop_token_ids,
        distribution=distribution,
        seed=seed,
        shard_size=batch_size,
        worker=worker(),
    )
    print(report, flush=True)


@app.command()
def student(
    runs: Runs = RUNS,
    source: str = "gsm-teacher",
    name: str = "gsm-student",
    store: str = "trajectories",
    own: Own = None,
    examples: Annotated[
        int, typer.Option(help="references: so many rows of the data, or 0 for those of the store")
    ] = 0,
    steps: int = 400,
    rows: int = 96,
    row_length: int = 2048,
    learning_rate: float = 1.5e-3,
    rank: int = 32,
    distillation: float = 1.0,
    denoising: float = 0.1,
    consistency: float = 0.5,
    late: BlocksLate = 0.0,
    visited: BlocksVisited = 0.0,
    seed: int = 0,
    dev: int = 500,
) -> None:
    """Post-train the teacher into a block-causal student with the three CDLM losses."""
    if is_there(runs / name / "config.json"):
        return
    base = load_network(runs / source, dtype="float32", device=device())
    network = base.with_role(replace(base.role.playing("block_causal"), block_size=BLOCK))
    table, references = read_table(runs / store, teacher=base)
    if own:
        table = join(table, read_table(runs / own, teacher=base)[0])
    if examples:
        references = load_examples(runs / "data", examples)
    objective = CDLMObjective(
        network.role,
        table,
        network.eos_token_id,
        references=references,
        settings=CDLMSettings(distillation=distillation, denoising=denoising, consistency=consistency),
        corruption=BlockCorruption(late=late, late_tokens=digits(network.tokenizer) if late else (), visited=visited),
    )
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(30, steps),
        log_every=50, evaluate_every=steps, seed=seed,
    )  # fmt: skip
    lora = LoRASettings(rank=rank, alpha=rank) if rank else None
    train(network, objective, settings, runs / name, lora=lora, evaluate=accuracy(dev))


@app.command()
def bundle(
    source: Path,
    name: str,
    base: Annotated[str, typer.Option(help="the bundled model under an adapter")] = "gsm-teacher",
    threshold: Annotated[float | None, typer.Option(help="a student's, chosen on development problems")] = None,
    gaps: Annotated[int | None, typer.Option(help="a student's, chosen likewise")] = None,
    block_size: Annotated[int | None, typer.Option(help="a teacher's in decoding, chosen likewise")] = None,
) -> None:
    """Put a finished model among those that ship with the package: one bfloat16 file, or the adapter."""
    target = BUNDLED / name
    target.mkdir(exist_ok=True)
    if (source / "adapter_config.json").exists():
        for path in source.iterdir():
            if path.is_file() and path.name not in ("README.md", "report.json"):
                shutil.copy(path, target / path.name)
        change_json(target / "adapter_config.json", base_model_name_or_path=f"../{base}")
    else:
        save_network(load_network(source, dtype="bfloat16", device="cpu"), target)
    chosen = {"threshold": threshold, "gaps": gaps, "block_size": block_size}
    change_json(target / "config.json", **{key: value for key, value in chosen.items() if value is not None})


if __name__ == "__main__":
    app()
