"""azula.

Shipped: the MNIST tutorial of its documentation, without labels: no flip, no averaged weights.

Tuned: a wider network with the faster of its norms, on the cosine schedule. Its sampler reproduces
the spread of Gaussian data best, for which the optimal network is known; the one for x̂0
(`xEABSampler`) leaves noise in the last step of an even grid.
"""

from functools import partial

import torch
from azula.denoise import KarrasDenoiser
from azula.nn.unet import UNet
from azula.noise import CosineSchedule, Schedule, VPSchedule
from azula.sample import DDIMSampler, Sampler, vABSampler
from torch import Tensor, nn

from peers.contender import Latest, Peer


class _Backbone(nn.Module):
    """The tutorial's network, conditioned on the logarithm of the noise level."""

    def __init__(self, features: int = 64, **network: object) -> None:
        super().__init__()
        self.unet = UNet(in_channels=1, out_channels=1, mod_features=features, **network)
        self.time_embedding = nn.Sequential(
            nn.Linear(1, features), nn.SiLU(), nn.Linear(features, features)
        )

    def forward(self, x_t: Tensor, log_snr_t: Tensor) -> Tensor:
        return self.unet(x_t, self.time_embedding(log_snr_t[..., None]))


def _build(schedule: Schedule, **network: object) -> KarrasDenoiser:
    return KarrasDenoiser(backbone=_Backbone(**network), schedule=schedule)


def _loss(model: KarrasDenoiser, x: Tensor) -> Tensor:
    return model.loss(x, torch.rand(len(x), device=x.device))


def _draw(
    sampler: type[Sampler], model: KarrasDenoiser, n: int, steps: int, device: torch.device
) -> Tensor:
    solver = sampler(model, steps=steps, silent=True)
    return solver(solver.init((n, 1, 28, 28), device=device))


def shipped() -> Peer:
    return Peer(
        build=partial(_build, VPSchedule(), hid_channels=(16, 32, 64), hid_blocks=(2, 2, 2)),
        loss=_loss,
        draw=partial(_draw, DDIMSampler),
        steps=64,
        counted=("backbone",),
        learning_rate=3e-4,
        fixed_rate=True,
        dtype="float32",
        clip=None,
        optimizer=lambda parameters, rate: torch.optim.Adam(parameters, lr=rate),
        rate=lambda step: 1.0,
        average=Latest,
        tuned=False,
    )


def tuned() -> Peer:
    network = {"hid_channels": (32, 64, 96), "hid_blocks": (1, 1, 2), "norm": "group"}
    build, draw = partial(_build, CosineSchedule(), **network), partial(_draw, vABSampler)
    return Peer(build=build, loss=_loss, draw=draw, steps=50, counted=("backbone",))


FORMS = {"shipped": shipped, "tuned": tuned}
