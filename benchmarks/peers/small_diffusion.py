"""smalldiffusion.

Shipped: `examples/fashion_mnist_unet.py` of its README, for images like these: its U-Net on 28×28,
batches of 1024, and the flip of its `img_train_transform`.

Tuned: a smaller network without dropout, and v-prediction, which bounds the error at high noise.
"""

from functools import partial

import torch
from accelerate import Accelerator
from smalldiffusion import (
    PredV,
    Scaled,
    Schedule,
    ScheduleLogLinear,
    Unet,
    generate_train_sample,
    samples,
)
from torch import Tensor, nn
from torch_ema import ExponentialMovingAverage

from peers.contender import Copied, Peer


def _loss(schedule: Schedule, model: nn.Module, x: Tensor) -> Tensor:
    x0, sigma, eps, _ = generate_train_sample(x, schedule)
    return model.get_loss(x0, sigma, eps)


def _draw(
    schedule: Schedule, gam: float, model: nn.Module, n: int, steps: int, device: torch.device
) -> Tensor:
    accelerator = Accelerator(cpu=device.type == "cpu")
    sigmas = schedule.sample_sigmas(steps)
    *_, x0 = samples(model, sigmas, gam=gam, batchsize=n, accelerator=accelerator)
    return x0


def _average(model: nn.Module) -> Copied:
    ema = ExponentialMovingAverage(model.parameters(), decay=0.999)
    return Copied(model, ema, lambda model: ema.update())


def shipped() -> Peer:
    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    return Peer(
        build=partial(Scaled(Unet), 28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,)),
        loss=partial(_loss, schedule),
        draw=partial(_draw, schedule, 1.6),
        steps=20,
        learning_rate=7e-4,
        fixed_rate=True,
        dtype="float32",
        batch_size=1024,
        flip=True,
        clip=None,
        optimizer=lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate),
        rate=lambda step: 1.0,
        average=_average,
        tuned=False,
    )


def tuned() -> Peer:
    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    network = PredV(Scaled(Unet))
    build = partial(
        network, 28, 1, 1,
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(7,), dropout=0.0,
    )  # fmt: skip
    loss, draw = partial(_loss, schedule), partial(_draw, schedule, 1.6)
    return Peer(build=build, loss=loss, draw=draw, steps=50)


FORMS = {"shipped": shipped, "tuned": tuned}
