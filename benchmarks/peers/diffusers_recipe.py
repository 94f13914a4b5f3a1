"""diffusers' own recipe, `examples/unconditional_image_generation/train_unconditional.py`.

Shipped: its defaults and the flags of its README: batches of 16, flip, averaged weights by a power
law, a cosine over 100 epochs with 500 steps of warm-up. The resolution is 32 instead of 64, a
quarter of the work, which favours the recipe; at 32×32 the network still has six levels. The
sampler is DDIM with 100 steps, as the recipe's 1000 of DDPM would take hours.

Tuned: a small `UNet2DModel` on 28×28, v-prediction on the cosine schedule, sampled by
DPM-Solver++ of second order.
"""

import math
from functools import partial

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from peers.contender import Copied, Peer

_WARMUP, _TOTAL = 500, 100 * math.ceil(60_000 / 16)  # steps of warm-up, and of 100 epochs


def _loss(noise_scheduler: DDPMScheduler, model: nn.Module, x: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(x),), device=x.device)
    output = model(noise_scheduler.add_noise(x, noise, t), t).sample
    if noise_scheduler.config.prediction_type == "v_prediction":
        return F.mse_loss(output, noise_scheduler.get_velocity(x, noise, t))
    return F.mse_loss(output, noise)


def _draw(
    scheduler: SchedulerMixin, model: UNet2DModel, n: int, steps: int, device: torch.device
) -> Tensor:
    scheduler.set_timesteps(steps, device=device)
    side = model.config.sample_size
    x = torch.randn(n, 1, side, side).to(device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


def _average(model: nn.Module) -> Copied:
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    return Copied(model, ema, lambda model: ema.step(model.parameters()))


def _rate(step: int) -> float:
    """Return the factor of `get_scheduler("cosine")`."""
    if step < _WARMUP:
        return step / _WARMUP
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - _WARMUP) / (_TOTAL - _WARMUP))))


def shipped() -> Peer:
    down = ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4
    build = partial(
        UNet2DModel,
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=down,
        up_block_types=up,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    return Peer(
        build=build,
        loss=partial(_loss, noise_scheduler),
        draw=partial(_draw, DDIMScheduler.from_config(noise_scheduler.config)),
        steps=100,
        counted=("conv_out",),
        side=32,
        learning_rate=1e-4,
        fixed_rate=True,
        dtype="float32",
        batch_size=16,
        flip=True,
        optimizer=lambda parameters, rate: torch.optim.AdamW(
            parameters, lr=rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        ),
        rate=_rate,
        average=_average,
        tuned=False,
    )


def tuned() -> Peer:
    build = partial(
        UNet2DModel,
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )
    options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, **options)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, timestep_spacing="trailing", lambda_min_clipped=-5.1, **options
    )
    return Peer(
        build=build,
        loss=partial(_loss, noise_scheduler),
        draw=partial(_draw, scheduler),
        steps=50,
        counted=("conv_out",),
    )


FORMS = {"shipped": shipped, "tuned": tuned}
