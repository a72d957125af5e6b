"""A causal model that drafts its own text in blocks and verifies it: a gated adapter on the frozen model.

    python recipes/draft.py STAGE                                   on a CPU or one GPU
    torchrun --nproc-per-node 4 recipes/draft.py STAGE              on four

Stages, in order: `questions` (training problems), `texts` (what the model itself answers, greedily), `train` (the
adapter), `measure` (texts identical to the model's own, tokens per pass) and `bundle`. Each writes under --runs; what
is there is left alone, and training that was interrupted resumes.

Drafts begin where others failed, so a second round pays: `texts --model runs/draft/first --name visited` tells where
the first adapter's drafts began, and `train --begin first --texts visited` goes on from there.

Any causal model can be the base: `--base runs/smollm/ar --mask-token-id 0 --runs runs/smollm-draft`.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from run_recipe import run_recipe
from safetensors.torch import load_file, save_file
from stages import Runs, device, gpu_settings, is_there, worker
from word_problems import MAX_ANSWER, MAX_PROMPT

from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import decode
from fewstep.decode.requests import Request
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.errors import FewstepError
from fewstep.files import read_rows, write_json_whole, write_rows_whole, write_whole
from fewstep.models.gated import start_from
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.text import encode_prompt
from fewstep.tasks.gsm_symbolic import problems, training_rows
from fewstep.train.draft import DraftObjective, DraftSettings
from fewstep.train.examples import Examples
from fewstep.train.lora import LoRASettings, add_gated_lora
from fewstep.train.trainer import Evaluate, train

app = typer.Typer(pretty_exceptions_enable=False)
Base = Annotated[str, typer.Option(help="the causal model: a bundled name or a folder")]

RUNS = Path("runs/draft")
ROWS_PER_PART = 8192


@app.command()
def questions(runs: Runs = RUNS, count: int = 300_000, seed: int = 15) -> None:
    """Training problems whose answers the model will write, one a line."""
    file = runs / "questions.jsonl"
    if not is_there(file):
        asked = (row["prompt"] for row in training_rows(seed * 1_000_000) if row["kind"] == "cot")
        write_rows_whole(file, ({"prompt": prompt} for prompt in islice(asked, count)))


@app.command()
def texts(
    runs: Runs = RUNS,
    model: Annotated[str, typer.Option(help="the causal model, or an adapter on it, which is faster")] = "gsm-ar",
    name: Annotated[str, typer.Option(help="folder of the texts under --runs")] = "texts",
    batch_size: int = 2048,
    most: Annotated[int | None, typer.Option(help="parts of the questions; by default all")] = None,
) -> None:
    """The model's own greedy answers, as token tables; those that do not end within the limit are left out.

    With an adapter the tables also say where its drafts began.
    """
    network = load_network(model, device=device())
    adapter = network.adapter
    decoder: Decoder = Autoregressive(role=network.role)
    if adapter is not None:
        decoder = SelfSpeculative(role=network.role, adapter=adapter, window=adapter.block_size - 1)
    asked = [row["prompt"] for row in read_rows(runs / "questions.jsonl", required=("prompt",))]
    (runs / name).mkdir(parents=True, exist_ok=True)
    rank, world = worker()
    for part in range(-(-len(asked) // ROWS_PER_PART))[:most][rank::world]:
        path = runs / name / f"part-{part:04d}.safetensors"
        if is_there(path):
            continue
        some = asked[part * ROWS_PER_PART : (part + 1) * ROWS_PER_PART]
        prompts = [ids for ids in (encode_prompt(network.tokenizer, one) for one in some) if len(ids) <= MAX_PROMPT]
        requests = [Request(prompt_ids=ids, max_new_tokens=MAX_ANSWER) for ids in prompts]
        outputs = decode(network, requests, decoder, batch_size=batch_size)
        ended = [(ids, o) for ids, o in zip(prompts, outputs, strict=True) if o.finish_reason == "stop"]
        table = Examples.from_ids([ids for ids, _ in ended], [o.token_ids for _, o in ended]).tensors()
        if adapter is not None:
            # Drafts are made in a request's first, third, fifth ... pass, which finalises the token they begin at.
            table = {**table, "visited": torch.cat([o.step_G[: o.num_tokens] % 2 == 1 for _, o in ended])}
        with write_whole(path) as temporary:
            save_file(table, temporary)
        passes = sum(o.num_forwards for _, o in ended)
        tokens = sum(o.num_tokens for _, o in ended)
        print(f"{path}: {len(ended)} of {len(prompts)} answers end, {tokens / passes:.2f} tokens per pass", flush=True)


def own_texts(folder: Path) -> tuple[Examples, torch.Tensor | None]:
    """All parts of a folder as one table, and where drafts began if it says so."""
    parts = [load_file(file) for file in sorted(folder.glob("part-*.safetensors"))]
    if not parts:
        raise FewstepError(f"{folder} holds no texts; make them with the stage `texts`")
    visited = torch.cat([part.pop("visited") for part in parts]) if "visited" in parts[0] else None
    return Examples.joined([Examples(**part, origins=()) for part in parts]), visited


@app.command("train")
def train_adapter(
    runs: Runs = RUNS,
    base: Base = "gsm-ar",
    name: str = "gsm-draft",
    texts: Annotated[str, typer.Option(help="folder of texts under --runs")] = "texts",
    begin: Annotated[str | None, typer.Option(help="folder of an adapter under --runs to train on")] = None,
    steps: int = 6000,
    rows: int = 48,
    row_length: int = 2048,
    learning_rate: float = 2e-3,
    rank: int = 32,
    mask_token_id: int | None = None,
    block_size: int = 32,
    starts: int = 16,
    hard: float = 1.0,
    divergence: float = 0.0,
    length: float = 0.0,
    reach: float = 0.9,
    warm: Annotated[str | None, typer.Option(help="begin with what this model has learnt beyond the base")] = None,
    seed: int = 0,
    dev: int = 200,
    evaluate_every: int = 1000,
    save_every: int = 1000,
) -> None:
    """Train the adapter to write in one pass what the model writes token by token."""
    if is_there(runs / name / "config.json"):
        return
    network = load_network(base if begin is None else runs / begin, dtype="float32", device=device())
    if begin is None:
        network = add_gated_lora(
            network, LoRASettings(rank=rank, alpha=rank), mask_token_id=mask_token_id, block_size=block_size
        )
    network.name = base
    if warm is not None:
        other = load_network(warm, dtype="float32", device=device())
        assert network.adapter is not None
        assert other.role.mask_token_id is not None
        embedding = other.module.get_input_embeddings().weight[other.role.mask_token_id]
        start_from(network.adapter, other.module, embedding.detach())
    examples, visited = own_texts(runs / texts)
    objective = DraftObjective(
        network,
        examples,
        visited=visited,
        settings=DraftSettings(
            block_size=block_size, starts=starts, hard=hard, divergence=divergence, length=length, reach=reach
        ),
    )
    settings = gpu_settings(
        max_steps=steps, rows=rows, row_length=row_length, learning_rate=learning_rate, warmup_steps=min(100, steps),
        log_every=100, evaluate_every=min(steps, evaluate_every), save_every=save_every, seed=seed, weight_decay=0.0,
    )  # fmt: skip
    train(network, objective, settings, runs / name, evaluate=acceptance(dev))


def acceptance(count: int) -> Evaluate:
    """An `evaluate` callable: tokens per pass on the first development problems, every pass counted."""
    asked = problems("dev", count)

    def evaluate_network(network: Network, step: int) -> dict[str, float]:
        assert network.adapter is not None
        requests = [
            Request(prompt_ids=encode_prompt(network.tokenizer, problem.question), max_new_tokens=MAX_ANSWER)
            for problem in asked
        ]
        decoder = SelfSpeculative(role=network.role, adapter=network.adapter, window=network.adapter.block_size - 1)
        outputs = decode(network, requests, decoder, batch_size=count)
        return {"tokens_per_forward": sum(o.num_tokens for o in outputs) / sum(o.num_forwards for o in outputs)}

    return evaluate_network


@app.command()
def measure(
    data: Annotated[Path, typer.Argument(help="problems: id, question, answer")],
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = RUNS / "measure.json",
    model: Annotated[str, typer.Option(help="the adapter: a bundled name or a folder")] = "gsm-draft",
    window: Annotated[list[int], typer.Option(help="guesses of a cycle")] = [15, 31],  # noqa: B006
    dtype: str = "float32",
    batch_size: int = 1000,
    limit: Annotated[int | None, typer.Option(help="the first problems only")] = None,
) -> None:
    """Whether texts are the base's own, and how many tokens a pass gives, every pass counted."""
    network = load_network(model, dtype=dtype, device=device())
    asked = [row["question"] for row in islice(read_rows(data, required=("question",)), limit)]
    requests = [
        Request(prompt_ids=encode_prompt(network.tokenizer, question), max_new_tokens=MAX_ANSWER) for question in asked
    ]
    own = decode(network, requests, Autoregressive(role=network.role), batch_size=batch_size)
    figures: list[dict[str, float]] = []
    for count in window:
        assert network.adapter is not None
        decoder = SelfSpeculative(role=network.role, adapter=network.adapter, window=count)
        outputs = decode(network, requests, decoder, batch_size=batch_size)
        same = [ours.token_ids == theirs.token_ids for ours, theirs in zip(outputs, own, strict=True)]
        figures.append({
            "window": count,
            "n": len(same),
            "identical": sum(same) / len(same),
            "tokens_per_forward": sum(o.num_tokens for o in outputs) / sum(o.num_forwards for o in outputs),
            "num_tokens_mean": sum(o.num_tokens for o in outputs) / len(outputs),
        })  # fmt: skip
        print(figures[-1], flush=True)
        write_json_whole(output, {"model": model, "dtype": dtype, "device": str(network.device), "figures": figures})


@app.command()
def bundle(runs: Runs = RUNS, source: str = "gsm-draft", name: str = "gsm-draft") -> None:
    """Put the finished adapter among the models that ship with the package."""
    import gsm  # needs pyarrow

    gsm.bundle(runs / source, name, base="gsm-ar")


if __name__ == "__main__":
    run_recipe(app)
