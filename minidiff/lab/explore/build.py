"""The page, put together from its parts: one text without a single address in it."""

import base64
import json
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minidiff import __version__
from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.lab.explore.model import Model, model_data
from minidiff.lab.explore.tables import COMPARED, STEPS, Plugins, Table, schedules, tables
from minidiff.pipeline import Pipeline
from minidiff.pipeline.space import require_images
from minidiff.runtime import files
from minidiff.schedulers.core.names import SAMPLERS

DIGITS = 400
TITLES = {"cosine": "cosine", "linear": "linear", "flow": "flow matching", "model": "this model’s"}


class Page(NamedTuple):
    """The page.

    Attributes:
        html: its text.
        notes: what a user should know, such as why a network does not run in it; a line each.
    """

    html: str
    notes: list[str]

    def write(self, path: str | Path) -> None:
        """Write the file. Raises CheckpointError if it cannot be written."""
        with files.atomic_file(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")


def page(
    pipe: Pipeline | None = None,
    name: str = "",
    plugins: Plugins | None = None,
    prompts: Sequence[str] = (),
) -> Page:
    """Return the page that `minidiff explore` writes.

    Args:
        pipe: model whose network runs in the page; None for the exact denoisers alone.
        name: how the page calls the model.
        plugins: further samplers by name, see `minidiff.lab.plugin.load_plugin`.
        prompts: prompts of a model that was trained on captions.
    Raises:
        InvalidArgument: a model of points, a plug-in that has none of the page's noise levels or
            no table, or a prompt that the model cannot take.
    """
    if pipe is not None:
        require_images(pipe, "the page is")
    plugins = dict(plugins or {})
    all_tables = {kind: tables(like, plugins) for kind, like in schedules().items()}
    model = None if pipe is None else model_data(pipe, name, all_tables, plugins, prompts)
    if model is not None and model.tables:
        all_tables["model"] = model.tables
    for plugin in plugins:
        if not any(plugin in samplers for samplers in all_tables.values()):
            raise InvalidArgument(f"plugin {plugin}: it has none of the page's noise levels")
    html = _filled(_data(all_tables, plugins, model))
    return Page(html, [] if model is None else model.notes)


def _data(all_tables: dict, plugins: Plugins, model: Model | None) -> dict[str, Any]:
    """Return everything that the scripts read."""
    return {
        "version": __version__,
        "steps": STEPS,
        "schedules": {kind: TITLES[kind] for kind in all_tables},
        "samplers": {name: title for name, (title, *_) in SAMPLERS.items()}
        | {name: f"{name} (plug-in)" for name in plugins},
        "plugins": list(plugins),
        "compared": [*plugins, *COMPARED],
        "tables": {kind: _packed(samplers) for kind, samplers in all_tables.items()},
        "digits": _digits(),
        "model": None if model is None else model.data,
    }


def _packed(samplers: dict[str, dict[int, Table]]) -> dict[str, dict[int, dict]]:
    return {name: {n: t.packed() for n, t in rows.items()} for name, rows in samplers.items()}


def _digits() -> dict[str, Any]:
    """Return embedded digits, two pixels of 16 grey levels a byte; digit i shows i mod 10."""
    images = load("digits").images[:DIGITS]
    levels = torch.round(images.float() / 17).to(torch.uint8).numpy().reshape(DIGITS, -1)
    pairs = (levels[:, 0::2] << 4 | levels[:, 1::2]).astype(np.uint8)
    return {"n": DIGITS, "side": images.shape[-1], "v": base64.b64encode(pairs.tobytes()).decode()}


def _filled(data: dict[str, Any]) -> str:
    """Return the page with its parts in place."""
    here = package_files("minidiff.lab.explore")
    parts = {
        name: (here / name).read_text(encoding="utf-8")
        for name in ("page.css", "engine.js", "page.js")
    }
    # "</" could end the script, and JSON reads "<\/" as the same text.
    parts["data"] = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    html = (here / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    return html
