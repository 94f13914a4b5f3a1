"""One number type per reading: Python floats for the papers, torch's float32 for diffusers.

diffusers computes its coefficients with float32 tensors. In that reading a level in σ holds
`np.float32` numbers, so that +, −, · and / in an equation round as diffusers' do, and the functions
below take the type of their argument. An equation is then written once, without rounding hooks.

This suffices for DPM-Solver, UniPC, Euler and Heun, and LCM agrees with diffusers in float64. It
does not suffice for the functions at the end of this file, which depend on the order of operations:
differences cancel, and most of the result is the rounding of an intermediate one. There diffusers'
own expression, mostly in ᾱ and not in (α, σ), is evaluated step by step, and `quirks.py` uses it
instead of the paper's. For the same reason the levels of training steps (DDPM, DDIM, PNDM) stay
Python floats.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from minidiff.schedule import Level

Number: TypeAlias = Any  # a float, or an np.float32 in diffusers' reading


def exp(x: Number) -> Number:
    """Return eˣ."""
    return _torch_float32(torch.exp, x) if isinstance(x, np.float32) else math.exp(x)


def expm1(x: Number) -> Number:
    """Return eˣ − 1, to full precision for small x."""
    return _torch_float32(torch.expm1, x) if isinstance(x, np.float32) else math.expm1(x)


def sqrt(x: Number) -> Number:
    """Return √x."""
    return _torch_float32(torch.sqrt, x) if isinstance(x, np.float32) else math.sqrt(x)


def hypot(a: float, x: Number) -> Number:
    """Return √(a² + x²)."""
    if isinstance(x, np.float32):
        return sqrt(x**2 + np.float32(a * a))
    return math.hypot(a, x)


@functools.lru_cache(maxsize=4096)
def _torch_float32(function, x: np.float32) -> np.float32:
    """Apply torch's function, whose last bit is neither NumPy's nor the nearest float32's."""
    return np.float32(function(torch.tensor(x, dtype=torch.float32)).item())


class RoundedLevel(Level):
    """A level whose derived quantities are rounded as diffusers' float32 tensors are."""

    lam = math.nan  # set for every instance by `rounded_levels`
    alpha_bar = math.nan  # set for every instance by `Diffusers.table`

    def variance_since(self, cleaner: "RoundedLevel") -> float:
        """Return 1 − ᾱ_t/ᾱ_s in float32, which keeps three digits of a β of 1e-4."""
        ratio = np.float32(self.alpha_bar) / np.float32(cleaner.alpha_bar)
        return float(np.float32(1) - ratio)


def rounded_levels(alpha: Tensor, sigma: Tensor) -> list[Any]:
    """Return levels of float32 numbers, with λ in float32.

    Args:
        alpha, sigma: float32 tensors (n,).
    """
    lams = (torch.log(alpha) - torch.log(sigma)).numpy()
    levels = [RoundedLevel(*pair) for pair in zip(alpha.numpy(), sigma.numpy(), strict=True)]
    for level, lam in zip(levels, lams, strict=True):
        level.lam = lam
    return levels


ROUNDED_CLEAN = rounded_levels(*torch.tensor([[1.0], [0.0]], dtype=torch.float32))[0]
ROUNDED_CLEAN.alpha_bar = 1.0


# --- where the order of operations matters --------------------------------------------------


@functools.lru_cache(maxsize=4096)
def posterior(now: float, nxt: float, alpha: float) -> tuple[float, float]:
    """Return the weights of x0 and x in DDPM's posterior from ᾱ_t, ᾱ_s and α_s."""
    one, a, b = np.float32(1), np.float32(now), np.float32(nxt)
    ratio = a / b
    # torch's root is not always the nearest float32
    root = (torch.tensor(ratio, dtype=torch.float32) ** 0.5).item()
    weight_x0 = np.float32(alpha) * (one - ratio) / (one - a)
    return float(weight_x0), float(np.float32(root) * (one - b) / (one - a))


@functools.lru_cache(maxsize=4096)
def direction(now: float, nxt: float, eta: float) -> float:
    """Return √(1 − ᾱ_s − s̃²), the weight of ε̂ in DDIM, from ᾱ_t, ᾱ_s and η."""
    a, b = torch.tensor([now, nxt], dtype=torch.float32)
    rounded = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    return (1 - b - rounded**2).clamp(min=0).sqrt().item()


@functools.lru_cache(maxsize=4096)
def ancestral(sigma: float, to: float) -> tuple[float, float]:
    """Return σ_down and σ_up of an ancestral step from σ to σ'."""
    a, b = np.float32(sigma) ** 2, np.float32(to) ** 2
    up = np.sqrt(b * (a - b) / a)
    return np.sqrt(max(b - up**2, np.float32(0))), up


@functools.lru_cache(maxsize=4096)
def transfer(now: float, nxt: float) -> tuple[float, float]:
    """Return the weights of x and ε̂ in PNDM's step from ᾱ_t to ᾱ_s."""
    # not NumPy: the last bit of its float32 root is another
    a, b = torch.tensor([now, nxt], dtype=torch.float32)
    denominator = a * (1 - b).sqrt() + (a * (1 - a) * b).sqrt()
    return (b / a).sqrt().item(), -(b - a).item() / denominator.item()


def phi3(k: int, h: float) -> Number:
    """Return the weight of D2 in third-order DPM-Solver++ as diffusers has it, see `quirks.py`."""
    one, kh = np.float32(1), k * np.float32(h)
    left = (one - exp(-kh) - kh) / kh**2
    return left - np.float32(0.5) if k == 2 else left + np.float32(0.5)


def unipc_moments(k: int, h: float, phi1: float, n: int) -> np.ndarray:
    """Return φ₂, φ₃, … (n of them) by UniPC's recurrence from φ₁/h."""
    hh = np.float32(-k * h)
    phi = np.float32(-phi1) / hh - np.float32(1)
    moments, factorial = [], 1
    for j in range(1, n + 1):
        moments.append(-phi * np.float32(factorial))
        factorial *= j + 1
        phi = phi / hh - np.float32(1 / factorial)
    return np.array(moments)


def deis(nxt: Level, levels: Sequence[Level]) -> list[Number]:
    """Return ∫ L_k(ln ρ) dρ for two or three levels, the newest first, as diffusers has it."""
    rhos = [level.sigma / level.alpha for level in levels]

    def antiderivative(rho: Number, node: Number, *others: Number) -> Number:
        t, b, c, *last = np.log([rho, node, *others])
        if not last:
            return rho * (-c + t - 1) / (b - c)
        d = last[0]
        return rho * (c * (d - t + 1) - d * t + d + t**2 - 2 * t + 2) / ((b - c) * (b - d))

    turned = [rhos[k:] + rhos[:k] for k in range(len(rhos))]
    end = nxt.sigma / nxt.alpha
    return [antiderivative(end, *r) - antiderivative(rhos[0], *r) for r in turned]
