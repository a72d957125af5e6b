"""How much power a device draws, where it says so: NVIDIA's cards, through the tool that comes with their driver."""

import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_EVERY_MS = 100


class Power:
    """What was drawn while `sampled_power` was entered: the mean in watts, None if the device does not say."""

    watts: float | None = None


@contextmanager
def sampled_power(device: torch.device) -> Iterator[Power]:
    """Ask for the power a few times a second, in another process."""
    power = Power()
    command = _command(device)
    if command is None:
        yield power
        return
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asking:
        try:
            yield power
        finally:
            asking.terminate()
            told, _ = asking.communicate()
    samples = [float(line) for line in told.split("\n") if line.strip().replace(".", "", 1).isdigit()]
    # The first are of the time before the work, as the driver averages.
    later = samples[len(samples) // 4 :]
    power.watts = statistics.fmean(later) if later else None


def _command(device: torch.device) -> list[str] | None:
    tool = shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        return None
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return [tool, f"--id={card}", "--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}"]
