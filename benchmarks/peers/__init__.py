"""The contenders of `time_to_quality.py`, a file each: its network, loss and sampler.

contender.py   the common interface, and the training loop of the peers
ours.py        minidiff
other files    a peer each, as in its README ("shipped") and tuned

Only the file of a peer imports its package, so that the others run without it.
"""

import importlib
from typing import NamedTuple

from minidiff.errors import InvalidArgument, one_of
from peers.contender import Contender


class _Entry(NamedTuple):
    """The module of a contender, its package, and the requirements of pip."""

    module: str
    package: str
    install: str


_ENTRIES = {
    "minidiff": _Entry("ours", "minidiff", ""),
    "denoising-diffusion-pytorch": _Entry(
        "denoising_diffusion", "denoising-diffusion-pytorch", "denoising-diffusion-pytorch==2.3.4"
    ),
    "smalldiffusion": _Entry(
        "small_diffusion", "smalldiffusion", "smalldiffusion==0.5.0 torch-ema==0.3"
    ),
    "azula": _Entry("azula_unet", "azula", "azula==0.11.1"),
    "diffusers": _Entry("diffusers_recipe", "diffusers", "diffusers==0.42.1"),
}
NAMES = tuple(_ENTRIES)


def package(name: str) -> str:
    """Return the package of a contender, whose version is logged."""
    return _ENTRIES[name].package


def contender(name: str, form: str | None = None) -> Contender:
    """Return a contender in one of its forms.

    Args:
        name: name of a contender, one of `NAMES`.
        form: "shipped" or "tuned" for a peer, "preset" or "autoguided" for minidiff.
    Raises:
        InvalidArgument: name or form is unknown, or the contender is not installed.
    """
    one_of("contender", name, NAMES)
    entry = _ENTRIES[name]
    try:
        module = importlib.import_module(f"peers.{entry.module}")
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            f"contender {name} needs {error.name}: pip install {entry.install}"
        ) from error
    one_of(f"form of {name}", form, module.FORMS)
    return module.FORMS[form]()
