#!/usr/bin/env python3
"""Check the built site without a network: no page requests anything, and every local link leads on.

    python3 .ci/site.py docs/_build

Prints what is wrong, one line each, and exits with 1 if anything is.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """The links, the loaded files and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.without_text = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what a tag refers to."""
        values = dict(attrs)
        self.without_text += tag == "img" and not values.get("alt")
        if values.get("id"):
            self.anchors.add(values["id"])
        for name, value in attrs:
            if value and (tag, name) in LOADS:
                self.loads.append(value)
            elif value and tag == "a" and name == "href":
                self.links.append(value)


def faults(root: Path) -> list[str]:
    """Return what is wrong with the pages below a folder."""
    pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
    if not pages:
        return [f"{root}: no pages"]
    found = []
    for path, page in pages.items():
        where = path.relative_to(root)
        found += [f"{where}: loads {url}" for url in page.loads if urlsplit(url).netloc]
        if page.without_text:
            found.append(f"{where}: {page.without_text} pictures without alternative text")
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{where}: no such file {url}")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{where}: no such section {url}")
    return found


if __name__ == "__main__":
    problems = faults(Path(sys.argv[1]).resolve())
    print("\n".join(problems) or "the site is whole")
    sys.exit(bool(problems))
