"""What a device can do at most, measured before anything is held against it: reading, copying, matrix products."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.measure.roofline import Rates
from fewstep.measure.timing import matmul_flops_per_second

_SERIES = 5
_MOST_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Of a buffer that is read or copied. More changes no figure, and far less would stay in a cache."""

_SERIES_BYTES = {"cuda": 1 << 36, "cpu": 1 << 27}


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Bytes a second that are read, and that are copied (read and written, both counted); operations a second.

    `read_bytes`: the size of what was read. Weights that fit in a cache are read faster than the memory is.
    """

    read_bytes: int
    read_bytes_per_second: float
    copy_bytes_per_second: float
    flops_per_second: float

    @property
    def limits(self) -> Rates:
        """The faster of reading and copying: a floor lies below what any program of this machine was seen to do."""
        return Rates(
            bytes_per_second=max(self.read_bytes_per_second, self.copy_bytes_per_second),
            flops_per_second=self.flops_per_second,
        )


def measure_device(device: torch.device, dtype: torch.dtype, *, weight_bytes: int) -> DeviceRates:
    """The rates of a device for weights of so many bytes, in about a second; the best of a few series each.

    Read is a buffer as large as the weights, at most 1 GiB on a GPU and 128 MiB on a CPU.
    """
    most = _MOST_BYTES[device.type]
    read_bytes = min(max(weight_bytes, 1 << 16), most) // (1 << 12) * (1 << 12)
    read = _read_bytes_per_second(read_bytes, device)
    copy = _copy_bytes_per_second(most, device)
    size, repeats = (8192, 20) if device.type == "cuda" else (1024, 2)
    return DeviceRates(
        read_bytes=read_bytes,
        read_bytes_per_second=read,
        copy_bytes_per_second=copy,
        flops_per_second=matmul_flops_per_second(size, device, dtype, repeats, of=max),
    )


def _read_bytes_per_second(num_bytes: int, device: torch.device) -> float:
    """By a sum or a product with a vector, whichever is faster."""
    buffer, vector = torch.ones(num_bytes // 4, device=device), torch.ones(1024, device=device)
    ways: list[Callable[[], Tensor]] = [buffer.sum, lambda: buffer.view(-1, 1024) @ vector]
    return max(num_bytes / _seconds(way, device, num_bytes) for way in ways)


def _copy_bytes_per_second(num_bytes: int, device: torch.device) -> float:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source), device, 2 * num_bytes)


def _seconds(run: Callable[[], Tensor], device: torch.device, num_bytes: int) -> float:
    """Of one run, the shortest mean of a few series; each is so long that waiting for the device does not count."""
    repeats = max(1, min(1000, _SERIES_BYTES[device.type] // num_bytes))
    run()
    return min(_series(run, device, repeats) for _ in range(_SERIES))


def _series(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    wait_for(device)
    started_s = time.perf_counter()
    for _ in range(repeats):
        run()
    wait_for(device)
    return (time.perf_counter() - started_s) / repeats


def wait_for(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
