"""A run of `minidiff train-vae` is a folder, too.

RUN/config.json          the data and every option of the training
RUN/log.jsonl            one row about every second
RUN/vae/                 the autoencoder with the averaged weights, which diffusers reads as well
RUN/reconstructions.png  held-out images, each above what the autoencoder makes of it
"""

import math
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch import device as Device

from minidiff import plot, run
from minidiff.data import ImageData, to_uint8
from minidiff.device import pick_device
from minidiff.errors import CheckpointError
from minidiff.keeper import Log
from minidiff.latents import BATCH, LatentData
from minidiff.metrics import Evaluator, Scores, load_classifier, shipped
from minidiff.nn import AutoencoderKL
from minidiff.nn.model import CONFIG
from minidiff.train_config import VAEConfig
from minidiff.train_vae import check, train_vae

VAE = "vae"
PICTURE = "reconstructions.png"
SHOWN = 40  # images in the picture


class Quality(NamedTuple):
    """What an autoencoder is worth on images that it was not trained on.

    Attributes:
        l1: mean absolute error of a pixel, in grey levels of 255.
        psnr: 10·log₁₀(255² / mean square error), in dB; infinite for no error.
        mean, std: of the latents of a diffusion model, one sample an image; meant to be 0 and 1.
        made, real: the scores of the reconstructions, and of the images themselves; None where no
            classifier is shipped for the data.
    """

    l1: float
    psnr: float
    mean: float
    std: float
    made: Scores | None
    real: Scores | None

    def __str__(self) -> str:
        lines = [
            f"error of a pixel  {self.l1:.2f} of 255, PSNR {self.psnr:.1f} dB",
            f"latents           mean {self.mean:.3f}, standard deviation {self.std:.3f}",
        ]
        if self.made is not None:
            lines += [f"reconstructed     {self.made}", f"real, held out    {self.real}"]
        return "\n".join(lines)


def train_vae_into(
    out: str | Path,
    config: VAEConfig,
    data: ImageData,
    held_out: ImageData,
    device: Device | str = "cpu",
) -> tuple[AutoencoderKL, Quality]:
    """Train with a progress bar, measure, and keep everything in the folder `out`, see the module.

    Args:
        held_out: images of the same kind, for the measurement and the picture.
    Raises:
        InvalidArgument: config and data do not fit together; nothing is written then.
        CheckpointError: the folder is not empty or cannot be written.
        TrainingError: the loss is not finite. The log stays.
    """
    device = pick_device(device)
    check(config, data)
    check(config, held_out)
    out = run.create(out, config, data)
    log = Log(out / run.LOG)
    with closing(log), run.progress_bar(config, log.append) as report:
        vae = train_vae(config, data, device, report)
    vae.save_pretrained(out / VAE)
    made = reconstructed(vae, held_out)
    plot.save(side_by_side(held_out.images[:SHOWN], made[:SHOWN]), out / PICTURE)
    return vae, measure(vae, made, data, held_out)


def open_vae(path: str | Path) -> AutoencoderKL:
    """Read the autoencoder of a run, of a pipeline folder, or its folder itself.

    Raises:
        CheckpointError: it is none of these, or it is damaged.
    """
    path = Path(path)
    inside = (path / VAE / CONFIG).is_file()
    if not inside and not (path / CONFIG).is_file():
        raise CheckpointError(f"{path}: neither a run (no {VAE}/{CONFIG}) nor a vae (no {CONFIG})")
    return AutoencoderKL.from_pretrained(path / VAE if inside else path)


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, data: ImageData) -> Tensor:
    """What the decoder makes of the most likely latents of all images: uint8 like them."""
    device = next(vae.parameters()).device
    batches = (data.batch(index)[0] for index in torch.arange(len(data)).split(BATCH))
    return torch.cat([to_uint8(vae(x.to(device))).cpu() for x in batches])


def side_by_side(images: Tensor, made: Tensor, columns: int = 10) -> Image.Image:
    """A grid of uint8 images (N, C, H, W), N a multiple of `columns`: below each row its twins."""
    rows = zip(images.split(columns), made.split(columns), strict=True)
    both = torch.cat([row for pair in rows for row in pair])
    return plot.grid(both.permute(0, 2, 3, 1).numpy(), columns)


def measure(vae: AutoencoderKL, made: Tensor, train: ImageData, held_out: ImageData) -> Quality:
    """Compare held-out images with their reconstructions.

    The Fréchet distance is that of `minidiff evaluate`: from all reconstructions to all training
    images, so that it stands beside the scores of samples; a perfect autoencoder would reach that
    of the held-out images themselves.

    Args:
        made: of the held-out images, see `reconstructed`.
        train, held_out: what the autoencoder was trained on, and other images.
    """
    device = next(vae.parameters()).device
    error = made.double() - held_out.images
    square = float(error.square().mean())
    latents, _ = LatentData(vae, held_out.to(device)).batch(torch.arange(len(held_out)))
    std, mean = torch.std_mean(latents.cpu().double())
    scores = (None, None)
    if train.name in shipped():
        scorer = Evaluator.of(train, held_out, load_classifier(train.name).to(device))
        scores = (scorer.score(made, held_out.labels), scorer.ceiling(len(held_out)))
    psnr = 10 * math.log10(255**2 / square) if square else math.inf
    return Quality(float(error.abs().mean()), psnr, float(mean), float(std), *scores)
