"""Training of an autoencoder: image → distribution → latents → image → loss → step → average.

    loss = Σ|x − x̂|  (or its squares)  +  β·KL(q(z|x) ‖ N(0, 1))  +  λ·w·(−D(x̂))          per pixel

The first two terms are the evidence lower bound of a VAE whose pixels have a Laplace (or normal)
distribution of unit scale; β, a small number, trades sharpness against latents that are easy to
model. The third is the score of a discriminator D for the decoded image. D is trained with the
autoencoder to distinguish real from decoded images, with the hinge loss:

    L_D = ½·max(0, 1 − D(x)) + ½·max(0, 1 + D(x̂))

It is used once the decoder is past its first errors. λ gives both terms the same gradient norm at
the decoder's last layer, so that w means the same for any data and loss.

At the end the latents are measured: with the averaged weights, their mean and standard deviation
on training images become `shift_factor` and `scaling_factor`. A diffusion model is thus trained on
latents of zero mean and unit variance.

Sources: Kingma & Welling 2014, https://arxiv.org/abs/1312.6114, eq. 10; Esser et al. 2021,
"Taming Transformers for High-Resolution Image Synthesis", https://arxiv.org/abs/2012.09841, eq. 6
and 7; Lim & Ye 2017, "Geometric GAN", https://arxiv.org/abs/1705.02894 (hinge); Rombach et al.
2022, https://arxiv.org/abs/2112.10752, section 3.1 and appendix G.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.data import ImageData, Stream
from minidiff.data.latents import check_stored, with_unit_latents
from minidiff.errors import InvalidArgument
from minidiff.nn import AutoencoderKL
from minidiff.nn.blocks.gaussian import DiagonalGaussian
from minidiff.nn.discriminator import PatchDiscriminator
from minidiff.noise import stream_seed
from minidiff.runtime.checks import check_all, instance
from minidiff.runtime.device import DTYPES, float32_by_default, pick_device
from minidiff.runtime.distributed import World
from minidiff.training.build import groups_of
from minidiff.training.config import VAEConfig
from minidiff.training.loop import CALLBACKS, TrainingState, steps
from minidiff.training.optim import EMA
from minidiff.training.progress import Progress, batch_size

_NOISE = 3  # stream of random numbers, see `noise.stream_seed`
_DELTA = 1e-6  # δ of Esser et al. eq. 7
_MAX_SCALE = 1e4  # of λ, as in the authors' code, where the discriminator's gradient vanishes
ERRORS = {"l1": F.l1_loss, "l2": F.mse_loss}


# --- the networks ----------------------------------------------------------------------------


class Networks(NamedTuple):
    """The trained networks.

    Attributes:
        vae: the autoencoder.
        judge: the discriminator, which is needed in training only.
    """

    vae: AutoencoderKL
    judge: PatchDiscriminator


def build(config: VAEConfig, data: ImageData) -> Networks:
    """Return fresh networks for config and data, with weights from the seed.

    torch's global random state is left as it was.

    Raises:
        InvalidArgument: as `check`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # weights are drawn on the CPU
        return _networks(config, data)


def check(config: VAEConfig, data: ImageData) -> None:
    """Refuse what cannot be trained, without taking memory.

    Raises:
        InvalidArgument: there are no images, or they are not stored; a side cannot be halved at
            every level, or the network refuses its sizes.
    """
    instance(VAEConfig)("config", config)
    with torch.device("meta"):
        _networks(config, data)


def _networks(config: VAEConfig, data: ImageData) -> Networks:
    """Return the networks for config and data. Raises InvalidArgument, see `check`."""
    check_stored(data)
    channels, height, width = data.shape
    levels = len(config.channels)
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=groups_of(config.channels),
        sample_size=height if height == width else (height, width),
        mid_block_add_attention=config.attention,
    )
    for name, divisor in (
        ("channels", vae.divisor),
        ("discriminator_channels", 2 ** len(config.discriminator_channels)),
    ):
        odd = name == "channels" and (height % divisor or width % divisor)
        if odd or min(height, width) < divisor:
            raise InvalidArgument(
                f"{name} must have few enough levels to halve images of {height}×{width} between "
                f"them, got {getattr(config, name)}"
            )
    return Networks(vae, PatchDiscriminator(channels, config.discriminator_channels))


# --- the loss --------------------------------------------------------------------------------


def bound(x: Tensor, made: Tensor, posterior: DiagonalGaussian, config: VAEConfig) -> Tensor:
    """Return error plus β times divergence, in nats per pixel, the mean over a batch.

    Args:
        x, made: images and their reconstructions, (B, C, H, W).
        posterior: distribution of their latents.
        config: kind of error, and β.
    """
    divergence = posterior.kl().mean() / x[0].numel()
    return ERRORS[config.reconstruction](made.float(), x) + config.kl_weight * divergence


def verdict(judge: nn.Module, made: Tensor) -> Tensor:
    """Return −D(x̂), the mean over patches, which the decoder minimizes."""
    return -judge(made).float().mean()


def hinge(judge: nn.Module, x: Tensor, made: Tensor) -> Tensor:
    """Return L_D: zero where D > 1 for real patches and D < −1 for decoded ones."""
    real, fake = judge(x).float(), judge(made.detach()).float()
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def balance(error: Tensor, judged: Tensor, last: Tensor) -> Tensor:
    """Return λ: the ratio of the gradients' norms of error and verdict at the weights `last`."""
    pull = torch.autograd.grad(error, last, retain_graph=True)[0].norm()
    push = torch.autograd.grad(judged, last, retain_graph=True)[0].norm()
    return (pull / (push + _DELTA)).clamp(max=_MAX_SCALE)  # Esser et al. eq. 7


# --- the loop --------------------------------------------------------------------------------


class AutoencoderTraining(TrainingState):
    """A training of an autoencoder under way, and its step.

    Args:
        config: the run.
        data: images, moved to `device` whole.
        device: device of the training.
    Attributes:
        vae, judge: networks with the raw weights; together they are the `learner`.
        average: average of the autoencoder's weights.
    Raises:
        InvalidArgument: as `check`.
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig, data: ImageData, device: torch.device) -> None:
        networks = nn.ModuleDict(build(config, data)._asdict())
        networks.to(device, memory_format=torch.channels_last).train()
        self.vae, self.judge = networks["vae"], networks["judge"]
        average = EMA(self.vae, config.ema_half_life)
        optimizer = _adamw(config, self.vae, self.judge)
        super().__init__(config, networks, average, optimizer, device, World())
        self.data, self.stream = data.to(device), Stream(len(data), config.seed)
        self.noise = torch.Generator(device)

    @property
    def averaged(self) -> AutoencoderKL:
        """The autoencoder."""
        return self.vae

    def step(self) -> None:
        """Image → latents → image → loss → step → average. Raises TrainingError."""
        config, done = self.config, self.budget.fraction_done
        judged = config.adversarial_weight > 0 and done >= config.adversarial_start
        position = self.stream.position
        x, _ = self.data.batch(self.stream.take(batch_size(config, done)), position)
        x = x.contiguous(memory_format=torch.channels_last)
        with self._cast():
            posterior = self.vae.encode(x)
            made = self.vae.decode(posterior.at(self._noise(posterior.mean)))
            loss = bound(x, made, posterior, config)
            total = loss + self._push(loss, made) if judged else loss
        total.backward()
        if judged:
            with self._cast():
                mistakes = hinge(self.judge.requires_grad_(True), x, made)
            mistakes.backward()
            total = total + mistakes
        clip = config.clip or math.inf
        norms = [nn.utils.clip_grad_norm_(n.parameters(), clip) for n in (self.vae, self.judge)]
        self.update(total.detach(), sum(norms), loss.detach())

    def _push(self, loss: Tensor, made: Tensor) -> Tensor:
        """Return the third term of the loss, λ·w·(−D(x̂))."""
        judged = verdict(self.judge.requires_grad_(False), made)
        scale = balance(loss, judged, self.vae.decoder.conv_out.weight)
        return self.config.adversarial_weight * scale * judged

    def _noise(self, like: Tensor) -> Tensor:
        """Return standard normal noise that depends on the seed and the step alone."""
        self.noise.manual_seed(stream_seed(self.config.seed, _NOISE, self.budget.step))
        return torch.empty_like(like, dtype=torch.float32).normal_(generator=self.noise)

    def _cast(self) -> torch.autocast:
        """Return the context of matrix work in the config's dtype."""
        dtype = DTYPES[self.config.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


@float32_by_default()
def train_vae(
    config: VAEConfig,
    data: ImageData,
    device: torch.device | str = "cpu",
    on_log_row: Callable[[Progress], None] = lambda row: None,
    resume: Callable[[AutoencoderTraining], None] = lambda training: None,
    after_step: Callable[[AutoencoderTraining], None] = lambda training: None,
) -> AutoencoderKL:
    """Train an autoencoder until the budget is spent and return it with the averaged weights.

    Args:
        config: all options of the run.
        data: images, moved to `device` whole.
        device: device of the training.
        on_log_row: called with every row for the log; its loss is that of `bound`.
        resume, after_step: called before the first step and after each, see `training.diffusion`.
    Raises:
        InvalidArgument: config and data do not fit together, or the device is not there.
        TrainingError: a loss or a gradient is not finite.
    """
    check_all(locals(), CALLBACKS)
    check(config, data)
    training = AutoencoderTraining(config, data, pick_device(device))
    resume(training)
    for _ in steps(training, on_log_row, after_step):
        pass
    return with_unit_latents(training.average.model, training.data)


def _adamw(config: VAEConfig, vae: nn.Module, judge: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with a group for each network."""
    groups = [
        {"params": list(vae.parameters()), "betas": (0.9, 0.99)},
        {
            "params": list(judge.parameters()),
            "betas": (0.5, 0.9),
        },  # as in the code of Rombach et al.
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
