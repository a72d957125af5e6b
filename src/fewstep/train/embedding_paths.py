"""Paths of a denoiser's sampler from noise to text, collected once and learnt from: each point of a path leads to its
end.

A shard holds, for N prompts, the whole canvas as it ended and the noisy rows at K times of the path. Unlike points
between data and noise, these are points that sampling visits, and what they lead to is what the teacher writes (paths
that are learnt straight, as reflow does, arXiv 2209.03003, and consistency distillation, arXiv 2303.01469).

Axes: N = paths, K = points of a path, G = positions of the canvas, D = hidden width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.decode.embedding import EmbeddingSampling
from fewstep.decode.embedding_generator import EmbeddingSampler, sampler_for
from fewstep.decode.generator import answer
from fewstep.decode.requests import Request
from fewstep.decode.sampling import Sampling
from fewstep.errors import FewstepError
from fewstep.models.checkpoint_files import reading
from fewstep.models.load import network_hash
from fewstep.models.network import Network
from fewstep.shards import Shards
from fewstep.train.examples import Examples, fingerprint

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Paths:
    """N paths: `examples` are the prompts with the whole canvas that each ended in, `times_K` the times of its points,
    pure noise first, and `states_NKGD` (float16) their noisy rows.
    """

    examples: Examples
    times_K: Tensor
    states_NKGD: Tensor

    def fingerprint(self) -> str:
        """Differs for other paths."""
        return f"{self.examples.fingerprint()} {fingerprint(self.times_K)} {tuple(self.states_NKGD.shape)}"


def collect_paths(
    network: Network,
    prompts: Sequence[list[int]],
    folder: Path,
    *,
    steps: int = 64,
    points: int = 4,
    canvas_length: int = 128,
    batch_size: int = 256,
    shard_size: int = 512,
    seed: int = 0,
    worker: tuple[int, int] = (0, 1),
) -> Shards:
    """The paths of these prompts, each with a seed of its own, by Euler steps; shards that are there are left alone.

    `points`: of each path, evenly spaced over its steps from pure noise on; it divides `steps`. FewstepError for a
    network that is not in embedding space, for a prompt that does not fit, or if the folder was made otherwise.
    """
    if network.role.embedding_space is None:
        raise FewstepError(
            f"paths are those of a network in embedding space, and {network.name} has the role {network.role.name}; "
            "train it with fewstep train embedding first"
        )
    if points < 1 or steps % points:
        divisors = [number for number in range(1, steps + 1) if steps % number == 0]
        closest = min(divisors, key=lambda number: abs(number - points), default=1)
        raise FewstepError(f"points must divide the {steps} steps, got {points}; take {closest}")
    sampling = EmbeddingSampling(steps=steps, sampler="euler")
    num_shards = -(-len(prompts) // shard_size)
    shards = Shards.create(
        folder,
        num_shards=num_shards,
        suffix=SUFFIX,
        settings={
            "teacher": network_hash(network),
            "sampling": asdict(sampling),
            "points": points,
            "canvas_length": canvas_length,
            "seed": seed,
            "prompts": len(prompts),
        },
    )
    for index in shards.unfinished(worker):
        first = index * shard_size
        requests = [
            Request(
                prompt_ids=prompt,
                max_new_tokens=canvas_length,
                seed=seed + first + i,
                sampling=Sampling(temperature=1.0),
            )
            for i, prompt in enumerate(prompts[first : first + shard_size])
        ]
        tensors = _collected(network, requests, sampling, points=points, batch_size=batch_size)
        with shards.write(index) as path:
            save_file(tensors, path)
    return shards


def _collected(
    network: Network, requests: Sequence[Request], sampling: EmbeddingSampling, *, points: int, batch_size: int
) -> dict[str, Tensor]:
    sampler = sampler_for(network, sampling, requests, batch_size=batch_size)
    every = sampler.steps // points
    states: dict[int, dict[int, Tensor]] = {}

    def keep(sampler: EmbeddingSampler) -> None:
        for number, step, x_GD in sampler.rows():
            if step % every == 0 and step < sampler.steps:
                states.setdefault(number, {})[step] = x_GD.to("cpu", torch.float16)

    sampler.listeners = [keep]
    sampler.on_begin = keep
    # Requests are submitted longest first, and numbered so.
    order = sorted(range(len(requests)), key=lambda i: -(len(requests[i].prompt_ids) + requests[i].max_new_tokens))
    outputs = answer(sampler, requests)
    by_index = {index: states[number] for number, index in enumerate(order)}
    found = [torch.stack([by_index[i][step] for step in sorted(by_index[i])]) for i in range(len(requests))]
    offsets = torch.tensor([0, *(len(request.prompt_ids) for request in requests)]).cumsum(0)
    return {
        "prompt_ids": torch.tensor([one for request in requests for one in request.prompt_ids], dtype=torch.int32),
        "prompt_offsets": offsets,
        "canvas_NG": torch.stack([output.canvas_ids_G for output in outputs]).int(),
        "times_K": torch.tensor([1 - i / points for i in range(points)]),
        "states_NKGD": torch.stack(found),
    }


def read_paths(folder: Path) -> Paths:
    """All finished shards. FewstepError if there is none, or naming one that is damaged."""
    shards = Shards.open(folder)
    finished = shards.finished()
    if not finished:
        raise FewstepError(f"{folder} holds no finished shard of paths; repeat the command that makes it")
    parts, states = list[Examples](), list[Tensor]()
    times_K = torch.zeros(0)
    for index in finished:
        with reading(shards.path(index)):
            tensors = load_file(shards.path(index))
            canvas_NG = tensors["canvas_NG"]
            offsets = torch.arange(len(canvas_NG) + 1) * canvas_NG.shape[1]
            parts.append(Examples(tensors["prompt_ids"], tensors["prompt_offsets"], canvas_NG.flatten(), offsets))
            states.append(tensors["states_NKGD"])
            times_K = tensors["times_K"]
    return Paths(Examples.joined(parts), times_K, torch.cat(states))
