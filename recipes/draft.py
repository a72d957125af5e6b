"""A causal model that drafts its own text in blocks and verifies it: a gated adapter on the frozen model.

    python recipes/draft.py STAGE                                   on a CPU or one GPU
    torchrun --nproc-per-node 4 recipes/draft.py STAGE              on four

Stages, in order: `texts` (what the model itself answers, greedily), `train` (the adapter), `measure` (texts identical
to the model's own, tokens per pass) and `bundle`. Each writes under --runs; what is there is left alone, and training
that was interrupted resumes.

Drafts begin where others failed, so a second round pays: `texts --model runs/draft/first --name visited` tells where
the first adapter's drafts began, and `train --begin first --store visited` goes on from there.

Any causal model can be the base: `--base runs/smollm/ar --mask-token-id 0 --runs runs/smollm-draft`.
"""

from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe
from stages import Runs, device, gpu_settings, is_there, worker
from word_problems import MAX_ANSWER, prompt_rows

from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import decode
from fewstep.decode.requests import Request
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.json_files import read_rows, write_json_whole
from fewstep.measure.timing import this_command
from fewstep.models.gated import start_from
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.models.text import encode_prompt
from fewstep.tasks.gsm_symbolic import problems
from fewstep.train.causal_records import collect_texts, read_texts
from fewstep.train.draft import DraftObjective, DraftSettings
from fewstep.train.lora import LoRASettings, add_gated_lora
from fewstep.train.trainer import Evaluate, train

app = typer.Typer(pretty_exceptions_enable=False)
Base = Annotated[str, typer.Option(help="the causal model: a bundled name or a folder")]

RUNS = Path("runs/draft")


@app.command()
def texts(
    runs: Runs = RUNS,
    model: Annotated[str, typer.Option(help="the causal model, or an adapter on it, which is faster")] = "gsm-ar",
    name: Annotated[str, typer.Option(help="folder of the texts under --runs")] = "texts",
    prompts: Annotated[int, typer.Option(help="of GSM-Symbolic")] = 400_000,
    batch_size: int = 2048,
    shard_size: int = 8192,
    seed: int = 15,
) -> None:
    """The model's own greedy answers to training problems; those that do not end within the limit are left out.

    With an adapter the texts also say where its drafts began.
    """
    network = load_network(model, device=device())
    decoder: Decoder = Autoregressive(role=network.role)
    if network.adapter is not None:
        decoder = SelfSpeculative(role=network.role, adapter=network.adapter, window=network.adapter.block_size - 1)
    rows, _ = prompt_rows(network.tokenizer, prompts, seed)
    report = collect_texts(
        network,
        rows,
        runs / name,
        decoder,
        max_new_tokens=MAX_ANSWER,
        batch_size=batch_size,
        settings={"decoder": decoder.name, "max_new_tokens": MAX_ANSWER, "keep": "ended"},
        keep=lambda row, output: output.finish_reason == "stop",
        seed=seed,
        shard_size=shard_size,
        worker=worker(),
    )
    print(report, flush=True)


@app.command("train")
def train_adapter(
    runs: Runs = RUNS,
    base: Base = "gsm-ar",
    name: str = "gsm-draft",
    store: Annotated[str, typer.Option(help="folder of texts under --runs")] = "texts",
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
    length: float = 1.0,
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
    examples, visited = read_texts(runs / store, network)
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
        window = network.adapter.block_size - 1
        decoder = SelfSpeculative(role=network.role, adapter=network.adapter, window=window, cycle="two-pass")
        outputs = decode(network, requests, decoder, batch_size=count)
        return {"tokens_per_forward": sum(o.num_tokens for o in outputs) / sum(o.num_forwards for o in outputs)}

    return evaluate_network


@app.command()
def measure(
    data: Annotated[Path, typer.Argument(help="problems: id, question, answer")],
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = RUNS / "measure.json",
    model: Annotated[str, typer.Option(help="the adapter: a bundled name or a folder")] = "gsm-draft",
    window: Annotated[list[int], typer.Option(help="guesses of a draft")] = [15, 31],  # noqa: B006
    branches: Annotated[list[int], typer.Option(help="of fused passes; 0: two passes a cycle")] = [0, 2, 4],  # noqa: B006
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
    assert network.adapter is not None
    plain = SelfSpeculative(role=network.role, adapter=network.adapter, cycle="two-pass")
    for count, wide in product(window, branches):
        fused: dict[str, Any] = {"cycle": "fused", "branches": wide} if wide else {}
        decoder = replace(plain, window=count, **fused)
        outputs = decode(network, requests, decoder, batch_size=batch_size)
        same = [ours.token_ids == theirs.token_ids for ours, theirs in zip(outputs, own, strict=True)]
        figures.append({
            "window": count,
            "branches": wide,
            "n": len(same),
            "identical": sum(same) / len(same),
            "tokens_per_forward": sum(o.num_tokens for o in outputs) / sum(o.num_forwards for o in outputs),
            "num_tokens_mean": sum(o.num_tokens for o in outputs) / len(outputs),
        })  # fmt: skip
        print(figures[-1], flush=True)
        told = {"command": this_command(), "model": model, "dtype": dtype, "device": str(network.device)}
        write_json_whole(output, {**told, "figures": figures})


@app.command()
def bundle(runs: Runs = RUNS, source: str = "gsm-draft", name: str = "gsm-draft") -> None:
    """Put the finished adapter among the models that ship with the package."""
    import gsm  # needs pyarrow

    gsm.bundle(runs / source, name, base="gsm-ar")


if __name__ == "__main__":
    run_recipe(app)
