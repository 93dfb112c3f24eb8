"""The picture of a run: every node's memory over time, a band of colour per node.

Drawn with Pillow, which the extra `plots` brings.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvfabric.errors import Refused
from kvfabric.simulation.trial import Trial

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

MARGIN, WIDTH, HEIGHT, CURVE = 60, 960, 320, 140  # pixels: of a panel and of the curve below
GAP = 70
_COLOURS = (  # used share of a node's memory, and its colour; between them is mixed
    (0.0, (247, 251, 255)),
    (0.4, (158, 202, 225)),
    (0.7, (66, 146, 198)),
    (0.9, (8, 69, 148)),
    (1.0, (203, 24, 29)),
)
_INK, _GREY, _RED = (30, 30, 30), (150, 150, 150), (203, 24, 29)
Colour = tuple[int, int, int]


def draw(trials: Sequence[Trial], path: Path) -> None:
    """Writes a PNG. Refused without Pillow, or where the file cannot be written."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise Refused(
            "the picture is drawn with Pillow, which is not installed: "
            "pip install 'kvfabric[plots]', or leave --png out"
        ) from error
    panel = HEIGHT + CURVE + GAP
    image = Image.new("RGB", (WIDTH + 2 * MARGIN + 90, len(trials) * panel + GAP), (255, 255, 255))
    canvas = ImageDraw.Draw(image)
    for number, trial in enumerate(trials):
        top = GAP // 2 + 20 + number * panel
        heat = Image.frombytes("RGB", _size(trial), _pixels(trial))
        image.paste(heat.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST), (MARGIN, top))
        canvas.rectangle((MARGIN, top, MARGIN + WIDTH, top + HEIGHT), outline=_GREY)
        _label(canvas, trial, top)
        _curve(canvas, trial, top + HEIGHT + 12)
        _legend(canvas, top)
    try:
        image.save(path, "PNG")
    except OSError as error:
        raise Refused(f"cannot write {path}: {error}; name another file") from error


def colour(share: float) -> Colour:
    """Of a node whose memory is used to this share."""
    share = min(max(share, 0.0), 1.0)
    for (low, below), (high, above) in itertools.pairwise(_COLOURS):
        if share <= high:
            part = (share - low) / (high - low)
            red, green, blue = (
                round(one + part * (other - one)) for one, other in zip(below, above, strict=True)
            )
            return red, green, blue
    return _COLOURS[-1][1]


def _size(trial: Trial) -> tuple[int, int]:
    return max(1, len(trial.fills)), len(trial.fills[0]) if trial.fills else 1


def _pixels(trial: Trial) -> bytes:
    """A column per sample, a row per node."""
    if not trial.fills:
        return bytes(colour(0.0))
    rows = zip(*trial.fills, strict=True)
    return b"".join(bytes(colour(share)) for row in rows for share in row)


def _label(canvas: ImageDraw, trial: Trial, top: int) -> None:
    how = "with lending" if trial.lending else "without lending"
    title = (
        f"{trial.workload}, {how}: {trial.tokens_per_s:,.0f} tokens/s, longest context "
        f"{trial.tally.longest:,}, {trial.nodes} nodes, seed {trial.seed}"
    )
    canvas.text((MARGIN, top - 18), title, fill=_INK)
    canvas.text((8, top), "node 0", fill=_INK)
    canvas.text((8, top + HEIGHT - 12), f"node {trial.nodes - 1}", fill=_INK)


def _curve(canvas: ImageDraw, trial: Trial, top: int) -> None:
    """Mean use of memory, the band of one standard deviation, and the fullest node."""
    bottom = top + CURVE - 30
    canvas.rectangle((MARGIN, top, MARGIN + WIDTH, bottom), outline=_GREY)
    canvas.text((18, top), "100 %", fill=_INK)
    canvas.text((32, bottom - 12), "0 %", fill=_INK)
    canvas.text((MARGIN, bottom + 3), "0 s", fill=_INK)
    canvas.text((MARGIN + WIDTH - 30, bottom + 3), f"{trial.simulated_s:.0f} s", fill=_INK)
    count = max(1, len(trial.fills) - 1)

    def point(index: int, share: float) -> tuple[float, float]:
        share = min(max(share, 0.0), 1.0)
        return MARGIN + WIDTH * index / count, bottom - (bottom - top) * share

    means = [sum(sample) / len(sample) for sample in trial.fills]
    spreads = [
        (sum((share - mean) ** 2 for share in sample) / len(sample)) ** 0.5
        for sample, mean in zip(trial.fills, means, strict=True)
    ]
    over = [point(i, m + s) for i, (m, s) in enumerate(zip(means, spreads, strict=True))]
    under = [point(i, m - s) for i, (m, s) in enumerate(zip(means, spreads, strict=True))]
    if len(over) > 1:
        canvas.polygon([*over, *reversed(under)], fill=(198, 219, 239))
        canvas.line([point(i, max(s)) for i, s in enumerate(trial.fills)], fill=_RED)
        canvas.line([point(i, mean) for i, mean in enumerate(means)], fill=(8, 69, 148), width=2)
    canvas.text(
        (MARGIN + 80, bottom + 3),
        "used memory: mean of all nodes (blue), one standard deviation (band), fullest node (red)",
        fill=_INK,
    )


def _legend(canvas: ImageDraw, top: int) -> None:
    left = MARGIN + WIDTH + 20
    for row in range(HEIGHT):
        canvas.line((left, top + row, left + 18, top + row), fill=colour(1 - row / HEIGHT))
    for share in (1.0, 0.5, 0.0):
        at = top + (1 - share) * (HEIGHT - 12)
        canvas.text((left + 24, at), f"{share:.0%} used", fill=_INK)
