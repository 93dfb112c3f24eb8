"""A format keeps every field on the way through the protocol."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from kvfabric.rpc.v1 import types_pb2
from kvfabric.types import Format

FORMATS = st.builds(
    Format,
    dtype=st.text(),
    block_tokens=st.integers(0, 2**32 - 1),
    packing=st.text(),
    layers=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(0, 2**32 - 1),
    head_dim=st.integers(0, 2**32 - 1),
    kind=st.text(),
)


@given(FORMATS)
def test_a_format_arrives_as_it_was_sent(form: Format) -> None:
    raw = form.to_proto().SerializeToString()
    assert Format.from_proto(types_pb2.Format.FromString(raw)) == form


def test_a_format_has_the_fields_of_its_message() -> None:
    names = [field.name for field in types_pb2.Format.DESCRIPTOR.fields]
    assert [field.name for field in fields(Format)] == names
