"""A network whose layers run with little work around their products, for a CPU.

Axes: R = requests, Q = rows of a forward of one request, N = those of all requests, H = heads, E = head width, D =
hidden width, K = slots of the cache.

A small network's pass on a CPU is products, which read the weights once, and hundreds of small operations between them,
each of which costs microseconds of its own. So here

- the weights of products are packed once as oneDNN reads them fastest, in bfloat16 where rounding is welcome and the
  processor multiplies it; query, key and value are one product, and the activation is computed within the product
  before it;
- what is between the products is computed in float32, in as few operations as torch has for it: the residual rows,
  rotary embeddings, attention and its cache (which in bfloat16 take longer), and the head, whose probabilities decide
  which tokens become final.

The stock module stays the definition of the network: a layer is known by its parts, and what these make of some rows is
compared with what the stock layer makes of them before a network is run so.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from fewstep.engine.parity import difference
from fewstep.errors import FewstepError
from fewstep.models.cache import KVCache
from fewstep.models.gated import GatedAdapter
from fewstep.models.network import Network
from fewstep.models.shared import LeanLinear, merged_weight

FEW_ROWS = 8
"""A product of fewer rows, in float32, is faster with weights as they are: reading them takes the time."""

_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest part by which rows may differ from the stock module's, by its numbers: sums are added up in another order."""


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16; where it has to be emulated it is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class CpuCache(KVCache):
    """A KV cache in which the keys and values of a slot lie together, so that a layer writes its rows in one operation.

    `keys` and `values` are views of them. The two numbers of a key that are turned together are neighbours.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        layers, R, H, K, E = self.keys.shape
        whole = self.keys.new_zeros((layers, R, K, 2, H, E))
        self.keys, self.values = (whole[:, :, :, one].transpose(2, 3) for one in (0, 1))
        self._slots = whole.view(layers, R * K, 2 * H * E).unbind(0)
        self._read_by_length: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._places_N = self._request_R1[:0, 0]

    def place(self, slots_RQ: Tensor, blocks_RQ: Tensor) -> None:
        super().place(slots_RQ, blocks_RQ)
        self._places_N = (self._request_R1 * self.num_slots + slots_RQ).flatten()

    def write(self, rows_NX: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Write the rows' keys, then their values, into a layer's announced slots; returns the keys and values of the
        view.
        """
        self._slots[index].index_copy_(0, self._places_N, rows_NX)
        if self._subset is not None:
            return self._read_layer(self.keys[index]), self._read_layer(self.values[index])
        if self._length not in self._read_by_length:
            cut = (whole[..., : self._length, :].unbind(0) for whole in (self.keys, self.values))
            self._read_by_length[self._length] = list(zip(*cut, strict=True))
        return self._read_by_length[self._length][index]

    def _read_layer(self, slots_RHKE: Tensor) -> Tensor:
        return slots_RHKE[self._picked, :, : self._length]


class CpuNetwork(Network):
    """`network` with fused layers, whose products are in `dtype`: the same role, tokenizer, parameters and head.

    FewstepError, with the reason, for layers that are not of the usual kind.
    """

    cache_kind = CpuCache

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        if network.architecture.sliding_window is not None:
            raise FewstepError(f"{network.name} has layers with a sliding window")
        vars(self).update(vars(network))
        self._dtype = dtype
        try:
            self._layers = [_Layer(layer, self.adapter) for layer in self.module.base_model.layers]
            is_usual = difference(self, network) <= _ALLOWED[network.dtype]
            for layer in self._layers:
                layer.pack(dtype)
            is_usual &= difference(self, network) <= _ALLOWED[dtype]
        except (AttributeError, TypeError, RuntimeError) as error:  # code of any class, which may have other parts
            raise FewstepError(f"the layers of {network.name} have other parts than usual ({error})") from error
        if not is_usual:
            raise FewstepError(f"the layers of {network.name} compute something else than usual ones")

    @property
    def dtype(self) -> torch.dtype:
        """The numbers of the layers' products."""
        return self._dtype

    @property
    def attention_dtype(self) -> torch.dtype:
        return torch.float32

    def _backbone(self, **rows: Any) -> Tensor:
        base, embedded_RQD = self.module.base_model, rows.get("inputs_embeds")
        if embedded_RQD is None:
            embedded_RQD = base.get_input_embeddings()(rows["input_ids"])
        R, Q, D = embedded_RQD.shape
        rows_ND = embedded_RQD.float().reshape(R * Q, D)
        cosine_RQE, sine_RQE = base.rotary_emb(rows_ND, rows["position_ids"])
        half = cosine_RQE.shape[-1] // 2
        turn = torch.complex(cosine_RQE[..., :half], sine_RQE[..., :half])[:, :, None]
        mask, cache = rows["attention_mask"], rows["past_key_values"]
        if (grouped := self._layers[0].num_grouped) > 1:
            mask = mask.repeat(1, 1, grouped, 1)
        for index, layer in enumerate(self._layers):
            rows_ND = layer(rows_ND, (R, Q), turn, mask, index, cache)
        return cast(Tensor, base.norm(rows_ND.view(R, Q, D))).to(self.module.dtype)


class _Layer:
    """Norm, attention, norm, gated MLP, as in the layers of Llama, Qwen 2 and Qwen 3."""

    def __init__(self, layer: Any, adapter: GatedAdapter | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._width, self._scale = attention.head_dim, attention.scaling
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        self._num_heads, self._num_keys, _ = (part.out_features // self._width for part in parts)
        self.num_grouped = self._num_heads // self._num_keys
        self._num_turned = self._num_heads + self._num_keys
        beside = _beside_each_other(self._width)
        self._head_norms = None
        if hasattr(attention, "q_norm"):
            self._head_norms = _Norm(attention.q_norm, beside), _Norm(attention.k_norm, beside)
        kept = torch.arange(self._num_keys * self._width)
        heads = (torch.arange(self._num_turned)[:, None] * self._width + beside).flatten()
        self._qkv = Product(parts, adapter, order=torch.cat([heads, len(heads) + kept]))
        self._out = Product([attention.o_proj], adapter)
        self._gate, self._up = Product([mlp.gate_proj], adapter), Product([mlp.up_proj], adapter)
        self._down = Product([mlp.down_proj], adapter)
        self._activation = mlp.act_fn
        self._is_swish = isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)

    def pack(self, dtype: torch.dtype) -> None:
        for product in (self._qkv, self._out, self._gate, self._up, self._down):
            product.pack(dtype)

    def __call__(
        self,
        rows_ND: Tensor,
        shape: tuple[int, int],
        turn: Tensor,
        mask: Tensor,
        index: int,
        cache: CpuCache | None,
    ) -> Tensor:
        heads, width = self._num_heads, self._width
        qkv_NX = self._qkv(self._norms[0](rows_ND)).float()
        qkv = qkv_NX.view(*shape, -1, width)
        if self._head_norms is not None:
            for norm, first, end in zip(self._head_norms, (0, heads), (heads, self._num_turned), strict=True):
                qkv[:, :, first:end] = norm(qkv[:, :, first:end])
        torch.view_as_complex(qkv.view(*shape, -1, width // 2, 2)[:, :, : self._num_turned]).mul_(turn)
        if cache is not None:
            key, value = cache.write(qkv_NX[:, heads * width :], index)
        else:
            key, value = (part.transpose(1, 2) for part in qkv[:, :, heads:].chunk(2, 2))
        rows_ND = rows_ND + self._out(self._attend(qkv[:, :, :heads].transpose(1, 2), key, value, mask))
        return rows_ND.add_(self._down(self._inner(self._norms[1](rows_ND))))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """[N, H E] of queries [R, H, Q, E]; those that share a key head are rows of one, so nothing is repeated."""
        R, H, Q, E = query.shape
        attend = nn.functional.scaled_dot_product_attention
        if self.num_grouped == 1:
            out = attend(query, key, value, attn_mask=mask, scale=self._scale)
        else:
            query = query.reshape(R, self._num_keys, self.num_grouped * Q, E)
            out = attend(query, key, value, attn_mask=mask, scale=self._scale).reshape(R, H, Q, E)
        return out.transpose(1, 2).reshape(R * Q, H * E)

    def _inner(self, rows_ND: Tensor) -> Tensor:
        """The inner rows of the MLP; the activation is computed in the product where that has it."""
        rows_ND = rows_ND.to(self._up.dtype)
        if self._is_swish and self._up.fuses(rows_ND):
            return self._up.times(rows_ND, self._gate.swish(rows_ND))
        return cast(Tensor, self._activation(self._gate(rows_ND))) * self._up(rows_ND)


def _beside_each_other(width: int) -> Tensor:
    """The order in which the two numbers of a head that are turned together, half a head apart, are neighbours."""
    return torch.arange(width).view(2, -1).T.flatten()


class _Norm:
    """x / sqrt(mean of x^2 + eps) * weight, in float32; `order` of the numbers of a row."""

    def __init__(self, norm: Any, order: Tensor | None = None) -> None:
        weight = norm.weight.detach().float()
        self._weight = weight if order is None else weight[order]
        self._eps = torch.tensor(float(norm.variance_epsilon))
        self._share = 1 / len(weight)

    def __call__(self, rows: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return (rows * torch.addcmul(self._eps, length, length, value=self._share).rsqrt_()).mul_(self._weight)


class Product:
    """Linear modules of one input as one product of rows [N, D]; with a gated adapter for the rows it is open for.

    `order`: of the numbers of a row that comes out. Until it is packed it computes in float32.
    """

    def __init__(self, modules: Sequence[Any], adapter: GatedAdapter | None, order: Tensor | None = None) -> None:
        parts = [_weight_and_bias(module if adapter is None else module.get_base_layer()) for module in modules]
        everything = slice(None) if order is None else order
        self.dtype = torch.float32
        self._own: Tensor | None = torch.cat([weight.detach() for weight, _ in parts])[everything].float()
        biases = [bias.detach() for _, bias in parts if bias is not None]
        self._bias = torch.cat(biases)[everything].float() if biases else None
        self._packed: Tensor | None = None
        self._adapter = adapter
        if adapter is not None:
            down, up = _low_rank(modules)
            self._low_rank = down, up[:, everything].contiguous()

    def pack(self, dtype: torch.dtype) -> None:
        """Compute in `dtype` from now on, with packed weights; in float32 only where there are many rows."""
        assert self._own is not None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._own.to(dtype))
        if dtype != torch.float32:
            self._own, self._bias = None, None if self._bias is None else self._bias.to(dtype)
        self.dtype = dtype

    def __call__(self, rows_ND: Tensor) -> Tensor:
        """In float32, or in the numbers that are packed."""
        if self._uses_packed(rows_ND):
            out = self._packed_product(rows_ND.to(self.dtype), "none")
        else:
            assert self._own is not None
            out = nn.functional.linear(rows_ND, self._own, self._bias)
        if self._adapter is None or (open_rows := self._adapter.open_rows) is None:
            return out
        down, up = self._low_rank
        return torch.addmm(out.float(), nn.functional.linear(rows_ND.float(), down).mul_(open_rows.reshape(-1, 1)), up)

    def fuses(self, rows_ND: Tensor) -> bool:
        """Whether something may be done to the product of these rows within it."""
        return self._uses_packed(rows_ND) and (self._adapter is None or self._adapter.open_rows is None)

    def swish(self, rows_ND: Tensor) -> Tensor:
        """silu of the product, of rows for which it `fuses`."""
        return self._packed_product(rows_ND, "swish")

    def times(self, rows_ND: Tensor, other: Tensor) -> Tensor:
        """The product times other rows, of rows for which it `fuses`."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(rows_ND, other, self._packed, self._bias, "mul"))

    def _uses_packed(self, rows_ND: Tensor) -> bool:
        return self._packed is not None and (self._own is None or len(rows_ND) >= FEW_ROWS)

    def _packed_product(self, rows_ND: Tensor, afterwards: str) -> Tensor:
        pointwise = torch.ops.mkldnn._linear_pointwise.default
        return cast(Tensor, pointwise(rows_ND, self._packed, self._bias, afterwards, [], ""))


def _weight_and_bias(module: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(module, LeanLinear):
        return merged_weight(module), module.get_base_layer().bias
    if type(module) is not nn.Linear:
        raise TypeError(f"a {type(module).__name__} in the place of a linear module")
    return module.weight, module.bias


def _low_rank(modules: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The adapters of these modules as two factors of their common product: [D, all ranks], [all ranks, all widths]."""
    names = [module.active_adapters[0] for module in modules]
    down = [module.lora_A[name].weight.detach().float() for name, module in zip(names, modules, strict=True)]
    up = [
        module.lora_B[name].weight.detach().float() * module.scaling[name]
        for name, module in zip(names, modules, strict=True)
    ]
    return torch.cat(down), torch.block_diag(*up).T.contiguous()
