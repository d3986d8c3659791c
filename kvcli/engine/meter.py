"""Wall time and peak memory of what a process does, phase by phase."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch


class Memory(Protocol):
    """Bytes in use now, and their peak since the last `reset`."""

    source: str
    retains: bool
    """Whether freed memory still counts until `settle`, so that peaks need a pass of their own that settles often."""

    def now(self) -> int | None: ...

    def reset(self) -> None: ...

    def peak(self) -> int | None: ...

    def settle(self) -> None:
        """Gives back what is free but still held. The next allocations cost more: never inside a timed pass."""


class CudaMemory:
    """Bytes of tensors on one GPU, as PyTorch's allocator counts them."""

    source, retains = "cuda: max_memory_allocated", False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def settle(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class ProcessMemory:
    """Resident memory of this process; Linux lets a process reset its own peak."""

    source, retains = "rss: VmHWM", True
    _reset, _status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self.reset()  # raises OSError where it cannot be done
        self._read("VmHWM")

    def now(self) -> int:
        return self._read("VmRSS")

    def reset(self) -> None:
        self._reset.write_text("5")

    def peak(self) -> int:
        return self._read("VmHWM")

    def settle(self) -> None:
        gc.collect()
        if self._trim is not None:
            self._trim(0)

    def _read(self, name: str) -> int:
        match = re.search(rf"^{name}:\s+(\d+) kB", self._status.read_text(), re.M)
        if match is None:
            raise OSError(f"no {name} in {self._status}")
        return int(match[1]) * 1024


class NoMemory:
    """Where peaks cannot be read."""

    source, retains = "none", False

    def now(self) -> None:
        return None

    def reset(self) -> None:
        pass

    def peak(self) -> None:
        return None

    def settle(self) -> None:
        gc.collect()


def memory_of(device: torch.device) -> Memory:
    """What can be read of the device's memory, or of this process's where the device is the CPU."""
    if device.type == "cuda":
        return CudaMemory(device)
    if device.type == "cpu":
        with suppress(OSError):
            return ProcessMemory()
    return NoMemory()


@dataclass
class Meter:
    """Seconds and peak bytes of named phases, with the device's work finished at both ends of each."""

    device: torch.device
    memory: Memory
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    cpu: float = 0.0
    """CPU seconds of this process in all phases."""

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds to the phase's seconds and raises its peak."""
        self.synchronise()
        self.memory.reset()
        cpu, started = time.process_time(), time.perf_counter()
        yield
        self.synchronise()
        self.cpu += time.process_time() - cpu
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        peak = self.memory.peak()
        if peak is not None:
            self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def nothing(self, name: str) -> None:
        """A phase that this method does not have."""
        self.seconds.setdefault(name, 0.0)
        self.peaks.setdefault(name, 0)
