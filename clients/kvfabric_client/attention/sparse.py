"""Sparse attention: of a context's pages, those whose mean keys score best are attended."""

from __future__ import annotations

from collections.abc import Sequence

from kvfabric.attention.masks import within
from kvfabric.errors import Refused
from kvfabric_client.attention.answers import Pages, Traffic
from kvfabric_client.attention.best import TopK, whole_pages
from kvfabric_client.attention.gather import Gather
from kvfabric_client.attention.parts import Options, Part
from kvfabric_client.attention.runs import Run, Runs, joined, without
from kvfabric_client.deadline import Deadline


def choose(
    parts: Sequence[Part],
    options: Options,
    value_dim: int,
    pages: Pages,
    deadline: Deadline,
) -> None:
    """Leaves each part with fewer tokens: the best pages of all its rows, and whatever is in no
    whole page of a sealed block or could not be scored."""
    if pages.count < 0 or pages.tokens <= 0:
        raise Refused(f"{pages}; give a count, and the tokens of a page")
    before = [part.tokens for part in parts]
    whole = [whole_pages(part.context.source.blocks, part.tokens, pages.tokens) for part in parts]
    for part, runs in zip(parts, whole, strict=True):
        part.tokens = runs
    operator = TopK(parts, options, max(1, pages.count), pages.tokens)
    gather = Gather(operator, value_dim, Traffic(), deadline)
    unscored: dict[Part, Runs] = {}
    for item, runs in gather.run(operator.items()):
        unscored.setdefault(parts[item.query], []).extend(runs)
    for part, runs, all_ in zip(parts, whole, before, strict=True):
        chosen = _chosen(operator, part, pages)
        always = [*without(all_, runs), *unscored.get(part, [])]
        part.tokens = within(all_, joined([*chosen, *always]))


def _chosen(operator: TopK, part: Part, pages: Pages) -> list[Run]:
    """One choice for all rows, by the greatest score that a page has with any of them."""
    scores: dict[int, float] = {}
    for row in operator.found[part]:
        for score, first in row:
            scores[first] = max(score, scores.get(first, score))
    best = sorted(scores, key=lambda first: (-scores[first], first))[: pages.count]
    return [(first, first + pages.tokens) for first in best]
