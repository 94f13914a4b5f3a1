"""The field guide of broken samples: its groups of pictures, and its table of planted bugs."""

from minidiff.teach import BUGS

LOOKS = {
    "grey": "Grey, without contrast",
    "dark": "Dark or flat",
    "washed out": "Washed out",
    "noise": "Nothing but noise",
    "noisy": "Noisy: a grain on a good picture",
    "blurred": "Blurred",
    "missing": "A mode or a part is missing",
    "broken": "Neither digits nor noise",
    "fine": "Looks fine but is wrong",
}


def table() -> str:
    """Return the planted bugs as a Markdown table, in the order of `LOOKS`."""
    lines = ["| planted | bug | measure that finds it | seen | source |", "|---|---|---|---|---|"]
    order = list(LOOKS)
    for bug in sorted(BUGS.values(), key=lambda bug: order.index(bug.look)):
        cells = (bug.name, bug.title, bug.measure, bug.seen, bug.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
