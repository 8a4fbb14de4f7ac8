"""What one step sends to the device: arrays that the host knows, in one transfer.

An array gets its tensor at once, before its contents are on the way; `send`
brings them all. Nothing is uploaded after that until the step is over, so the
device never waits for the host between two kernels.
"""

import numpy as np
import torch

#: every array starts at a multiple of so many bytes, which kernels may take for granted
ALIGNMENT = 16
FIRST_CAPACITY = 1 << 16

DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


class Upload:
    """Of a device; the same memory serves step after step."""

    def __init__(self, device: torch.device):
        self.device = device
        self._capacity, self._used = 0, 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # buffers that were too small for this step
        self._sent: torch.cuda.Event | None = None  # the last transfer, which must have read its buffer
        self._host: torch.Tensor | None = None
        if device.type != "cpu":
            self._host, self._there = self._buffers(FIRST_CAPACITY)

    def _buffers(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._capacity, self._used = capacity, 0
        pinned = self.device.type == "cuda" and torch.cuda.is_available()
        host = torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned)
        return host, torch.empty(capacity, dtype=torch.uint8, device=self.device)

    def __call__(self, array: np.ndarray) -> torch.Tensor:
        """Its tensor on the device, filled by the next `send`. On the CPU it is the array itself."""
        if self._host is None:
            return torch.from_numpy(array)
        if self._sent is not None:
            self._sent.synchronize()  # over long ago, as a rule: a step ends with what it reads back
            self._sent = None
        size = array.nbytes
        if self._used + size > self._capacity:
            self._pending.append((self._host[: self._used], self._there[: self._used]))
            self._host, self._there = self._buffers(max(2 * self._capacity, 2 * size))
        start, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        self._host[start : start + size].numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return self._there[start : start + size].view(DTYPES[array.dtype]).view(array.shape)

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
