"""The subcommands of `fewstep train`: their options are the fields of settings classes, below and in `train/`."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from annotated_types import Gt, Le

from fewstep.cli.extras import EXTRAS, require
from fewstep.cli.model_names import check_model_name
from fewstep.cli.report import note, write_report
from fewstep.cli.run_settings import Built, Groups, settings_of, with_settings
from fewstep.cli.sources import Touches
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.self_speculative import SelfSpeculative
from fewstep.errors import FewstepError
from fewstep.models.embedding_denoiser import channel_warp, to_embedding_space
from fewstep.models.embedding_space import UNIFORM, RowsFrom
from fewstep.models.load import load_network
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from fewstep.models.roles import ContextAttention, RoleName
from fewstep.models.rows import split_row
from fewstep.train.cdlm import CDLMObjective, CDLMSettings
from fewstep.train.cllm import CLLMObjective, CLLMSettings
from fewstep.train.corruption import BlockCorruption, Corruption
from fewstep.train.documents import CanvasLengths
from fewstep.train.draft import DraftObjective, DraftSettings
from fewstep.train.embedding import (
    EmbeddingObjective,
    EmbeddingSettings,
    TokenCorruption,
    begin_embedding,
    warp_by_loss,
)
from fewstep.train.embedding_paths import Paths, read_paths
from fewstep.train.examples import Examples, encode_rows, numbered_training_rows
from fewstep.train.lora import LoRASettings, add_gated_lora
from fewstep.train.medusa import MedusaObjective, MedusaSettings
from fewstep.train.monitor import CollapseLimits, CollapseMonitor, DiversityLimits
from fewstep.train.objectives import CausalObjective, MaskedDiffusionObjective, Objective
from fewstep.train.output import SAMPLES, check_output
from fewstep.train.samples import Samples
from fewstep.train.settings import TrainSettings
from fewstep.values import Count, Weight, check_fields

if TYPE_CHECKING:
    from fewstep.train.trainer import TrainResult

app = typer.Typer(
    help="Trains a network. Settings are options, or keys of --config run.yaml, which options override. On several "
    "GPUs: torchrun --nproc-per-node N -m fewstep train ...",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


# Settings that belong to the command line


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The network; what is not given is as in its checkpoint."""

    block_size: Annotated[Count | None, "Tokens per block; by default as in the checkpoint."] = None
    context_attention: Annotated[
        ContextAttention | None, "How the context attends to itself; by default as in the checkpoint."
    ] = None
    device: Annotated[str, "auto, cpu, cuda or cuda:N."] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self, name: str, role: RoleName | None = None, *, right_shift_logits: bool | None = None) -> Network:
        """In float32, on this process's device, playing `role`; one that is adapted to a diffusion role takes its mask
        token from the tokenizer.
        """
        check_model_name(name)
        device = self.device
        if device == "auto" and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        network = load_network(name, dtype="float32", device=device)
        own = network.role
        name_of_role = role or own.name
        mask_token_id = own.mask_token_id
        if mask_token_id is None and name_of_role != "autoregressive":
            mask_token_id = network.tokenizer.mask_token_id
        wanted = replace(
            own,
            block_size=own.block_size if self.block_size is None else self.block_size,
            context_attention=self.context_attention or own.context_attention,
            right_shift_logits=own.right_shift_logits if right_shift_logits is None else right_shift_logits,
            mask_token_id=mask_token_id,
        )
        return network.with_role(wanted.playing(name_of_role))


@dataclass(frozen=True, kw_only=True)
class Start(NetworkSettings):
    """The network to start from; what is not given is as in its checkpoint."""

    model: Annotated[str, "A bundled name, a folder, or a hub id.", Touches.READS_MODEL]


@dataclass(frozen=True, kw_only=True)
class TeacherStart(Start):
    """The network to start from, causal or diffusion, and the role it is trained in.

    With `right_shift_logits` a row scores the next token, as in a causal network, and starts from what that has learnt.
    """

    role: Annotated[RoleName, "A bidirectional teacher, or a block_causal student without one."] = "bidirectional"
    right_shift_logits: Annotated[
        bool | None, "A row scores the next token, as in a causal network; by default as in the checkpoint."
    ] = None


@dataclass(frozen=True, kw_only=True)
class StudentStart(NetworkSettings):
    """Trajectories and the teacher that made them; the student starts from `model`, by default the teacher."""

    trajectories: Annotated[Path, "What `fewstep collect` wrote.", Touches.READS]
    teacher: Annotated[str, "The model that made them: a bundled name, a folder, or a hub id.", Touches.READS_MODEL] = (
        "gsm-teacher"
    )
    model: Annotated[str | None, "What the student starts from; by default the teacher.", Touches.READS_MODEL] = None


@dataclass(frozen=True, kw_only=True)
class CausalStart:
    """Jacobi trajectories and the causal model that made them, which is trained."""

    trajectories: Annotated[Path, "What `fewstep collect` wrote.", Touches.READS]
    model: Annotated[str, "The model that made them: a bundled name, a folder, or a hub id.", Touches.READS_MODEL] = (
        "gsm-ar"
    )
    device: Annotated[str, "auto, cpu, cuda or cuda:N."] = "auto"


@dataclass(frozen=True, kw_only=True)
class DrafterStart:
    """The causal model that the adapter drafts for, which stays as it is, and its own texts."""

    texts: Annotated[Path, "What `fewstep collect --decoder autoregressive` wrote.", Touches.READS]
    output: Annotated[Path, "A new folder for the adapter, its report and its logs.", Touches.FILLS]
    model: Annotated[str, "The model that wrote them: a bundled name, a folder, or a hub id.", Touches.READS_MODEL] = (
        "gsm-ar"
    )
    mask_token_id: Annotated[
        int | None, "Id of a token that occurs in no text; by default that of the tokenizer's mask token."
    ] = None
    device: Annotated[str, "auto, cpu, cuda or cuda:N."] = "auto"


@dataclass(frozen=True, kw_only=True)
class HeadsStart:
    """The causal model that the heads are for; it stays as it is."""

    model: Annotated[str, "A bundled name, a folder, or a hub id.", Touches.READS_MODEL]
    output: Annotated[Path, "A new folder for the heads and the report.", Touches.FILLS]
    device: Annotated[str, "auto, cpu, cuda or cuda:N."] = "auto"


@dataclass(frozen=True, kw_only=True)
class EmbeddingStart(Start):
    """The network to start from, causal, diffusion or in embedding space, and how noise enters it."""

    scratch: Annotated[bool, "Begin with fresh weights of the model's shape."] = False
    noise_scale: Annotated[
        Annotated[float, Gt(0), Le(1e4)] | None,
        "Deviation of the noise on embeddings whose numbers have a mean square of 1; by default as in the checkpoint, "
        "or 7 for width 256 and by its square root for others.",
    ] = None
    rows_from: Annotated[
        RowsFrom | None,
        "What a noisy row enters the network as: posterior, the mean embedding of the tokens that it may stand for, or "
        "noise; by default as in the checkpoint, or posterior.",
    ] = None
    self_conditioned: Annotated[
        bool | None, "The network is given its last prediction; by default as in the checkpoint, or not."
    ] = None
    warp: Annotated[
        Literal["keep", "channel", "loss", "uniform"],
        "How time is spread over noise levels: keep as in the checkpoint; by what single rows tell of their tokens "
        "(channel, for a model that is new here); by the loss of the network at the start; or uniform.",
    ] = "keep"

    def network(self, data: "EmbeddingData", training: EmbeddingSettings) -> tuple[Network, Examples, Paths | None]:
        """In embedding space, with what it learns from."""
        source = NetworkSettings(
            block_size=self.block_size, context_attention=self.context_attention, device=self.device
        ).load(self.model)
        if self.scratch:
            source.module.init_weights()
        if source.role.embedding_space is not None and self.context_attention is not None:
            raise FewstepError("context_attention is settled for a network in embedding space; leave it out")
        examples, paths = data.read(source)
        fields = {
            "noise_scale": self.noise_scale,
            "rows_from": self.rows_from,
            "self_conditioned": self.self_conditioned,
            "predicts": "embeddings" if training.objective == "mse" else None,
            "warp": UNIFORM if self.warp == "uniform" else None,
        }
        made = to_embedding_space(source, **{name: value for name, value in fields.items() if value is not None})
        if self.warp == "channel":
            made = to_embedding_space(made, warp=channel_warp(made))
        if self.warp == "loss":
            made = to_embedding_space(made, warp=warp_by_loss(made, examples))
        return begin_embedding(made, training), examples, paths


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training rows: JSONL or Parquet with prompt and completion, messages, or text; longer ones are left out."""

    data: Annotated[Path, "Rows of prompt and completion, messages, or text.", Touches.READS]
    max_prompt: Annotated[Count | None, "Leave out rows with a longer prompt, in tokens; by default none."] = None
    max_completion: Annotated[Count | None, "Leave out rows with a longer completion, in tokens; by default none."] = (
        None
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def read(self, network: Network) -> Examples:
        """As token ids. FewstepError naming file and line of a row that lacks a field."""
        return encode_rows(
            numbered_training_rows(self.data),
            network.tokenizer,
            source=str(self.data),
            max_prompt=self.max_prompt,
            max_completion=self.max_completion,
            stop_token_ids=network.stop_token_ids,
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddingData:
    """Training rows as for the other trainings, or the paths of a denoiser's sampler."""

    data: Annotated[Path | None, "Rows of prompt and completion, messages, or text.", Touches.READS] = None
    paths: Annotated[Path | None, "Folder of collected paths, for the objective trajectories.", Touches.READS] = None
    max_prompt: Annotated[Count | None, "Leave out rows with a longer prompt, in tokens; by default none."] = None
    max_completion: Annotated[Count | None, "Leave out rows with a longer completion, in tokens; by default none."] = (
        None
    )

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, objective: str) -> None:
        """FewstepError unless that is given which the objective learns from."""
        wanted, other = ("paths", "data") if objective == "trajectories" else ("data", "paths")
        if getattr(self, wanted) is None:
            raise FewstepError(f"the objective {objective} learns from --{wanted}; name it")
        if getattr(self, other) is not None:
            raise FewstepError(f"--{other} has no effect with the objective {objective}; leave it out")

    def read(self, network: Network) -> tuple[Examples, Paths | None]:
        """FewstepError as from `Data.read` and `read_paths`."""
        if self.paths is not None:
            found = read_paths(self.paths)
            return found.examples, found
        assert self.data is not None
        rows = Data(data=self.data, max_prompt=self.max_prompt, max_completion=self.max_completion)
        return rows.read(network), None


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Lengths of the canvas."""

    weights: Annotated[
        tuple[Weight, ...], "Relative frequencies of canvases of 1, 2, ... blocks, such as [0, 1, 2, 1]."
    ] = CanvasLengths.weights

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where the result goes, as a plain folder or an adapter, and what is watched on the way."""

    output: Annotated[Path, "A new folder for the model, its report and its logs.", Touches.FILLS]
    lora: Annotated[bool, "Train and keep an adapter instead of all weights."] = False


@dataclass(frozen=True, kw_only=True)
class EmbeddingOutcome:
    """Where the result goes."""

    output: Annotated[Path, "A new folder for the model, its report and its logs.", Touches.FILLS]


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Held-out rows whose prompts are answered at every evaluation, for samples in the log, health statistics and the
    detection of collapse.
    """

    data: Annotated[
        Path | None, "Held-out rows in the format of the training rows; by default none.", Touches.READS
    ] = None
    num_prompts: Annotated[Count, "How many of these rows are answered, from the first."] = 32
    max_new_tokens: Annotated[Count, "Most new tokens of an answer."] = 256

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class SeedWatch:
    """How the held-out prompts are answered by a model whose answers differ by the seed."""

    seeds: Annotated[
        Annotated[Count, Le(64)], "Seeds with which each prompt is answered; more than one tell of the diversity."
    ] = 1
    steps: Annotated[Count | None, "Passes of an answer; by default as many as the model takes by default."] = None

    def __post_init__(self) -> None:
        check_fields(self)


WATCHED: Groups = {TrainSettings: "", LoRASettings: "lora_", Watch: "watch_", CollapseLimits: "collapse_"}
RUN: Groups = {Outcome: "", **WATCHED}


# The subcommands


def diffusion(built: Built, json: Path | None) -> None:
    """A masked-diffusion teacher (or, with --role block_causal, plain block diffusion)."""
    start: TeacherStart = built[TeacherStart]
    _refuse_unused(built)
    if start.role == "block_causal":
        built.refuse(("leftward", "canvas_weights"), "with --role block_causal")
    elif start.role == "bidirectional":
        built.refuse(("untouched",), "with --role bidirectional")
    built[Corruption].check(start.role)
    network = start.load(start.model, start.role, right_shift_logits=start.right_shift_logits)
    built[Corruption].check_tokens(network.vocab_size)
    objective = MaskedDiffusionObjective(
        network.role,
        built[Data].read(network),
        network.eos_token_id,
        corruption=built[Corruption],
        canvas=CanvasLengths(block_size=network.role.block_size, weights=built[Canvas].weights),
    )
    _run_outcome(network, objective, built, json)


def cdlm(built: Built, json: Path | None) -> None:
    """A block-causal student, from a teacher's trajectories (CDLM, arXiv 2511.19269)."""
    start: StudentStart = built[StudentStart]
    _refuse_unused(built)
    if not built[CDLMSettings].denoising:
        built.refuse(settings_of({BlockCorruption: "reference_"}), "with --denoising 0")
    from fewstep.train.trajectories import read_table

    # Its own copy of the weights: the teacher's head must not move with the student's.
    teacher = NetworkSettings(device=start.device).load(start.teacher)
    network = start.load(start.model or start.teacher, "block_causal")
    if network.vocab_size != teacher.vocab_size:
        raise FewstepError(
            f"the student {network.name} has {network.vocab_size} tokens and the teacher {teacher.name} "
            f"{teacher.vocab_size}; a student learns from a teacher with its own vocabulary"
        )
    built[BlockCorruption].check_tokens(network.vocab_size)
    table, references = read_table(start.trajectories, teacher)
    objective = CDLMObjective(
        network.role,
        table,
        network.eos_token_id,
        references=references,
        settings=built[CDLMSettings],
        corruption=built[BlockCorruption],
    )
    _run_outcome(network, objective, built, json)


def sft(built: Built, json: Path | None) -> None:
    """Supervised fine-tuning of a causal model or a block-causal student, in the role it has."""
    start: Start = built[Start]
    _refuse_unused(built)
    network = start.load(start.model)
    examples = built[Data].read(network)
    objective: Objective
    if network.role.name == "autoregressive":
        objective = CausalObjective(network.role, examples, network.eos_token_id)
    else:
        objective = MaskedDiffusionObjective(network.role, examples, network.eos_token_id)
    _run_outcome(network, objective, built, json)


def cllm(built: Built, json: Path | None) -> None:
    """A causal model, on its own Jacobi trajectories (CLLM, arXiv 2403.00835)."""
    start: CausalStart = built[CausalStart]
    _refuse_unused(built)
    if built[CLLMSettings].noise != "progressive":
        built.refuse(("noise_cycle",), "without --noise progressive")
    from fewstep.train.causal_records import read_jacobi_table

    network = NetworkSettings(device=start.device).load(start.model)
    table, references = read_jacobi_table(start.trajectories, network)
    network = network.with_role(replace(network.role, jacobi_window=table.window))
    objective = CLLMObjective(
        network.role, table, network.eos_token_id, references=references, settings=built[CLLMSettings]
    )
    _run_outcome(network, objective, built, json, decoder=Jacobi.name, window=table.window)


def draft(built: Built, json: Path | None) -> None:
    """A gated adapter: the causal model drafts blocks of its own text with it, and verifies them without it."""
    start: DrafterStart = built[DrafterStart]
    _require_extra()
    _refuse_unwatched(built)
    _check_output(start.output)
    from fewstep.train.causal_records import read_texts

    network = NetworkSettings(device=start.device).load(start.model)
    examples, visited = read_texts(start.texts, network)
    if visited is None:
        built.refuse(("visited",), "on texts that were decoded without an adapter")
    settings = built[DraftSettings]
    network = add_gated_lora(
        network, built[LoRASettings], mask_token_id=start.mask_token_id, block_size=settings.block_size
    )
    objective = DraftObjective(network, examples, visited=visited, settings=settings)
    _run(network, objective, built, json, start.output, decoder=SelfSpeculative.name)


def embedding(built: Built, json: Path | None) -> None:
    """A network in embedding space: whole texts from noise in few passes (see docs/embedding.md)."""
    start: EmbeddingStart = built[EmbeddingStart]
    _require_extra()
    _refuse_unwatched(built)
    training: EmbeddingSettings = built[EmbeddingSettings]
    if training.target == "average" and built[TrainSettings].ema_decay is None:
        raise FewstepError("the target average is the moving average of the weights; set --ema-decay, such as 0.99")
    built[EmbeddingData].check(training.objective)
    _check_output(built[EmbeddingOutcome].output)
    network, examples, paths = start.network(built[EmbeddingData], training)
    objective = EmbeddingObjective(
        network,
        examples,
        num_batches=built[TrainSettings].max_steps * built[TrainSettings].accumulation,
        settings=training,
        corruption=built[TokenCorruption],
        canvas=CanvasLengths(block_size=network.role.block_size, weights=built[Canvas].weights),
        paths=paths,
    )
    watch: SeedWatch = built[SeedWatch]
    if built[Watch].data is None:
        built.refuse(settings_of({SeedWatch: "watch_"}), "without --watch-data")
    _run(network, objective, built, json, built[EmbeddingOutcome].output, num_seeds=watch.seeds, steps=watch.steps)


def medusa(built: Built, json: Path | None) -> None:
    """Medusa heads for a causal model (arXiv 2401.10774)."""
    start: HeadsStart = built[HeadsStart]
    _require_extra()
    _check_output(start.output)
    from fewstep.train.trainer import train

    built.refuse(("evaluate_every",), "on heads, which are not evaluated")
    network = NetworkSettings(device=start.device).load(start.model)
    objective = MedusaObjective(
        network.role, built[Data].read(network), network.eos_token_id, settings=built[MedusaSettings]
    )
    heads = MedusaHeads.of(network, built[MedusaSettings].heads)
    _told(train(network, objective, built[TrainSettings], start.output, heads=heads), json)


app.command("diffusion")(
    with_settings(diffusion, {TeacherStart: "", Data: "", **RUN, Corruption: "", Canvas: "canvas_"})
)
app.command("cdlm")(with_settings(cdlm, {StudentStart: "", **RUN, CDLMSettings: "", BlockCorruption: "reference_"}))
app.command("sft")(with_settings(sft, {Start: "", Data: "", **RUN}))
app.command("cllm")(with_settings(cllm, {CausalStart: "", **RUN, CLLMSettings: ""}))
app.command("draft")(with_settings(draft, {DrafterStart: "", **WATCHED, DraftSettings: ""}))
app.command("embedding")(
    with_settings(
        embedding,
        {
            EmbeddingStart: "",
            EmbeddingData: "",
            EmbeddingOutcome: "",
            TrainSettings: "",
            Watch: "watch_",
            SeedWatch: "watch_",
            CollapseLimits: "collapse_",
            DiversityLimits: "collapse_",
            EmbeddingSettings: "",
            TokenCorruption: "",
            Canvas: "canvas_",
        },
    )
)
app.command("medusa")(with_settings(medusa, {HeadsStart: "", Data: "", TrainSettings: "", MedusaSettings: ""}))


# What they share


def _refuse_unused(built: Built) -> None:
    """FewstepError for an option that nothing would read or a missing extra, before anything is loaded."""
    _require_extra()
    if not built[Outcome].lora:
        built.refuse(settings_of({LoRASettings: "lora_"}), "without --lora")
    _refuse_unwatched(built)
    _check_output(built[Outcome].output)


def _refuse_unwatched(built: Built) -> None:
    """FewstepError for an option about evaluations that would not take place."""
    if built[Watch].data is None:
        built.refuse(settings_of({Watch: "watch_"}), "without --watch-data")
    if built[TrainSettings].evaluate_every is None:
        built.refuse(("watch_data",), "without --evaluate-every")


def _check_output(output: Path) -> None:
    """As the trainer does, but before anything is loaded; by the first process for all."""
    if os.environ.get("RANK", "0") == "0":
        check_output(output)


def _require_extra() -> None:
    for module in EXTRAS["train"].values():
        require(module)


def _run_outcome(network: Network, objective: Objective, built: Built, json: Path | None, **decoding: Any) -> None:
    """Train, and write the result where and as `Outcome` says."""
    outcome: Outcome = built[Outcome]
    lora = built[LoRASettings] if outcome.lora else None
    _run(network, objective, built, json, outcome.output, lora=lora, **decoding)


def _run(
    network: Network,
    objective: Objective,
    built: Built,
    json: Path | None,
    output: Path,
    *,
    lora: LoRASettings | None = None,
    **decoding: Any,
) -> None:
    """Train; `decoding`: settings of the answers to held-out prompts."""
    from fewstep.train.trainer import train

    monitor = CollapseMonitor(built[CollapseLimits], seeds=built.get(DiversityLimits))
    result = train(
        network,
        objective,
        built[TrainSettings],
        output,
        lora=lora,
        evaluate=_samples(network, built[Watch], output / SAMPLES, monitor, decoding),
        monitor=monitor,
    )
    _told(result, json)


def _told(result: "TrainResult", json: Path | None) -> None:
    """What the first process says of a finished run."""
    if os.environ.get("RANK", "0") == "0":
        note(
            f"{result.folder}: {result.steps} steps, {result.real_tokens} tokens in {result.seconds:.0f} s, "
            f"{result.tokens_per_second:.0f} tokens/s"
        )
        write_report(json, {**asdict(result), "folder": str(result.folder)})


def _samples(
    network: Network, watch: Watch, file: Path, monitor: CollapseMonitor, decoding: Mapping[str, Any]
) -> Samples | None:
    """What answers the held-out prompts at every evaluation, if there are any. FewstepError naming file and line of one
    that the network cannot answer so.
    """
    if watch.data is None:
        return None
    rows = {
        f"{watch.data} line {line}": row for line, row in islice(numbered_training_rows(watch.data), watch.num_prompts)
    }
    prompts = [split_row(row, where)[0] for where, row in rows.items()]
    samples = Samples(prompts, file=file, monitor=monitor, max_new_tokens=watch.max_new_tokens, **decoding)
    samples.check(network, list(rows))
    return samples
