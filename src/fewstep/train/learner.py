"""Weights, optimizer, schedule and moving average of a run, and one optimizer step.

Axes: R = packed rows, T = positions of a row, S = scored positions, K = Medusa heads, V = vocabulary, D = hidden width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, get_scheduler

from fewstep.errors import FewstepError
from fewstep.models.architectures import adjust_logits
from fewstep.models.attention import check_trainable, compile_layers, prepare_attention, training_mask
from fewstep.models.gated import GatedAdapter
from fewstep.models.load import DTYPES
from fewstep.models.masks import Layout
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from fewstep.models.noise_conditioning import NoisyRows, noisy_embeddings, noisy_scores
from fewstep.models.roles import Role
from fewstep.train.documents import WeightsOf
from fewstep.train.lora import LoRASettings, add_lora
from fewstep.train.objectives import Objective
from fewstep.train.settings import TrainSettings
from fewstep.train.stream import PreparedStream


class _PackedForward(nn.Module):
    """Backbone and head in one module, so that a distributed wrapper sees one forward: logits [S, V] of flat rows.

    With Medusa `heads` in place of the network's own they are [S, K, V]. `scales_logits`: of the architecture.
    `module`: the network's, a PEFT model around it, or a gated adapter in it, which applies to the rows `adapted_RT`.
    With `noisy` rows it is a network in embedding space, see `Forward`.
    """

    def __init__(self, module: nn.Module, role: Role, heads: MedusaHeads | None, *, scales_logits: bool) -> None:
        super().__init__()
        self.module = module
        self.role = role
        self.heads = heads
        self.scales_logits = scales_logits

    def forward(
        self,
        tokens_RT: Tensor,
        positions_RT: Tensor,
        mask: Any,
        rows_S: Tensor,
        adapted_RT: Tensor | None = None,
        noisy: NoisyRows | None = None,
    ) -> Tensor:
        module: Any = self.module
        if isinstance(module, GatedAdapter):
            assert adapted_RT is not None, "a gated adapter is trained on the rows that it applies to"
            with module.open_for(adapted_RT):
                embedded_RTD = module.embed(tokens_RT, adapted_RT)
                return self._logits(module.model.get_base_model(), embedded_RTD, positions_RT, mask, rows_S)
        causal_lm = module.get_base_model() if hasattr(module, "get_base_model") else module
        embedded_RTD = causal_lm.get_input_embeddings()(tokens_RT)
        if noisy is None:
            return self._logits(causal_lm, embedded_RTD, positions_RT, mask, rows_S)
        assert self.role.embedding_space is not None
        embedded_RTD = noisy_embeddings(causal_lm, embedded_RTD, noisy, self.role.embedding_space)
        hidden_RTD = self._hidden(causal_lm, embedded_RTD, positions_RT, mask)
        logits_SV, found_SD = noisy_scores(causal_lm, hidden_RTD, noisy)
        return logits_SV if found_SD is None else found_SD

    def _hidden(self, causal_lm: Any, embedded_RTD: Tensor, positions_RT: Tensor, mask: Any) -> Tensor:
        """Rows after the final norm, [R, T, D]."""
        if torch.is_autocast_enabled(embedded_RTD.device.type):
            # The residual stream, the rotary tables and with them queries and keys take the precision of this, which
            # autocast leaves in float32.
            embedded_RTD = embedded_RTD.to(torch.get_autocast_dtype(embedded_RTD.device.type))
        hidden_RTD: Tensor = causal_lm.base_model(
            inputs_embeds=embedded_RTD, attention_mask=mask, position_ids=positions_RT, use_cache=False
        ).last_hidden_state
        return hidden_RTD

    def _logits(self, causal_lm: Any, embedded_RTD: Tensor, positions_RT: Tensor, mask: Any, rows_S: Tensor) -> Tensor:
        hidden = self._hidden(causal_lm, embedded_RTD, positions_RT, mask)
        head = causal_lm.get_output_embeddings() if self.heads is None else self.heads
        logits = head(hidden.flatten(0, 1).index_select(0, rows_S))
        return adjust_logits(causal_lm, logits) if self.scales_logits else logits


class Learner:
    """Changes `network` in place.

    `trained` is its module, the PEFT model around it, the gated adapter in it, or heads on the frozen network.
    """

    def __init__(
        self,
        network: Network,
        settings: TrainSettings,
        accelerator: Accelerator,
        lora: LoRASettings | None = None,
        heads: MedusaHeads | None = None,
        keeps: WeightsOf = "own",
    ) -> None:
        """FewstepError for weights that are not finite, or layers to compile where there is no GPU.

        `keeps`: which other weights an objective asks for predictions.
        """
        check_trainable(network, compiled=settings.compiled)
        self._network, self._settings, self._accelerator = network, settings, accelerator
        if settings.compiled and network.device.type != "cuda":
            raise FewstepError(f"compiled layers need a CUDA GPU, and the network is on {network.device}; leave it out")
        network.module.float().train()
        broken = not_finite(network.module.state_dict())
        if broken is not None:
            raise FewstepError(
                f"{broken} of {network.name} holds values that are not finite, so it cannot be trained; start from "
                "another checkpoint"
            )
        prepare_attention(network.module, compiled=settings.compiled)
        body: nn.Module = network.module
        if network.adapter is not None:
            body = network.adapter.float()
            network.adapter.learn_alone()
        elif lora:
            body = add_lora(network, lora)
        self.trained: nn.Module = body
        if heads is not None:
            network.module.requires_grad_(False)
            self.trained = heads.to(network.device, torch.float32)
        if settings.compiled:
            compile_layers(network.module)
        self.average: AveragedModel | None = None
        if settings.ema_decay:
            self.average = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
            self.average.to(accelerator.device)
        self._other: dict[WeightsOf, _PackedForward] = {}
        if keeps != "own":
            self._other[keeps] = self._kept(keeps)
        optimizer = self._new_optimizer()
        share_of = _schedule(settings, optimizer)
        # accelerate steps the scheduler once a process.
        scheduler = LambdaLR(optimizer, lambda num_calls: share_of(num_calls // accelerator.num_processes + 1))
        self._packed = _PackedForward(body, network.role, heads, scales_logits=network.architecture.scales_logits)
        self._model, self._optimizer, self._scheduler = accelerator.prepare(self._packed, optimizer, scheduler)

        self.learning_rate = 0.0
        """That of the last step."""

    def step(self, objective: Objective, stream: PreparedStream) -> dict[str, Tensor]:
        """An optimizer step; figures averaged over its micro-batches, on the device."""
        self.learning_rate = float(self._scheduler.get_last_lr()[0])
        micros = [self._micro_step(objective, stream.next()) for _ in range(self._settings.accumulation)]
        if self.average is not None:
            self.average.update_parameters(self.trained)
        parts = {name: torch.stack([micro[name] for micro in micros]).mean() for name in micros[0]}
        return parts | {"gradient_norm": micros[-1]["gradient_norm"]}

    def not_finite(self) -> str | None:
        """What of the weights, of their moving average or of the optimizer's moments is not finite, in words; or None.

        A step may leave such values with a finite loss, and whatever is computed from them is lost.
        """
        broken = not_finite(self.trained.state_dict())
        if broken is not None:
            return f"the weight {broken}"
        broken = None if self.average is None else not_finite(self.average.state_dict())
        if broken is not None:
            return f"the moving average of {broken}"
        names = {parameter: name for name, parameter in self.trained.named_parameters()}
        moments = {
            f"{moment} of {names[parameter]}": value
            for parameter, state in self._optimizer.state.items()
            for moment, value in state.items()
        }
        broken = not_finite(moments)
        return None if broken is None else f"the optimizer's {broken}"

    @property
    def dtype_saved(self) -> torch.dtype:
        """What the finished weights are written in; heads are always bfloat16."""
        return torch.bfloat16 if isinstance(self.trained, MedusaHeads) else DTYPES[self._settings.weights_dtype]

    def num_bytes(self, *, checkpoint: bool) -> int:
        """How much the finished weights take on a disk, and with them a checkpoint: all weights and two moments."""
        finished = sum(value.numel() for value in self.trained.state_dict().values()) * self.dtype_saved.itemsize
        if not checkpoint:
            return finished
        learning = sum(value.numel() for value in self.trained.parameters() if value.requires_grad)
        return finished + 4 * sum(value.numel() for value in self._packed.parameters()) + 2 * 4 * learning

    def overflow(self, dtype: torch.dtype) -> str | None:
        """The name of a finished weight that is not finite in `dtype`, or None."""
        finished = self.trained if self.average is None else self.average.module
        return not_finite({name: value.to(dtype) for name, value in finished.state_dict().items()})

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights replaced by their moving average, if there is one, and put back after."""
        if self.average is None:
            yield
            return
        own = {name: value.clone() for name, value in self.trained.state_dict().items()}
        self.settle()
        try:
            yield
        finally:
            self.trained.load_state_dict(own)

    def settle(self) -> None:
        """Replace the weights by their moving average, if there is one, for good."""
        if self.average is not None:
            self.trained.load_state_dict(self.average.module.state_dict())

    def _kept(self, weights: WeightsOf) -> _PackedForward:
        """A forward with the moving average of the weights, or with a copy of them as they are. FewstepError if there
        is no average, or if not all weights learn.
        """
        if self.trained is not self._network.module:
            raise FewstepError("targets of other weights need a network that learns as a whole, without an adapter")
        if weights == "average" and self.average is None:
            raise FewstepError("the target average is the moving average of the weights; set ema_decay, such as 0.99")
        module = deepcopy(self.trained) if self.average is None or weights == "start" else self.average.module
        module.requires_grad_(False)
        if self._settings.compiled:
            assert isinstance(module, PreTrainedModel)
            compile_layers(module)  # a copy forgets that its layers are compiled
        scales_logits = self._network.architecture.scales_logits
        return _PackedForward(module, self._network.role, None, scales_logits=scales_logits)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """AdamW; vectors (norms, biases) do not decay."""
        settings = self._settings
        parameters = [parameter for parameter in self.trained.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=settings.betas,
            fused=self._accelerator.device.type == "cuda",
        )

    def _micro_step(self, objective: Objective, prepared: Any) -> dict[str, Tensor]:
        accelerator = self._accelerator
        with accelerator.accumulate(self._model), accelerator.autocast():
            loss = objective.loss(self._forward, prepared)
            accelerator.backward(loss.total)
            parts = {"loss": loss.total.detach(), **loss.parts}
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self._model.parameters(), self._settings.clip_norm)
                parts["gradient_norm"] = norm.detach()
            self._optimizer.step()
            self._scheduler.step()
            self._optimizer.zero_grad(set_to_none=True)
        return parts

    def _forward(
        self,
        tokens_RT: Tensor,
        positions_RT: Tensor,
        layout: Layout,
        rows_S: Tensor,
        adapted_RT: Tensor | None = None,
        *,
        gradient: bool = True,
        noisy: NoisyRows | None = None,
        weights: WeightsOf = "own",
    ) -> Tensor:
        mask = training_mask(self._network, layout, positions_RT, compiled=self._settings.compiled)
        if gradient:
            return self._model(tokens_RT, positions_RT, mask, rows_S, adapted_RT, noisy)
        packed = self._packed if weights == "own" else self._other[weights]
        with torch.no_grad():
            return packed(tokens_RT, positions_RT, mask, rows_S, adapted_RT, noisy)


def _schedule(settings: TrainSettings, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Step, from 1 -> its share of the highest learning rate, above 0 in the first step and in the last.

    transformers' schedules are 0 at step 0 of the warm-up and at the end, which are steps that a run here does not
    have.
    """
    shares: Any = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=max(1, settings.num_warmup_steps),
        num_training_steps=settings.max_steps + 1,
    )
    share_of: Callable[[int], float] = shares.lr_lambdas[0]
    return share_of


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a value which is not finite, or None; it waits for the device once."""
    values = {name: value for name, value in tensors.items() if value.is_floating_point() and value.numel()}
    if not values:
        return None
    finite = torch.stack([value.detach().isfinite().all() for value in values.values()])
    return next((name for name, is_finite in zip(values, finite.tolist(), strict=True) if not is_finite), None)
