# SPDX-License-Identifier: Apache-2.0
"""Memory of this process and of this machine, as the kernel counts it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


class Peak:
    """Largest resident size of this process since `start`, in bytes: the kernel's mark, or a sampling thread."""

    def __init__(self) -> None:
        self._sampled, self._kernel, self._stop = 0, True, threading.Event()

    @contextlib.contextmanager
    def start(self) -> Iterator[Peak]:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the mark falls back to the size of now
        except OSError:
            self._kernel = False
            threading.Thread(target=self._sample, daemon=True).start()
        try:
            yield self
        finally:
            self._stop.set()

    def bytes(self) -> int:
        return status_bytes("VmHWM") if self._kernel else max(self._sampled, status_bytes("VmRSS"))

    def _sample(self) -> None:
        while not self._stop.wait(0.001):
            self._sampled = max(self._sampled, status_bytes("VmRSS"))


def status_bytes(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    return _size(Path("/proc/self/status"), field)


def available_bytes() -> int:
    """What this process can still take: the machine's available memory, or less where a control group says so."""
    free = _size(Path("/proc/meminfo"), "MemAvailable")
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        limit, taken = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - taken)
    return free


def _size(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{path}: expected a line {field}, got none")
