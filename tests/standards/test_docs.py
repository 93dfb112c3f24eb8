"""The documents: their links lead somewhere, and what they say to run exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = [
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "proto/README.md",
]

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_MAKE = re.compile(r"\bmake (?:[A-Z_]+=\S+ )*([a-z]+)\b(?=[ `\n])")
_PATH = re.compile(r"`((?:fabric|nodes|clients|tests|proto)/[\w./-]*)`")


def _prose(document: str) -> str:
    return _FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))


def _anchors(path: Path) -> set[str]:
    headings = _HEADING.findall(_FENCE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("document", DOCS)
def test_every_link_within_the_repository_leads_somewhere(document: str) -> None:
    for link in _LINK.findall(_prose(document)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), f"{document}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{document}: {link}"


@pytest.mark.parametrize("document", DOCS)
def test_every_path_that_is_named_exists(document: str) -> None:
    for path in _PATH.findall(_prose(document)):
        assert (ROOT / path).exists(), f"{document}: {path}"


@pytest.mark.parametrize("document", DOCS)
def test_every_make_target_that_is_named_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(r"`(make [^`]+)`", (ROOT / document).read_text(encoding="utf-8")):
        for target in _MAKE.findall(f"{line} "):
            assert target in targets, f"{document}: {line}"
