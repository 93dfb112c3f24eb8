"""What a node counts of its attention, and what of it the answers tell."""

from __future__ import annotations

from tests.unit.client.conftest import counter
from tests.unit.nodes.attention.asking import Asker, Call, Query, ids, kv, rows

from kvfabric.types import Format

FORM = Format("bfloat16", block_tokens=16, layers=2, kv_heads=2, head_dim=8)
TOKEN_BYTES = 2 * 2 * 8 * 2  # K and V, in one layer


def test_rows_bytes_and_gaps_are_counted_and_a_shared_block_is_read_once(ask: Asker) -> None:
    context = kv(FORM, 40)
    with ask.room.sequence(FORM) as sequence:
        sequence.append(ids(40), context)
        with sequence.fork(32) as fork:
            spans = [ask.span_of(FORM, one.id) for one in (sequence, fork)]
            queries = [
                Query(spans[0], rows(FORM, 2), 40, context),
                Query(spans[1], rows(FORM, 3), 50, context),
            ]
            answer = ask.attend(Call(FORM, queries))
            assert list(answer.tokens) == [40, 32]
            assert [(g.query, g.first_token, g.end_token) for g in answer.gaps] == [(1, 32, 50)]
            assert answer.stacked == 2
            assert answer.read_bytes == 40 * TOKEN_BYTES
            assert counter(ask.client, "kvfabric_node_attended_rows_total") == 5
            assert counter(ask.client, "kvfabric_node_attends_stacked_total") == 2
            assert counter(ask.client, "kvfabric_node_attend_gap_tokens_total") == 18
            of_kernel = f'_total{{kernel="{answer.kernel}"}}'
            read = counter(ask.client, "kvfabric_node_attended_bytes" + of_kernel)
            assert read == 40 * TOKEN_BYTES
            assert counter(ask.client, "kvfabric_node_attended_seconds" + of_kernel) > 0
            assert counter(ask.client, "kvfabric_node_spans") == 2
