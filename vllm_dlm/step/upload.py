"""Sends all host arrays of a step to the device in one transfer.

Each array immediately gets its device tensor, which `send` fills. Nothing else
is uploaded until the step is over, so the device never waits for the host
between two kernels.
"""

from functools import cached_property

import numpy as np
import torch

#: bytes; every array starts at a multiple, on which kernels rely
ALIGNMENT = 16
FIRST_CAPACITY = 1 << 16

DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


class Upload:
    """Staging memory on the host and its copy on the device, reused by every step."""

    def __init__(self, device: torch.device, stays: int = 0):
        """`stays`: size in bytes of memory with a fixed address (on the CPU, too) for captured steps, each of which
        starts with `begin`. 0: the memory grows as needed."""
        self.device = device
        self._capacity, self._used = 0, 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers that were too small for this step
        self._sent: torch.cuda.Event | None = None  # the last transfer, which must have read its buffer
        self._host: torch.Tensor | None = None
        if device.type != "cpu" or stays:
            self._host, self._there = self._buffers(stays or FIRST_CAPACITY)
        self.stays = stays > 0
        #: arrays of a captured step by name: address in the memory, shape and dtype
        self.layout: dict[str, tuple] = {}

    def _buffers(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._capacity, self._used = capacity, 0
        pinned = self.device.type == "cuda" and torch.cuda.is_available()
        host = torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned)
        there = torch.empty(capacity, dtype=torch.uint8, device=self.device)
        self._bytes = host.numpy()
        self._typed = {name: there.view(dtype) for name, dtype in DTYPES.items()}
        return host, there

    @cached_property
    def nowhere(self) -> torch.Tensor:
        """[] block number -1: no block"""
        return torch.full((), -1, dtype=torch.int64, device=self.device)

    def __call__(self, array: np.ndarray, name: str | None = None) -> torch.Tensor:
        """The array's tensor on the device, filled by the next `send`. On the CPU, the tensor shares the array's
        memory. `name`: required with a fixed address"""
        if self._host is None:
            return torch.from_numpy(array)
        if self._sent is not None:
            self._sent.synchronize()  # rarely waits, because a step ends with a transfer back to the host
            self._sent = None
        size = array.nbytes
        if self._used + size > self._capacity:
            if self.stays:
                raise MemoryError(f"the tables of a captured step exceed {self._capacity} bytes with {name}")
            self._pending.append((self._host[: self._used], self._there[: self._used]))
            self._host, self._there = self._buffers(max(2 * self._capacity, size + ALIGNMENT))
        start, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        array = np.ascontiguousarray(array)
        if self.stays:
            assert name is not None and name not in self.layout, "each table of a captured step has its own name"
            self.layout[name] = start, array.shape, array.dtype
        self._bytes[start : start + size] = array.reshape(-1).view(np.uint8)
        strides = [stride // array.itemsize for stride in array.strides]
        return self._typed[array.dtype].as_strided(array.shape, strides, start // array.itemsize)

    def begin(self) -> None:
        """Drops arrays that were not sent."""
        self._pending.clear()
        self._used, self.layout = 0, {}

    def send(self) -> None:
        if self._host is None:
            return
        for host, there in [*self._pending, (self._host[: self._used], self._there[: self._used])]:
            there.copy_(host, non_blocking=True)
        self._pending.clear()
        self._used = 0
        if self._host.is_pinned():
            self._sent = torch.cuda.Event()
            self._sent.record()
