"""A causal model that drafts its own text in blocks and verifies it: a gated adapter on the frozen model.

    python recipes/draft.py STAGE                                   on a CPU or one GPU
    torchrun --nproc-per-node 4 recipes/draft.py STAGE              on four

Stages, in order: `texts` (what the model itself answers, greedily), `train` (the adapter) and `measure` (texts that
are identical to the model's own, tokens per pass). Each writes under --runs; what is there is left alone, and training
that was interrupted resumes. `gsm.py bundle runs/draft/gsm-draft gsm-draft --base gsm-ar` makes the bundled `gsm-draft`
of the result.

Drafts begin where others failed, so a second round pays: `texts --model runs/draft/first --name visited` tells where
the first adapter's drafts began, and `train --begin first --store visited` goes on from there.

Any causal model can be the base, and any prompts its texts': `texts --model runs/smollm/smollm2 --data prompts.jsonl
--unfinished --runs runs/smollm-chat`, then `train --base runs/smollm/smollm2 --dev-data held.jsonl` with the same
--runs. A tokenizer without a mask token needs `--mask-token-id`, an id that no text holds.
"""

from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe
from stages import Stage, Training, accuracy, device, worker
from word_problems import MAX_ANSWER, prompt_rows

from fewstep.cli.settings_commands import app_of
from fewstep.decode.autoregressive import Autoregressive
from fewstep.decode.decoder import Decoder
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.engine.language_model import LanguageModel, load
from fewstep.json_files import read_rows
from fewstep.measure.agreement import margins, same_answers
from fewstep.measure.timing import write_figures
from fewstep.models.gated import start_from
from fewstep.models.load import load_network
from fewstep.models.network import Network
from fewstep.train.causal_records import collect_texts, read_texts
from fewstep.train.draft import DraftObjective, DraftSettings
from fewstep.train.examples import prompts_in
from fewstep.train.lora import LoRASettings, add_gated_lora
from fewstep.train.records import PromptRow
from fewstep.train.samples import Samples
from fewstep.train.trainer import Evaluate, train
from fewstep.values import Count

RUNS = Path("runs/draft")


@dataclass(frozen=True, kw_only=True)
class Texts(Stage):
    """The model's own greedy answers to training problems, or to any prompts.

    With an adapter the texts also say where its drafts began.
    """

    model: Annotated[str, "The causal model, or an adapter on it, which is faster."] = "gsm-ar"
    name: Annotated[str, "Folder of the texts under --runs."] = "texts"
    data: Annotated[Path | None, "Rows with prompt or messages, instead of GSM-Symbolic's problems."] = None
    prompts: Annotated[Count, "How many of them at most."] = 400_000
    unfinished: Annotated[bool, "Keep texts that do not end within the limit, too."] = False
    batch_size: Count = 2048
    shard_size: Count = 8192
    seed: int = 15

    def run(self) -> None:
        network = load_network(self.model, device=device())
        decoder: Decoder = Autoregressive(role=network.role)
        if network.adapter is not None:
            decoder = SelfSpeculative(role=network.role, adapter=network.adapter, window=network.adapter.block_size - 1)
        report = collect_texts(
            network, self.rows(network), self.runs / self.name, decoder,
            settings={
                "decoder": decoder.name, "max_new_tokens": MAX_ANSWER, "keep": "all" if self.unfinished else "ended",
            },
            max_new_tokens=MAX_ANSWER, batch_size=self.batch_size, shard_size=self.shard_size, seed=self.seed,
            keep=lambda row, output: self.unfinished or output.finish_reason == "stop", worker=worker(),
        )  # fmt: skip
        print(report, flush=True)

    def rows(self, network: Network) -> list[PromptRow]:
        """The prompts."""
        if self.data is None:
            return prompt_rows(network.tokenizer, self.prompts, self.seed)[0]
        lm = LanguageModel(network)
        asked = enumerate(prompts_in(self.data, self.prompts))
        return [PromptRow(f"{self.data.stem}-{i}", lm.encode(prompt), None) for i, prompt in asked]


@dataclass(frozen=True, kw_only=True)
class Adapter(Training):
    """Train the adapter to write in one pass what the model writes token by token."""

    base: Annotated[str, "The causal model: a bundled name or a folder."] = "gsm-ar"
    store: Annotated[str, "Folder of texts under --runs."] = "texts"
    begin: Annotated[str | None, "Folder of an adapter under --runs to train on."] = None
    warm: Annotated[str | None, "Begin with what this model has learnt beyond the base."] = None
    rank: Count = 32
    mask_token_id: int | None = None
    drafts: DraftSettings
    dev_data: Annotated[Path | None, "Rows that the result answers in place of development problems."] = None
    evaluate_every: Count = 1000
    save_every: Count = 1000

    def fit(self) -> None:
        network = self.network()
        examples, visited = read_texts(self.runs / self.store, network)
        objective = DraftObjective(network, examples, visited=visited, settings=self.drafts)
        settings = self.settings(
            evaluate_every=min(self.steps, self.evaluate_every), save_every=self.save_every, weight_decay=0.0
        )
        assert network.adapter is not None
        drafting: dict[str, Any] = {
            "decoder": "self-speculative",
            "cycle": "two-pass",
            "window": self.drafts.block_size - 1,
        }
        evaluate: Evaluate = accuracy(self.dev, **drafting)
        if self.dev_data is not None:
            prompts = prompts_in(self.dev_data, self.dev)
            evaluate = Samples(prompts, num_shown=1, batch_size=self.dev, max_new_tokens=MAX_ANSWER, **drafting)
        train(network, objective, settings, self.output, evaluate=evaluate)

    def network(self) -> Network:
        """The base with a new adapter, or that of --begin."""
        if self.begin is None:
            network = add_gated_lora(
                load_network(self.base, dtype="float32", device=device()),
                LoRASettings(rank=self.rank, alpha=self.rank),
                mask_token_id=self.mask_token_id,
                block_size=self.drafts.block_size,
            )
        else:
            network = load_network(self.runs / self.begin, dtype="float32", device=device())
            assert network.adapter is not None
            network.adapter.block_size = self.drafts.block_size
        network.name = self.base
        if self.warm is not None:
            other = load_network(self.warm, dtype="float32", device=device())
            assert network.adapter is not None
            assert other.role.mask_token_id is not None
            embedding = other.module.get_input_embeddings().weight[other.role.mask_token_id]
            start_from(network.adapter, other.module, embedding.detach())
        return network


app = app_of({
    "texts": Texts(runs=RUNS),
    "train": Adapter(
        runs=RUNS, name="gsm-draft", drafts=DraftSettings(), steps=6000, rows=48, learning_rate=2e-3,
        warmup_steps=100, log_every=100, dev=200,
    ),
})  # fmt: skip


@app.command()
def measure(
    data: Annotated[Path, typer.Argument(help="problems: id, question, answer")],
    output: Annotated[Path, typer.Option(help="JSON file for the figures")] = RUNS / "measure.json",
    model: Annotated[str, typer.Option(help="the adapter: a bundled name or a folder")] = "gsm-draft",
    window: Annotated[list[int], typer.Option(help="guesses of a draft")] = [15, 31],  # noqa: B006
    branches: Annotated[list[int], typer.Option(help="of fused passes; 0: two passes a cycle")] = [0, 2, 4],  # noqa: B006
    dtype: str = "float32",
    batch_size: int = 1000,
    control: Annotated[int, typer.Option(help="another batch size, at which the base is compared with itself")] = 250,
    limit: Annotated[int | None, typer.Option(help="the first problems only")] = None,
) -> None:
    """Whether texts are the base's own, by what margin of log-probability they part if not, and how many tokens a pass
    gives, every pass counted.
    """
    lm = load(model, dtype=dtype, device=device())
    questions = [row["question"] for row in islice(read_rows(data, required=("question",)), limit)]
    asked: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": MAX_ANSWER}
    own = lm.generate(questions, decoder="autoregressive", **asked)
    again = lm.generate(questions, decoder="autoregressive", **{**asked, "batch_size": control})
    of_control = {"batch_size": control, **same_answers(again, own), "margins": margins(lm, questions, again, own)}
    figures: list[dict[str, Any]] = []
    for count, wide in product(window, branches):
        cycle: dict[str, Any] = {"cycle": "fused", "branches": wide} if wide else {"cycle": "two-pass"}
        outputs = lm.generate(questions, decoder="self-speculative", window=count, **cycle, **asked)
        found = same_answers(outputs, own)
        figures.append({
            "window": count, "branches": wide, "n": found["n"], "identical": found["same"] / found["n"],
            "tokens_per_forward": found["tokens_per_forward"],
            "num_tokens_mean": sum(one.num_tokens for one in outputs) / len(outputs),
            "margins": margins(lm, questions, outputs, own),
        })  # fmt: skip
        print(figures[-1], flush=True)
        told = {"model": model, "dtype": dtype, "device": str(lm.network.device), "control": of_control}
        write_figures(output, {**told, "figures": figures})


if __name__ == "__main__":
    run_recipe(app)
