"""Asking again what a node has prepared, over a connection as the client has it."""

from __future__ import annotations

import time

from tests.unit.nodes.attention.asking import Asker, Call, Query, check, kv, rows

from kvfabric.attention.floats import narrowed
from kvfabric.rpc.v1 import node_pb2
from kvfabric.types import Format
from kvfabric_client.link import Link
from kvfabric_client.prepared import Computed

FORM = Format("float32", block_tokens=16, layers=3, kv_heads=2, head_dim=8)
CONTEXT = kv(FORM, 200)
TIMEOUT_S = 20.0


class Again:
    """Asks at one node again what it has prepared."""

    def __init__(self, ask: Asker) -> None:
        self.ask = ask
        taken = self.link.take_prepared(soon())
        assert taken is not None
        self.connection = taken

    @property
    def link(self) -> Link:
        (link,) = self.ask.client._links.values()
        return link

    def prepare(self, call: Call) -> int:
        message = call.message()
        message.prepare = True
        answer: node_pb2.AttendResponse = self.ask.say("attend", message)
        return answer.prepared

    def begin(self, number: int, call: Call) -> None:
        (query,) = call.queries
        vectors = narrowed(query.vectors, call.query_dtype).tobytes()
        answers = query.vectors[..., 0].size * ((call.value_dim or FORM.head_dim) + 1)
        self.connection.begin(number, call.layer, query.visible, vectors, answers, soon())

    def __call__(self, number: int, call: Call) -> Computed | int:
        self.begin(number, call)
        return self.connection.finish(soon())

    def check(self, number: int, call: Call) -> Computed:
        """It is computed, and right."""
        done = self(number, call)
        assert isinstance(done, Computed), f"verdict {done}"
        lse = call.queries[0].vectors[..., 0].size
        answer = node_pb2.AttendResponse(
            outputs=done.numbers[:-lse].tobytes(), lse=done.numbers[-lse:].tobytes()
        )
        check(answer, call)
        return done


def soon() -> float:
    return time.monotonic() + TIMEOUT_S


def over(span: int, visible: int, count: int = 1, seed: int = 7) -> Call:
    return Call(FORM, [Query(span, rows(FORM, count, seed=seed), visible, CONTEXT)])
