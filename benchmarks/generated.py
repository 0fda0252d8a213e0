"""Tables, and the parts of docs/cuda.md that scripts write: what lies between two lines that name the part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "cuda.md"


def table(lines: Sequence[Sequence[str]], markdown: bool) -> str:
    """The first line is the head."""
    if not markdown:
        return "\n".join("  ".join(line) for line in lines)
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


def _cut(text: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- written by benchmarks/gpu_{name}.py -->\n", f"\n<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    part, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"{PAGE} has no part {name}")
    return before + begin, part, end + after


def read_part(name: str) -> str:
    return _cut(PAGE.read_text(), name)[1]


def replace_part(name: str, part: str) -> None:
    before, _, after = _cut(PAGE.read_text(), name)
    PAGE.write_text(before + part + after)
