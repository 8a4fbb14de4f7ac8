"""Clients of the long run at a server that also send random requests over every option, and rows of the table."""

import itertools
import json
import random
import time

from tests.soak import bodies
from tests.soak.clients import Asked, Client, Seen, over_http
from tests.soak.hostile import acts
from tests.soak.hostile.acts import Wire
from tests.soak.hostile.life import RowResult, judge
from tests.soak.hostile.rows import Target, table
from tests.soak.requests import Model, drawn_request

LARGE = 1 << 20  # bytes of an absurd body: one in a few requests has one
CLIENTS = 4  # concurrent requests of a row at most: other clients run at the same time
SECONDS = 60  # for an answer


class MixedClient(Client):
    def __init__(self, client: Client, seed: int):
        super().__init__(client.host, client.port, client.limit, client.vocab_size, client.mask_id)
        self.target = Target(self.limit, self.vocab_size, self.mask_id, large=LARGE, flood=CLIENTS, seed=seed)
        self.rows, self.numbers = table(self.target), itertools.count(1000, CLIENTS)

    def drawn(self, rng: random.Random, _: Asked) -> Seen:
        """A random request; it may be refused."""
        request = over_http(
            drawn_request(rng, Model(self.limit, self.vocab_size, self.mask_id), self.target.server), self.target.model
        )
        status, data = self.post(request.path, json.dumps(request.body).encode(), bodies.JSON)
        ends = [choice["finish_reason"] for choice in json.loads(data)["choices"]] if status == 200 else []
        right = 400 <= status < 500 or (ends and set(ends) <= {"stop", "length"})
        return Seen("drawn", status, None if right else f"{request.body} answered {status} {data[:500]!r}", len(data))

    def hostile(self, rng: random.Random, _: Asked) -> Seen:
        row, first = rng.choice(self.rows), next(self.numbers)
        result = RowResult(row)
        numbers = range(first, first + min(row.clients, CLIENTS))
        wire = Wire(self.host, self.port)
        judge(result, acts.ACTS[row.act](wire, self.target, row, numbers, time.monotonic() + SECONDS))
        status = next((status for status in result.answers if status is not None), None)
        where = f"{row.kind}: {row.name}: "
        return Seen("hostile", status, where + "; ".join(result.problems) if result.problems else None)
