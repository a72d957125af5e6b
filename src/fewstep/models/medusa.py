"""Medusa heads: each guesses the token some positions further on, from one hidden row. arXiv 2401.10774.

Axes: D = hidden width, K = heads, V = vocabulary.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.files import write_folder_whole
from fewstep.json_files import read_json, write_json_whole
from fewstep.models.checkpoint_files import HEADS
from fewstep.models.load import weights_hash
from fewstep.models.network import Network

WEIGHTS = "medusa.safetensors"


class MedusaHead(nn.Module):
    """W2 (h + SiLU(W1 h + b)); W1 and b begin at 0, so that a head of a copied W2 begins as the network's own."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.residual = nn.Linear(width, width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(hidden + nn.functional.silu(self.residual(hidden)))


class MedusaHeads(nn.Module):
    """K heads on rows after the final norm; of the row that scores position t, head k (from 0) scores t + 1 + k."""

    def __init__(self, num_heads: int, width: int, vocab_size: int, never_drawn: Tensor | None = None) -> None:
        """`never_drawn`: the ids that the network never draws, so that no head guesses them; by default none."""
        super().__init__()
        if num_heads < 1:
            raise FewstepError(f"medusa needs at least 1 head, got {num_heads}")
        self.width, self.vocab_size = width, vocab_size
        self.never_drawn: Tensor
        never_drawn = torch.zeros(0, dtype=torch.long) if never_drawn is None else never_drawn.clone()
        self.register_buffer("never_drawn", never_drawn, persistent=False)
        self.heads = nn.ModuleList(MedusaHead(width, vocab_size) for _ in range(num_heads))

    @classmethod
    def of(cls, network: Network, num_heads: int) -> "MedusaHeads":
        """Heads that begin as the network's own, in its precision and on its device."""
        own = network.module.get_output_embeddings().weight
        heads = cls(num_heads, own.shape[1], own.shape[0], network.never_drawn).to(network.device, network.dtype)
        with torch.no_grad():
            for name, weight in heads.named_parameters():
                if name.endswith("output.weight"):
                    weight.copy_(own)
        return heads

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in float32, [..., D] -> [..., K, V]."""
        return torch.stack([head(hidden) for head in self.heads], -2).float()

    @property
    def num_drawable(self) -> int:
        """Tokens that a head may guess."""
        return self.vocab_size - len(self.never_drawn)

    def score(self, hidden: Tensor) -> Tensor:
        """As `forward`, with what is never drawn at -inf."""
        return self(hidden).index_fill_(-1, self.never_drawn, float("-inf"))


def save_heads(heads: MedusaHeads, folder: str | Path, network: Network) -> None:
    """Write a new folder of weights in bfloat16 and a description that names the network they were trained for."""
    with write_folder_whole(folder) as target:
        write_heads(heads, target, network)


def write_heads(heads: MedusaHeads, folder: Path, network: Network) -> None:
    """As `save_heads`, into a folder that exists."""
    save_file(
        {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in heads.state_dict().items()},
        folder / WEIGHTS,
    )
    write_json_whole(
        folder / HEADS,
        {
            "num_heads": len(heads),
            "width": heads.width,
            "vocab_size": heads.vocab_size,
            "base": network.name,
            "base_hash": weights_hash(network),
        },
    )


def load_heads(folder: str | Path, network: Network) -> MedusaHeads:
    """Heads for this network, on its device; FewstepError if they are damaged or another's."""
    folder = Path(folder)
    if not (folder / HEADS).is_file():
        raise FewstepError(f"no Medusa heads in {folder}: it holds no {HEADS}")
    described = read_json(folder / HEADS)
    try:
        sizes = tuple(int(described[key]) for key in ("num_heads", "width", "vocab_size"))
        base, base_hash = str(described["base"]), str(described["base_hash"])
        if sizes[1:] != (network.module.config.hidden_size, network.vocab_size):
            raise FewstepError(
                f"the Medusa heads in {folder} are for rows of width {sizes[1]} and {sizes[2]} tokens, {network.name} "
                f"has {network.module.config.hidden_size} and {network.vocab_size}; load the heads trained for it"
            )
        if base_hash != weights_hash(network):
            raise FewstepError(
                f"the Medusa heads in {folder} were trained for other weights ({base}) than those of {network.name}; "
                "load the model that they belong to, in float32 or bfloat16"
            )
        heads = MedusaHeads(sizes[0], sizes[1], sizes[2], network.never_drawn)
        heads.load_state_dict(load_file(folder / WEIGHTS))
    except FewstepError:
        raise
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise FewstepError(f"cannot load the Medusa heads in {folder}: {' '.join(str(error).split())[:300]}") from error
    return heads.to(network.device, network.dtype).eval()
