"""How many threads a forward on a CPU takes, so that it is fast on an idle machine and on one whose cores are busy.

OpenMP's threads wait for each other by spinning. Where the cores are busy, a thread that spins keeps the one that it
waits for from running, and a small forward, which waits hundreds of times, takes many times as long. `fewstep` asks for
waiting that sleeps when it is imported (see its `__init__`); OpenMP reads that when torch is loaded, and sleeping costs
a small forward more than a second thread gains. So small forwards take one thread, which waits for nobody, whatever was
loaded first. docs/models.md has the figures.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 40_000_000
"""Parameters times requests up to which one thread is as fast as two or faster (measured on two cores)."""


@contextmanager
def sparing_threads(device: torch.device, num_parameters: int, num_requests: int) -> Iterator[None]:
    """One thread for small forwards on a CPU; what was set before is set again after it.

    A user who has set OMP_NUM_THREADS has decided already.
    """
    before = torch.get_num_threads()
    is_small = num_parameters * num_requests <= SMALL
    if device.type != "cpu" or before == 1 or not is_small or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
