"""Threads that wait for each other do not take the cores of a busy machine."""

import os
import subprocess
import sys

import pytest
import torch

from fewstep.models import threads


@pytest.mark.parametrize(
    ("first", "given", "policy"),
    [("", None, "passive"), ("import torch", None, None), ("", "active", "active")],
)
def test_waiting_is_set_before_torch_is_loaded_unless_the_user_has(
    first: str, given: str | None, policy: str | None
) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    program = f"{first}\nimport fewstep, os\nprint(os.environ.get('OMP_WAIT_POLICY'))"
    environment = kept if given is None else {**kept, "OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(policy)


def test_small_forwards_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        for num_parameters, num_requests in ((10**7, 1), (10**9, 1), (10**7, 32)):
            with threads.sparing_threads(torch.device("cpu"), num_parameters, num_requests):
                seen.append(torch.get_num_threads())
            assert torch.get_num_threads() == 2
        assert seen == [1, 2, 2]
    finally:
        torch.set_num_threads(before)
