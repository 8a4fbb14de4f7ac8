"""Polls /health from a process of its own, on a new connection each time, and notes how long each answer took.

It also notes how late it woke from each pause: what the machine itself adds when its cores are taken. `python -m
tests.soak.hostile.health HOST PORT FILE`; it ends with its standard input.
"""

import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

PAUSE = 0.02  # seconds between an answer and the next question
PATIENCE = 600  # seconds
RECORD = struct.Struct("<dddd")


@dataclass(frozen=True)
class Probe:
    begin: float  # time.monotonic()
    seconds: float
    late: float  # seconds after the end of its pause
    status: float  # 0: no answer


def poll(host: str, port: int, file) -> None:
    wake = time.monotonic()
    while not select.select([sys.stdin], [], [], 0)[0]:
        begin = time.monotonic()
        late, status = max(begin - wake, 0.0), 0
        try:
            with closing(socket.create_connection((host, port), PATIENCE)) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                words = connection.recv(100).split(b" ", 2)
                status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        except OSError:
            pass
        end = time.monotonic()
        file.write(RECORD.pack(begin, end - begin, late, status))
        file.flush()
        wake = end + PAUSE
        time.sleep(max(wake - time.monotonic(), 0))


class Health:
    """Runs inside of `with`."""

    def __init__(self, host: str, port: int, folder: Path):
        self.file = folder / "health"
        self.file.unlink(missing_ok=True)
        self.command = [sys.executable, "-m", __name__, host, str(port), str(self.file)]

    def __enter__(self) -> "Health":
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE)
        return self

    def __exit__(self, *_) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:  # it waits for a server that does not answer
            self.process.kill()
            self.process.wait()

    def probes(self) -> list[Probe]:
        data = self.file.read_bytes() if self.file.exists() else b""
        whole = len(data) // RECORD.size * RECORD.size
        return [Probe(*values) for values in RECORD.iter_unpack(data[:whole])]

    def since(self, begin: float, end: float, patience: float) -> list[Probe]:
        """Those that overlap [begin, end]. Waits until one that began later has its answer; an unfinished one counts
        with what it has waited so far."""
        give_up = time.monotonic() + patience
        while True:
            found = self.probes()
            if found and found[-1].begin >= end and found[-1].status == 200:
                break
            if time.monotonic() > give_up:
                last = found[-1].begin + found[-1].seconds if found else begin
                found.append(Probe(last, time.monotonic() - last, 0.0, 0))
                break
            time.sleep(0.02)
        return [probe for probe in found if probe.begin <= end and probe.begin + probe.seconds >= begin]


if __name__ == "__main__":
    with open(sys.argv[3], "ab") as records:
        poll(sys.argv[1], int(sys.argv[2]), records)
