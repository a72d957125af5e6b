"""What learns: weights, optimizer, schedule and moving average, and one step of theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_scheduler

from fewstep.models.attention import compile_layers, prepare_attention, training_mask
from fewstep.models.masks import Layout
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Network
from fewstep.train.lora import LoRASettings, add_lora
from fewstep.train.objectives import Objective
from fewstep.train.settings import TrainSettings
from fewstep.train.stream import PreparedStream


class _PackedForward(nn.Module):
    """Backbone and head in one module, so that a distributed wrapper sees one forward: logits [S, V] of flat rows.

    With Medusa `heads` in place of the network's own they are [S, K, V].
    """

    def __init__(self, module: nn.Module, heads: MedusaHeads | None) -> None:
        super().__init__()
        self.module = module
        self.heads = heads

    def forward(self, tokens_RT: Tensor, positions_RT: Tensor, mask: Any, rows_S: Tensor) -> Tensor:
        module: Any = self.module
        causal_lm = module.get_base_model() if hasattr(module, "get_base_model") else module
        embedded_RTD = causal_lm.get_input_embeddings()(tokens_RT)
        if torch.is_autocast_enabled(tokens_RT.device.type):
            # The residual stream, the rotary tables and with them queries and keys take the precision of this, which
            # autocast leaves in float32.
            embedded_RTD = embedded_RTD.to(torch.get_autocast_dtype(tokens_RT.device.type))
        hidden = causal_lm.base_model(
            inputs_embeds=embedded_RTD, attention_mask=mask, position_ids=positions_RT, use_cache=False
        ).last_hidden_state
        head = causal_lm.get_output_embeddings() if self.heads is None else self.heads
        return head(hidden.flatten(0, 1).index_select(0, rows_S))


class Learner:
    """Changes `network` in place. `trained` is its module, the PEFT model around it, or heads on the frozen network."""

    def __init__(
        self,
        network: Network,
        settings: TrainSettings,
        accelerator: Accelerator,
        lora: LoRASettings | None = None,
        heads: MedusaHeads | None = None,
    ) -> None:
        self._settings, self._accelerator = settings, accelerator
        network.module.float().train()
        prepare_attention(network.module, compiled=settings.compiled)
        body: nn.Module = add_lora(network, lora) if lora else network.module
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
        optimizer = self._new_optimizer()
        # accelerate steps the scheduler once a process; the schedule counts those calls.
        scheduler = get_scheduler(
            settings.schedule,
            optimizer,
            num_warmup_steps=settings.num_warmup_steps * accelerator.num_processes,
            num_training_steps=settings.max_steps * accelerator.num_processes,
        )
        self._packed = _PackedForward(body, heads)
        self._model, self._optimizer, self._scheduler = accelerator.prepare(self._packed, optimizer, scheduler)

        self.learning_rate = 0.0
        """That of the last step; transformers' schedules begin the first at 0."""

    def step(self, objective: Objective, stream: PreparedStream) -> dict[str, Tensor]:
        """An optimizer step; figures averaged over its micro-batches, on the device."""
        self.learning_rate = float(self._scheduler.get_last_lr()[0])
        micros = [self._micro_step(objective, stream.next()) for _ in range(self._settings.accumulation)]
        if self.average is not None:
            self.average.update_parameters(self.trained)
        parts = {name: torch.stack([micro[name] for micro in micros]).mean() for name in micros[0]}
        return parts | {"gradient_norm": micros[-1]["gradient_norm"]}

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
        self, tokens_RT: Tensor, positions_RT: Tensor, layout: Layout, rows_S: Tensor, *, gradient: bool = True
    ) -> Tensor:
        mask = training_mask(layout, compiled=self._settings.compiled)
        if gradient:
            return self._model(tokens_RT, positions_RT, mask, rows_S)
        with torch.no_grad():
            return self._packed(tokens_RT, positions_RT, mask, rows_S)
