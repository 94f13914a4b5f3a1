"""denoising-diffusion-pytorch.

Shipped: the second example of its README, which trains by `Trainer`: 1000 steps of the sigmoid
schedule, v-prediction, two batches of 32 a step, and the trainer's default flip. Images are padded
to 32×32, which three halvings divide. Its mixed precision is float16, which needs a GPU; bfloat16
is used instead where the processor has it.

Tuned: a network of 0.6 million weights on 28×28, with one attention head per level. Its DDIM
has as many steps as in the README: with 50, the spread of Gaussian data is 6 % too small.
"""

from functools import partial

import denoising_diffusion_pytorch.denoising_diffusion_pytorch as package
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from denoising_diffusion_pytorch.attend import Attend
from ema_pytorch import EMA
from torch import Tensor, nn

from peers.contender import Peer


def _build(side: int, **network: object) -> GaussianDiffusion:
    return GaussianDiffusion(Unet(channels=1, **network), image_size=side, timesteps=1000)


def _loss(model: GaussianDiffusion, x: Tensor) -> Tensor:
    return model((x + 1) / 2)


def _draw(model: GaussianDiffusion, n: int, steps: int, device: torch.device) -> Tensor:
    package.tqdm = lambda it, **_: it  # its progress bar has no option to turn it off
    for module in model.modules():
        if isinstance(module, Attend):
            module.flash = False  # equal results; on a GPU its kernel does not accept float32
    model.sampling_timesteps, model.is_ddim_sampling = steps, steps < model.num_timesteps
    return model.sample(batch_size=n).clone() * 2 - 1


class _Average:
    """The moving average of its trainer."""

    def __init__(self, model: nn.Module) -> None:
        self._ema = EMA(model, beta=0.995, update_every=10)

    def update(self, model: nn.Module) -> None:
        self._ema.update()

    @property
    def model(self) -> nn.Module:
        return self._ema.ema_model


def shipped() -> Peer:
    return Peer(
        build=partial(_build, 32, dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True),
        loss=_loss,
        draw=_draw,
        steps=250,
        counted=("model",),
        side=32,
        learning_rate=8e-5,
        fixed_rate=True,
        batch_size=32,
        passes=2,
        flip=True,
        optimizer=lambda parameters, rate: torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99)),
        rate=lambda step: 1.0,
        average=_Average,
        tuned=False,
    )


def tuned() -> Peer:
    build = partial(
        _build, 28, dim=16, dim_mults=(1, 2, 4), attn_heads=1, attn_dim_head=32, flash_attn=True
    )
    return Peer(build=build, loss=_loss, draw=_draw, steps=250, counted=("model",))


FORMS = {"shipped": shipped, "tuned": tuned}
