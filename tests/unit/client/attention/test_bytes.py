"""What goes over the wire, counted, is what the formula says."""

from __future__ import annotations

import pytest
from tests.unit.client.test_deadlines import eventually

from kvfabric_client import Client, Missing, Query, Sequence, attend_batch

from .lending import FORM, QUERIES, SPACE, TOKENS
from .numbers import Array, check, expected, random_queries

HEADS = 8
ROW = HEADS * FORM.head_dim


@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_of_a_layer(lent: Sequence, kv: Array, rows: int) -> None:
    """Sum over parts of B (Hq D (e + 4) + 4 Hq), plus 2 B Hkv D e once, plus headers."""
    assert eventually(lambda: lent.attend(QUERIES, layer=0).traffic.rounds == 1), "nothing moves"
    known = kv[..., : TOKENS + rows, :]
    new = (range(TOKENS, TOKENS + rows), *kv[1, ..., TOKENS : TOKENS + rows, :])
    queries = random_queries(rows, HEADS, FORM.head_dim)
    got = lent.attend(queries, layer=1, new=new)
    where = range(TOKENS, TOKENS + rows)
    check(got, expected(lent.shape, known, 1, queries, positions=where))
    parts, item = len(got.tokens), 4
    assert parts == 3
    traffic = got.traffic
    assert traffic.rounds == 1
    appended = 2 * rows * FORM.kv_heads * FORM.head_dim * item
    assert traffic.sent_bytes == parts * rows * ROW * item + appended
    assert traffic.received_bytes == parts * rows * (4 * ROW + 4 * HEADS)
    # A frame each way per part and for the append; the home is told its ranges.
    assert 0 < traffic.header_bytes <= 8 * 100
    assert traffic.kernels


def test_requests_of_a_batch_share_messages(client: Client, kv: Array) -> None:
    room = client.open(SPACE)
    with room.sequence(FORM) as one, room.sequence(FORM) as other:
        for number, sequence in enumerate((one, other)):
            sequence.append(range(1000 * number, 1000 * number + 64), kv[..., :64, :])
        queries = random_queries(1, HEADS, FORM.head_dim)
        alone = one.attend(queries, layer=0).traffic
        answers = attend_batch([Query(one, queries), Query(other, queries)], layer=0)
        for answer in answers:
            assert not isinstance(answer, Missing)
            assert answer.traffic.sent_bytes == 2 * alone.sent_bytes
            assert answer.traffic.header_bytes < 2 * alone.header_bytes
