"""Progress bars: one at a time on a terminal, and a line a minute where there is none.

`progress` of `Pipeline` and `train` is None, True or False. None shows a bar to a person who waits:
on a terminal or in a notebook, from the second second on, unless another bar is open.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

MINUTE = 60.0  # seconds between lines without a terminal
_open: list[tqdm] = []


class _Lines:
    """A file that takes every state of a bar as one line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def is_watched() -> bool:
    """Return True on a terminal or in a notebook, where a bar can move."""
    return sys.stderr.isatty() or "ipykernel.iostream" in sys.modules


@contextmanager
def progress_bar(total: int, progress: bool | None = None, **options: Any) -> Iterator[tqdm]:
    """Show a bar inside the block; a call inside it shows none unless it is given True.

    Args:
        total: what `update` of the bar adds up to.
        progress: None for a bar where someone watches, True for one in any case (without a
            terminal, a line a minute), False for none.
        options: further options of tqdm.
    """
    shown = is_watched() and not _open if progress is None else progress
    if not is_watched():
        options |= {"file": _Lines(), "mininterval": MINUTE, "ncols": 90}
    elif progress is None:
        options |= {"delay": 1.0}  # nobody needs a bar for less
    with tqdm(total=total, disable=not shown, dynamic_ncols=is_watched(), **options) as bar:
        if shown:
            _open.append(bar)
        try:
            yield bar
        finally:
            if shown:
                _open.remove(bar)
