"""The ledger of departures as a page with a section each, made from QUIRKS.md at build time."""

import re
from pathlib import Path

LEDGER = Path(__file__).parents[2] / "minidiff" / "schedulers" / "QUIRKS.md"


def sections(app, docname: str, source: list[str]) -> None:
    """Append a section for each row of the ledger's table to the page "quirks"."""
    if docname != "quirks":
        return
    for line in LEDGER.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells or not cells[0].startswith("`"):
            continue
        name, paper, diffusers, probe, exact, departed, moves = (*cells, "", "")[:7]
        source[0] += (
            f"\n## {name.strip('`')}\n\n**The paper.** {paper}\n\n**diffusers.** {diffusers}\n"
        )
        if exact:
            source[0] += (
                f"\n**Measured** with {probe}: error {exact} without the departure, {departed} with"
                f" it; it moves the result by {moves}.\n"
            )
        else:
            source[0] += f"\n**Not measured**: {probe}.\n"


def setup(app) -> dict:
    """Connect to the reading of sources."""
    app.connect("source-read", sections)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
