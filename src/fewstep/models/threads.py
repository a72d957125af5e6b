"""How many threads a forward on a CPU takes, so that it is fast on an idle machine and on one whose cores are busy.

OpenMP's threads wait for each other by spinning. Where the cores are busy, a thread that spins keeps the one that it
waits for from running, and a small forward, which waits hundreds of times, takes ten times as long. `fewstep` asks for
waiting that sleeps when it is imported (see its `__init__`); OpenMP reads that when torch is loaded. If torch was there
before, its threads spin, and small forwards take one thread, which waits for nobody. docs/models.md has the figures.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WAITING_IS_SET = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
"""Whether `fewstep` or the user has said how threads wait; else torch was loaded first, and they spin."""

SMALL_NETWORK = 50_000_000
"""Parameters up to which a forward of few rows gains less from a second thread than it can lose."""

FEW_REQUESTS = 4


@contextmanager
def sparing_threads(device: torch.device, num_parameters: int, num_requests: int) -> Iterator[None]:
    """One thread for small forwards on a CPU while torch's threads spin; what was set before is set again after it."""
    before = torch.get_num_threads()
    is_small = num_parameters <= SMALL_NETWORK and num_requests <= FEW_REQUESTS
    if device.type != "cpu" or before == 1 or not is_small or WAITING_IS_SET or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
