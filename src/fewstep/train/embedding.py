"""Training in embedding space: denoising, and consistency of predictions along a path from noise to text.

Every canvas of a document is noised at a level of its own. What follows is one of the objectives of
`EmbeddingSettings.objective`; all but the first two learn from the network's own predictions, and a share of the
canvases always learns from data, without which they would be satisfied by the same answer to everything.

Axes: R = packed rows, T = positions, S = rows of canvases, U = canvases, V = vocabulary, D = hidden width.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from fewstep.decode.embedding import step_size
from fewstep.errors import FewstepError
from fewstep.models.embedding_denoiser import IGNORED, LEVELS, EmbeddingDenoiser, denoising_losses
from fewstep.models.embedding_space import EmbeddingSpace, rounding, warp_of_losses
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import NoisyRows, conditioning_of
from fewstep.train.corruption import stratified_uniform
from fewstep.train.documents import CONTEXT, NOISY, Batch, CanvasLengths, Forward, Inputs, PackedDocuments, WeightsOf
from fewstep.train.embedding_paths import Paths
from fewstep.train.examples import Examples
from fewstep.train.objectives import Loss
from fewstep.values import Count, Share, check_fields

ObjectiveName = Literal["denoiser", "mse", "consistency", "distillation", "shortcut", "trajectories"]

FIRST_LEVELS = 4
"""Noise levels that consistency objectives begin with."""

BANDS = (0.25, 0.5, 0.75, 1.0)
"""Upper ends of the bands of time that the log tells losses of."""


@dataclass(frozen=True, kw_only=True)
class TokenCorruption:
    """What is wrong with some tokens before they are noised, so that the network learns to mend what few passes get
    wrong. Shares are of the canvases; the others have Gaussian noise alone.
    """

    masked: Annotated[Share, "Share of the canvases in which some tokens have no embedding but noise."] = 0.0
    replaced: Annotated[Share, "Share of the canvases in which some tokens are replaced by others."] = 0.0
    shuffled: Annotated[Share, "Share of the canvases in which some tokens have changed places."] = 0.0
    corruption_rate: Annotated[Share, "Largest share of the tokens of such a canvas that are wrong."] = 0.3

    def __post_init__(self) -> None:
        check_fields(self)
        if self.masked + self.replaced + self.shuffled > 1:
            raise FewstepError(
                "masked, replaced and shuffled are shares of the same canvases, got "
                f"{self.masked} + {self.replaced} + {self.shuffled}; lower them to 1 in all"
            )


@dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """What is learnt. FewstepError if a setting has no meaning for the objective.

    `denoiser`: cross-entropy of the tokens. `mse`: the embeddings, by their squared error and the cross-entropy of
    their rounding (Diffusion-LM, arXiv 2205.14217). `consistency`: the same prediction as from the next lower level of
    the same path (arXiv 2303.01469, and with the weights in training as the target arXiv 2310.14189). `distillation`:
    the same, at the point to which a step of the network's own flow leads. `shortcut`: one step gives what its two
    halves give (arXiv 2410.12557), as a mixture of their distributions. `trajectories`: what the paths of a teacher's
    sampler, collected before, lead to; a share of the canvases learns to denoise these texts.
    """

    objective: Annotated[
        ObjectiveName, "What is learnt: denoiser, mse, consistency, distillation, shortcut or trajectories."
    ] = "denoiser"
    most_steps: Annotated[
        Annotated[Count, Le(4096)], "Steps from noise to text of the shortest steps that are learnt."
    ] = 32
    data_share: Annotated[Share, "Share of the canvases that learn from data, beside those that learn a step."] = 0.25
    target: Annotated[
        WeightsOf,
        "Whose predictions are the targets: the weights in training (own), their moving average (average) or those of "
        "the beginning (start).",
    ] = "own"
    target_guidance: Annotated[
        Annotated[float, Ge(0), Le(100)], "Scale of classifier-free guidance in the targets; 0 is none."
    ] = 0.0
    without_prompt: Annotated[Share, "Share of the documents that are learnt without their prompt, for guidance."] = 0.0
    given: Annotated[Share, "Share of the canvases in which some tokens are given, as in infilling."] = 0.0
    canvases: Annotated[Annotated[Count, Le(64)], "Noisy canvases of a document, after one context."] = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.learns_steps and not 0 < self.data_share < 1:
            raise FewstepError(
                f"data_share must lie between 0 and 1 for {self.objective}, got {self.data_share}: without data the "
                "same answer to everything would satisfy it; 0.25 is the default"
            )
        for name, is_set in (("target", self.target != "own"), ("target_guidance", self.target_guidance > 0)):
            if is_set and not self.predicts_targets:
                raise FewstepError(
                    f"{name} has no meaning for {self.objective}, which does not learn from predictions; leave it out"
                )
        if self.objective == "shortcut" and self.most_steps & (self.most_steps - 1):
            raise FewstepError(f"most_steps is a power of two for shortcut, got {self.most_steps}; use 32")

    @property
    def learns_steps(self) -> bool:
        return self.objective not in ("denoiser", "mse")

    @property
    def predicts_targets(self) -> bool:
        """Whether the network's own predictions are targets."""
        return self.learns_steps and self.objective != "trajectories"


@dataclass(frozen=True)
class Prepared:
    """A batch before it meets the network.

    `inputs`: the packed rows, of which `inputs.rows_S` are those of canvases; `before_S`: the rows that score them.
    `without_RT`: the tokens with no prompt at all. `truth_S`: the clean tokens; `shown_S` what is noised in their
    place, `hidden_S` where nothing is; `given_S`: given ones. `unit_S`: their canvas. Of each canvas: `now_U`, where it
    stands; `mid_U` and `then_U`, where half of its step and all of it lead; `data_U`, whether it learns from data.
    `noise_seed`: of the noise. `guesses`: the network is given its own first prediction. `state_SD`: rows of collected
    paths, where data is not noised instead.
    """

    inputs: Inputs
    without_RT: Tensor
    before_S: Tensor
    truth_S: Tensor
    shown_S: Tensor
    hidden_S: Tensor
    given_S: Tensor
    unit_S: Tensor
    now_U: Tensor
    mid_U: Tensor
    then_U: Tensor
    data_U: Tensor
    noise_seed: int
    guesses: bool
    state_SD: Tensor | None = None


class EmbeddingObjective:
    """Trains a network in embedding space on prompts with their answers.

    `num_batches`: of the whole run, over which the consistency objectives raise their number of noise levels.
    """

    def __init__(
        self,
        network: Network,
        examples: Examples,
        *,
        num_batches: int,
        settings: EmbeddingSettings | None = None,
        corruption: TokenCorruption | None = None,
        canvas: CanvasLengths | None = None,
        paths: Paths | None = None,
    ) -> None:
        """`paths`: for the objective trajectories, whose examples are theirs. FewstepError for a network that is not in
        embedding space, or whose predictions are of another kind.
        """
        space = network.role.embedding_space
        if space is None:
            raise FewstepError(
                f"training in embedding space needs the role embedding, and {network.name} has the role "
                f"{network.role.name}; make it one with to_embedding_space"
            )
        self.settings = settings or EmbeddingSettings()
        if (self.settings.objective == "mse") != (space.predicts == "embeddings"):
            raise FewstepError(
                f"the objective {self.settings.objective} does not train a network that predicts {space.predicts}; the "
                "objective mse trains those that predict embeddings"
            )
        if (self.settings.objective == "trajectories") != (paths is not None):
            raise FewstepError(
                "the objective trajectories, and no other, learns from collected paths; "
                + ("choose it, or leave them out" if paths else "collect some first, with collect_paths")
            )
        if paths is not None and paths.states_NKGD.shape[-1] != network.module.config.hidden_size:
            raise FewstepError(
                f"the paths are of a network of width {paths.states_NKGD.shape[-1]}, and {network.name} has "
                f"{network.module.config.hidden_size}; collect paths of this network"
            )
        self.network, self.space, self.role = network, space, network.role
        self.paths = paths
        self.examples = examples = examples if paths is None else paths.examples
        self.corruption = corruption or TokenCorruption()
        self.canvas = canvas or CanvasLengths(block_size=network.role.block_size)
        self.num_batches = num_batches
        self.num_examples = len(examples)
        self._lengths = examples.lengths()
        possible = torch.ones(network.vocab_size, dtype=torch.bool)
        possible[network.never_drawn.cpu()] = False
        self._tokens = possible.nonzero()[:, 0]

    @property
    def target(self) -> WeightsOf:
        """Whose predictions are the targets, beside the weights in training."""
        return self.settings.target

    def fingerprint(self) -> dict[str, Any]:
        return {
            "examples": self.examples.fingerprint(),
            "embedding": asdict(self.settings),
            "corruption": asdict(self.corruption),
            "canvas": asdict(self.canvas),
            **({} if self.paths is None else {"paths": self.paths.fingerprint()}),
        }

    def segment_lengths(self, examples_N: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        context, completion = self._lengths[examples_N].T
        if self.paths is not None:
            return np.stack([context, *[completion] * self.settings.canvases], 1)
        canvas = self.canvas.draw(completion, rng, lambda index: self.examples.name(int(examples_N[index])))
        return np.stack([context, *[canvas] * self.settings.canvases], 1)

    # On the host

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        canvases, count = self.settings.canvases, len(batch.examples_N)
        documents = PackedDocuments(
            self.role, self.examples, batch, self.network.eos_token_id, canvases=canvases, apart=True
        )
        rows_S, before_S = documents.rows(documents.is_noisy_RT, batch)
        unit_RT = documents.document_RT * canvases + (documents.packed.segment_RT - NOISY).clamp_min(0)
        unit_S, num_units = unit_RT.flatten()[rows_S], count * canvases
        truth_S = documents.clean_RT.flatten()[rows_S]
        shown_S, hidden_S = self._corrupted(truth_S, unit_S, num_units, generator)
        given_U, ratio_U, data_U = (stratified_uniform((num_units,), generator) for _ in range(3))
        ratio_U = torch.where(given_U < self.settings.given, ratio_U, 0.0)
        given_S = torch.rand(len(rows_S), generator=generator) < ratio_U[unit_S]
        now_U, mid_U, then_U = self._times(num_units, batch.number, generator)
        state_SD = None
        if self.paths is not None:
            point_U = torch.randint(len(self.paths.times_K), (num_units,), generator=generator)
            now_U, then_U = self.paths.times_K[point_U], torch.zeros(num_units)
            index_S, example_S = (each.flatten()[rows_S] for each in (documents.packed.index_RT, documents.document_RT))
            state_SD = self.paths.states_NKGD[batch.examples_N[example_S], point_U[unit_S], index_S]
        data_U = data_U < (self.settings.data_share if self.settings.learns_steps else 1.0)
        anywhere_U = stratified_uniform((num_units,), generator).clamp_min(1e-4)
        without_RT = torch.where(
            documents.packed.real_RT & (documents.packed.segment_RT == CONTEXT),
            self._mask_token_id,
            documents.clean_RT,
        )
        lost_N = stratified_uniform((count,), generator) < self.settings.without_prompt
        tokens_RT = torch.where(lost_N[documents.document_RT], without_RT, documents.clean_RT)
        return Prepared(
            inputs=Inputs(tokens_RT, documents.positions_RT, documents.layout(), rows_S),
            without_RT=without_RT,
            before_S=before_S,
            truth_S=truth_S,
            shown_S=torch.where(given_S, truth_S, shown_S),
            hidden_S=hidden_S & ~given_S,
            given_S=given_S,
            unit_S=unit_S,
            now_U=torch.where(data_U, anywhere_U, now_U),
            # Of steps that data learns nothing from, such that they are defined.
            mid_U=torch.where(data_U, anywhere_U / 2, mid_U),
            then_U=torch.where(data_U, 0.0, then_U),
            data_U=data_U,
            noise_seed=int(torch.randint(1 << 62, (), generator=generator)),
            guesses=bool(torch.rand((), generator=generator) < 0.5),
            state_SD=state_SD,
        )

    @property
    def _mask_token_id(self) -> int:
        assert self.role.mask_token_id is not None
        return self.role.mask_token_id

    def _corrupted(
        self, truth_S: Tensor, unit_S: Tensor, num_units: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The tokens that are noised, and where there is none."""
        wrong, corrupt = torch.zeros_like(truth_S, dtype=torch.bool), self.corruption
        if not corrupt.masked + corrupt.replaced + corrupt.shuffled:
            return truth_S, wrong
        kind_U, rate_U = (stratified_uniform((num_units,), generator) for _ in range(2))
        chosen_S = torch.rand(len(truth_S), generator=generator) < (rate_U * corrupt.corruption_rate)[unit_S]
        kind_S = kind_U[unit_S]
        hidden_S = chosen_S & (kind_S < corrupt.masked)
        replaced_S = chosen_S & ~hidden_S & (kind_S < corrupt.masked + corrupt.replaced)
        shuffled_S = (
            chosen_S & ~hidden_S & ~replaced_S & (kind_S < corrupt.masked + corrupt.replaced + corrupt.shuffled)
        )
        drawn_S = self._tokens[torch.randint(len(self._tokens), (len(truth_S),), generator=generator)]
        shown_S = torch.where(replaced_S, drawn_S, truth_S)
        places = shuffled_S.nonzero()[:, 0]
        # Canvases stand one after the other, so sorting by canvas and chance shuffles within each.
        order = (unit_S[places] + torch.rand(len(places), generator=generator, dtype=torch.float64)).argsort()
        shown_S = shown_S.index_copy(0, places, truth_S[places[order]])
        return shown_S, hidden_S

    def _times(self, num_units: int, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Where each canvas stands, where half of its step and where all of it leads."""
        level_U, place_U = (stratified_uniform((num_units,), generator) for _ in range(2))
        if self.settings.objective == "shortcut":
            num_kinds = int(math.log2(self.settings.most_steps)) + 1
            steps_U = 2.0 ** (level_U * num_kinds).floor()
        elif self.settings.learns_steps:
            steps_U = torch.full_like(level_U, self._num_levels(number))
        else:
            return level_U, level_U, level_U
        done_U = (place_U * steps_U).floor()
        now_U = 1 - done_U / steps_U
        return now_U, now_U - 0.5 / steps_U, (now_U - 1 / steps_U).clamp_min(0)

    def _num_levels(self, number: int) -> int:
        """Noise levels at a batch of the run: the schedule of consistency training (arXiv 2303.01469)."""
        first, last = min(FIRST_LEVELS, self.settings.most_steps), self.settings.most_steps
        share = min(1.0, number / max(1, self.num_batches))
        return math.ceil(math.sqrt(share * ((last + 1) ** 2 - first**2) + first**2) - 1)

    # On the device

    def loss(self, forward: Forward, prepared: Prepared) -> Loss:
        path = _Path(self, forward, prepared)
        step_U = step_size(
            "shortcut" if self.settings.objective == "shortcut" else "consistency",
            self.space,
            prepared.now_U,
            prepared.then_U,
        )
        step_U = torch.where(prepared.data_U, 0.0, step_U)
        target_SV = None
        if self.settings.predicts_targets:
            with torch.no_grad():
                target_SV = self._target(path)
        output_S = path.predict(path.at(prepared.now_U), prepared.now_U, step_U, gradient=True)
        return self._loss(path, output_S, target_SV)

    def _target(self, path: "_Path") -> Tensor:
        """The distributions that canvases which learn a step are to give, [S, V]."""
        prepared, space = path.prepared, self.space
        now_U, mid_U, then_U = prepared.now_U, prepared.mid_U, prepared.then_U
        x_SD = path.at(now_U)
        if self.settings.objective == "shortcut":
            half_U = step_size("shortcut", space, now_U, mid_U)
            first_SV = path.target(x_SD, now_U, half_U)
            second_SV = path.target(path.moved(x_SD, now_U, mid_U, first_SV), mid_U, half_U)
            weight_U = first_weight(space.level(now_U), space.level(mid_U), space.level(then_U))
            weight_S1 = weight_U[prepared.unit_S][:, None]
            return weight_S1 * first_SV + (1 - weight_S1) * second_SV
        # A clean text is its own prediction.
        ends_S1 = (then_U == 0)[prepared.unit_S][:, None]
        step_U = step_size("consistency", space, then_U, torch.zeros_like(then_U))
        if self.settings.objective == "distillation":
            end_SV = path.target(x_SD, now_U, torch.zeros_like(now_U))
            x_SD = path.moved(x_SD, now_U, then_U, end_SV)
            return torch.where(ends_S1, end_SV, path.target(x_SD, then_U, step_U))
        found_SV = path.target(path.at(then_U), then_U, step_U).masked_fill(ends_S1, 0.0)
        return found_SV.scatter_add(1, prepared.truth_S[:, None], ends_S1.float())

    def _loss(self, path: "_Path", output: Tensor, target_SV: Tensor | None) -> Loss:
        prepared = path.prepared
        logits_SV = path.logits(output)
        truth_S, open_S = prepared.truth_S, (~prepared.given_S).float()
        found_SD = output if self.space.predicts == "embeddings" else None
        loss_S, from_data_S, error_S = denoising_losses(logits_SV, truth_S, found_SD, path.unit_VD)
        data_S = prepared.data_U[prepared.unit_S].float() * open_S
        parts = {"cross_entropy": _mean(from_data_S, data_S)}
        if error_S is not None:
            parts["squared_error"] = _mean(error_S, open_S)
        if self.paths is not None:
            parts["step"] = _mean(from_data_S, open_S - data_S)
        if target_SV is not None:
            step_S = (torch.special.xlogy(target_SV, target_SV) - target_SV * logits_SV.log_softmax(-1)).sum(-1)
            loss_S = torch.where(data_S > 0, from_data_S, step_S)
            parts["step"] = _mean(step_S, open_S - data_S)
        time_S, lowest = prepared.now_U[prepared.unit_S], 0.0
        for highest in BANDS:
            inside_S = data_S * ((time_S > lowest) & (time_S <= highest))
            parts[f"cross_entropy/time_{highest:g}"] = _mean(from_data_S, inside_S)
            lowest = highest
        total = (loss_S * open_S).sum() / open_S.sum().clamp_min(1)
        return Loss(total, {name: part.detach() for name, part in parts.items()})


class _Path:
    """The paths of a batch's canvases from noise to text, and the network's predictions on them."""

    def __init__(self, objective: EmbeddingObjective, forward: Forward, prepared: Prepared) -> None:
        self.prepared = prepared
        self.space = objective.space
        self._objective, self._forward = objective, forward
        module = objective.network.module
        self._part = conditioning_of(module)
        with torch.no_grad():
            self.unit_VD = self._part.unit(module.get_input_embeddings().weight)
            self._clean_SD = self.unit_VD[prepared.shown_S].masked_fill(prepared.hidden_S[:, None], 0.0)
            device = self.unit_VD.device
            generator = torch.Generator(device).manual_seed(prepared.noise_seed)
            self._noise_SD = torch.randn(self._clean_SD.shape, generator=generator, device=device)

    def level(self, time_U: Tensor) -> Tensor:
        """Noise level of each row [S]: given ones are clean."""
        return torch.where(self.prepared.given_S, 0.0, self.space.level(time_U)[self.prepared.unit_S])

    @torch.no_grad()
    def at(self, time_U: Tensor) -> Tensor:
        """The noisy embeddings of data at these times, always with the same noise; those of paths stand as they are."""
        x_SD = self.space.noised(self._clean_SD, self.level(time_U), self._noise_SD)
        state_SD = self.prepared.state_SD
        if state_SD is None:
            return x_SD
        from_data_S1 = (self.prepared.data_U[self.prepared.unit_S] | self.prepared.given_S)[:, None]
        return torch.where(from_data_S1, x_SD, state_SD.float())

    @torch.no_grad()
    def moved(self, x_SD: Tensor, now_U: Tensor, then_U: Tensor, predicted_SV: Tensor) -> Tensor:
        """An Euler step along the flow of this prediction."""
        kept_S1 = (self.level(then_U) / self.level(now_U).clamp_min(1e-6))[:, None]
        with torch.autocast(x_SD.device.type, enabled=False):
            moved_SD = kept_S1 * x_SD + (1 - kept_S1) * (predicted_SV @ self.unit_VD)
        return torch.where(self.prepared.given_S[:, None], x_SD, moved_SD)

    def predict(
        self,
        x_SD: Tensor,
        time_U: Tensor,
        step_U: Tensor,
        *,
        gradient: bool = False,
        weights: WeightsOf = "own",
        without_prompt: bool = False,
    ) -> Tensor:
        """What the network gives: logits [S, V], or embeddings [S, D]."""
        prepared, inputs = self.prepared, self.prepared.inputs
        step_S = torch.where(prepared.given_S, 0.0, step_U[prepared.unit_S])
        noisy = NoisyRows(inputs.rows_S, prepared.before_S, x_SD, self.level(time_U), step_S)
        if without_prompt:
            inputs = inputs._replace(tokens_RT=prepared.without_RT)
        if self._part.guess is not None:
            guess_SD = torch.zeros_like(x_SD)
            if gradient and prepared.guesses:
                with torch.no_grad():
                    first = self._forward(*inputs, noisy=noisy._replace(guess_SD=guess_SD), gradient=False)
                    guess_SD = self._clean(first)
                    # Steps learn without a guess, since the first of their pass has none.
                    guess_SD = guess_SD * (step_S == 0)[:, None]
            noisy = noisy._replace(guess_SD=guess_SD)
        return self._forward(*inputs, noisy=noisy, gradient=gradient, weights=weights)

    def target(self, x_SD: Tensor, time_U: Tensor, step_U: Tensor) -> Tensor:
        """Distributions [S, V] by the weights of the targets, guided if that is set."""
        settings = self._objective.settings
        logits_SV = self.logits(self.predict(x_SD, time_U, step_U, weights=settings.target))
        if settings.target_guidance:
            without = self.predict(x_SD, time_U, step_U, weights=settings.target, without_prompt=True)
            without_SV = self.logits(without)
            logits_SV = without_SV + (1 + settings.target_guidance) * (logits_SV - without_SV)
        return self._part.without_ruled_out(logits_SV).softmax(-1)

    def logits(self, output: Tensor) -> Tensor:
        return output.float() if self.space.predicts == "tokens" else rounding(output, self.unit_VD)

    def _clean(self, output: Tensor) -> Tensor:
        """The embeddings that are predicted."""
        if self.space.predicts == "embeddings":
            return output.float()
        with torch.autocast(output.device.type, enabled=False):
            return self._part.without_ruled_out(output.float()).softmax(-1) @ self.unit_VD


def first_weight(now: Tensor, mid: Tensor, then: Tensor) -> Tensor:
    """The share of the first of two Euler steps in the one step that leads to the same place; the second has the rest.

    With a step from s to e, x_e = (e / s) x_s + (1 - e / s) x0. Two of them, by way of m, have

        x_e = (e / s) x_s + (e / m) (1 - m / s) x0_1 + (1 - e / m) x0_2

    so that one step arrives there if its x0 is [b' (1 - a') x0_1 + (1 - b') x0_2] / (1 - a' b'), with a' = m / s and
    b' = e / m. (With the shares a = 1 - a', b = 1 - b' and c = 1 - a' b' that are gone: [a (1 - b) x0_1 + b x0_2] / c.)
    Since x0 is linear in the distribution of tokens, it is that of the same mixture of distributions. The arguments are
    noise levels, falling.
    """
    kept_first, kept_second = mid / now, then / mid
    return kept_second * (1 - kept_first) / (1 - kept_first * kept_second)


def _mean(value_S: Tensor, weight_S: Tensor) -> Tensor:
    """0 where there is nothing."""
    return (value_S * weight_S).sum() / weight_S.sum().clamp_min(1)


# --- the warp of time by the loss ---


@torch.no_grad()
def warp_by_loss(
    network: Network, examples: Examples, *, count: int = 64, progress: Callable[[float, float], None] | None = None
) -> tuple[float, ...]:
    """The warp under which this network's cross-entropy grows evenly with time, measured on the first examples.

    `progress(level, cross_entropy)` is told of each level.
    """
    chosen, device = examples.head(count), network.device
    prompts, answers = (
        [ids[start:end].tolist() for start, end in pairwise(offsets.tolist())]
        for ids, offsets in (
            (chosen.prompt_ids, chosen.prompt_offsets),
            (chosen.completion_ids, chosen.completion_offsets),
        )
    )
    fitting = [pair for pair in zip(prompts, answers, strict=True) if sum(map(len, pair)) <= network.max_positions]
    if not fitting:
        raise FewstepError(
            f"no example fits the {network.max_positions} positions of {network.name}; give shorter ones"
        )
    longest = max(len(prompt) + len(answer) for prompt, answer in fitting)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)

    ids = padded([prompt + answer for prompt, answer in fitting], network.eos_token_id)
    labels = padded([[IGNORED] * len(prompt) + answer for prompt, answer in fitting], IGNORED)
    real = padded([[1] * (len(prompt) + len(answer)) for prompt, answer in fitting], 0)
    model, losses = EmbeddingDenoiser(network), []
    for level in LEVELS[::2]:
        generator = torch.Generator(device).manual_seed(0)
        levels = torch.full((len(fitting),), level, device=device)
        output = model(ids, labels, levels, attention_mask=real, generator=generator)
        assert output.loss is not None
        losses.append(float(output.loss))
        if progress is not None:
            progress(level, losses[-1])
    return warp_of_losses(LEVELS[::2], losses)


def trained_space(space: EmbeddingSpace, settings: EmbeddingSettings) -> EmbeddingSpace:
    """The space as a training with these settings leaves it."""
    steps = settings.most_steps if settings.learns_steps else space.most_steps
    return replace(space, most_steps=steps, guided=space.guided or settings.without_prompt > 0)


def begin_embedding(network: Network, settings: EmbeddingSettings) -> Network:
    """The network in embedding space, with its role as this training leaves it; see `trained_space`."""
    assert network.role.embedding_space is not None
    space = trained_space(network.role.embedding_space, settings)
    return network.with_role(replace(network.role, embedding_space=space))
