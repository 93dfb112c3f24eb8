"""What every kernel must do: the test of one subclasses this and says which it is.

Tolerances: a kernel adds in float32, in an order of its own. With n products of size s an lse is
off by at most about n units of rounding of s; what is allowed below is a small multiple of
sqrt(n), which random signs give. Where it widens K and V exactly, their dtype makes no difference.
"""

from __future__ import annotations

import abc
import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.attention.scattered import Case, scattered

from kvfabric.attention.floats import STORED, narrowed
from kvfabric_nodes.attention.kernels import Kernel

DTYPES = ("float32", "bfloat16", "float16")

# Row 0 sees the first 20 of 64 tokens, row 1 all of them, and so on.
HALF_SEEN = Case(
    3,
    kv_heads=2,
    dim=40,
    block_tokens=64,
    pieces=((0, 64),),
    rows=12,
    positions=(19, 63) * 6,
    visible=64,
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """All that the contract names, small."""
    block = draw(st.sampled_from([1, 4, 16, 128]))
    pieces, at = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, block))
        pieces.append((at, at + count))
        at += count + draw(st.sampled_from([0, 0, 0, 5]))  # tokens that lie elsewhere
    rows = draw(st.sampled_from([1, 1, 2, 5, 17]))
    visible = draw(st.sampled_from([at, max(0, at - 3), at + 4]))
    positions: tuple[int, ...] = ()
    if draw(st.booleans()):
        positions = tuple(draw(st.lists(st.integers(0, at + 2), min_size=rows, max_size=rows)))
    dtype = draw(st.sampled_from(DTYPES))
    latent = draw(st.integers(0, 5)) == 0
    dim = draw(st.sampled_from([1, 7, 16, 24, 64, 80, 96, 128]))
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        dtype=dtype,
        query_dtype=draw(st.sampled_from([dtype, "float32"])),
        kv_heads=1 if latent else draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3, 4, 8])),
        dim=dim,
        value_dim=max(1, dim - 3) if latent else 0,
        block_tokens=block,
        pieces=tuple(pieces),
        rows=rows,
        positions=positions,
        visible=visible,
        window=draw(st.sampled_from([0, 0, 1, 6])),
        sinks=draw(st.sampled_from([0, 3])),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        spread=draw(st.sampled_from([0.1, 1.0, 8.0])),
    )


class KernelContract(abc.ABC):
    """See the module."""

    o_error = 2e-5  # absolute, of values around 1
    lse_error = 2e-5  # relative to 1 + |lse|

    @abc.abstractmethod
    def kernel(self) -> Kernel: ...

    # Several kernels run this very test: an example that one fails is worth a try by the others.
    @settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(case=cases())
    def test_it_computes_what_the_oracle_does(self, case: Case) -> None:
        self.compare(case)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (8, 64)])
    def test_it_holds_over_many_blocks(self, dtype: str, group: int, dim: int) -> None:
        pieces = tuple((i * 128, i * 128 + 128) for i in range(24))
        case = Case(5, dtype, group=group, dim=dim, block_tokens=128, pieces=pieces, visible=3072)
        self.compare(case)
        self.compare(dataclasses.replace(case, rows=40))
        chunk = tuple(range(3072 - 40, 3072))
        self.compare(dataclasses.replace(case, rows=40, positions=chunk, window=200))

    def test_latents_of_deepseek_are_attended_in_the_absorbed_form(self) -> None:
        pieces = tuple((i * 64, i * 64 + 64) for i in range(4))
        case = Case(
            6,
            "bfloat16",
            kv_heads=1,
            group=16,
            dim=576,
            value_dim=512,
            block_tokens=64,
            pieces=pieces,
            visible=256,
        )
        self.compare(case)

    def test_no_pieces_are_an_empty_part(self) -> None:
        case, kernel = Case(pieces=(), rows=3), self.kernel()
        if kernel.refuses(scattered(case).work):
            pytest.skip("it leaves this to others")
        part = kernel.attend(scattered(case).work)
        assert (part.lse == -np.inf).all()
        assert (part.o == 0).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("plane", [0, 1], ids=["key", "value"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_number_that_is_none_reaches_the_rows_that_see_it_and_no_others(
        self, dtype: str, plane: int, bad: float
    ) -> None:
        for positions in (HALF_SEEN.positions, ()):
            case = dataclasses.replace(HALF_SEEN, dtype=dtype, positions=positions)
            made, kernel = scattered(case), self.kernel()
            if kernel.refuses(made.work):
                pytest.skip("it leaves this to others")
            block = made.memory[0].array.view(STORED[dtype]).reshape(2, 2, 64, 40)
            block[plane, 1, 30, :] = narrowed(np.array(bad, np.float32), dtype)
            sees = np.zeros(made.expected.lse.shape, bool)
            sees[1 if positions else 0 :: 2 if positions else 1, case.group :] = True

            part = kernel.attend(made.work)

            assert not np.isfinite(part.o[sees]).any()
            assert np.abs(part.o[~sees] - made.expected.o[~sees]).max() <= self.o_error
            lse_error = np.abs(part.lse[~sees] - made.expected.lse[~sees])
            assert (lse_error <= self.lse_error * (1 + np.abs(made.expected.lse[~sees]))).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_query_that_is_no_number_has_no_answer_and_others_have_theirs(
        self, dtype: str
    ) -> None:
        case = dataclasses.replace(HALF_SEEN, dtype=dtype)
        made, kernel = scattered(case), self.kernel()
        if kernel.refuses(made.work):
            pytest.skip("it leaves this to others")
        queries = made.work.queries.copy()
        queries[1, 2, 5:6] = narrowed(np.array([np.nan], np.float32), dtype)
        part = kernel.attend(dataclasses.replace(made.work, queries=queries))
        spoilt = np.zeros(made.expected.lse.shape, bool)
        spoilt[1, 2] = True
        assert np.isnan(part.o[spoilt]).all()
        assert np.isnan(part.lse[spoilt]).all()
        assert np.abs(part.o[~spoilt] - made.expected.o[~spoilt]).max() <= self.o_error
        none = scattered(dataclasses.replace(case, pieces=()))
        nothing = kernel.attend(dataclasses.replace(none.work, queries=queries))
        assert (nothing.lse == -np.inf).all()

    def compare(self, case: Case) -> None:
        made, kernel = scattered(case), self.kernel()
        if kernel.refuses(made.work):
            return
        part = kernel.attend(made.work)
        wanted = made.expected
        assert part.o.dtype == part.lse.dtype == np.float32
        assert part.o.shape == wanted.o.shape
        assert part.lse.shape == wanted.lse.shape
        empty = wanted.lse == -np.inf
        assert ((part.lse == -np.inf) == empty).all()
        assert (part.o[empty] == 0).all()
        lse_error = np.abs(part.lse[~empty] - wanted.lse[~empty])
        assert (lse_error <= self.lse_error * (1 + np.abs(wanted.lse[~empty]))).all(), case
        assert np.abs(part.o - wanted.o).max(initial=0) <= self.o_error, case
