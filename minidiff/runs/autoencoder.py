"""A run of `minidiff train-vae`, and what it adds to the folder of a run (`minidiff.runs.folder`).

RUN/vae/                 the autoencoder with the averaged weights, which diffusers reads as well
RUN/reconstructions.png  held-out images, each above its reconstruction
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch import device as Device

from minidiff.data import ImageData
from minidiff.data.latents import BATCH, LatentData
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.images import plot
from minidiff.images.pixels import to_uint8
from minidiff.metrics import Evaluator, Scores, load_classifier, shipped
from minidiff.nn import AutoencoderKL
from minidiff.nn.model import CONFIG
from minidiff.runs.autosave import PrintLine, Saving
from minidiff.runs.folder import MODEL, RECONSTRUCTIONS, VAE
from minidiff.runs.run import Amount, Run
from minidiff.runtime.device import pick_device
from minidiff.runtime.distributed import launched
from minidiff.runtime.files import user_path
from minidiff.training.autoencoder import check, train_vae
from minidiff.training.config import VAEConfig

COMMAND = "train-vae"
PICTURE = f"{RECONSTRUCTIONS}.png"
PICTURE_IMAGES = 40
POOR_PSNR = 15.0  # in dB: an error of 18 % of the range


class Quality(NamedTuple):
    """The quality of an autoencoder on images that it was not trained on.

    Attributes:
        l1: mean absolute error of a pixel, in grey levels of 255.
        psnr: 10·log₁₀(255² / mean square error), in dB; infinite for no error.
        mean, std: mean and standard deviation of scaled latents, one sample per image; 0 and 1 are
            intended.
        made, real: scores of the reconstructions, and of the images themselves; None where no
            classifier is shipped for the data.
    """

    l1: float
    psnr: float
    mean: float
    std: float
    made: Scores | None
    real: Scores | None

    @property
    def is_poor(self) -> bool:
        """True where the classifier misses a tenth of what it recognises of real images.

        Without a classifier, True below POOR_PSNR.
        """
        if self.made is None or self.made.accuracy is None:
            return self.psnr < POOR_PSNR
        return self.made.accuracy < 0.9 * self.real.accuracy

    def __str__(self) -> str:
        lines = [
            f"error of a pixel  {self.l1:.2f} of 255, PSNR {self.psnr:.1f} dB",
            f"latents           mean {self.mean:.3f}, standard deviation {self.std:.3f}",
        ]
        if self.made is not None:
            lines += [f"reconstructed     {self.made}", f"real, held out    {self.real}"]
        if self.is_poor:
            lines.append("warning: poor reconstructions limit every model of latents; train longer")
        return "\n".join(lines)


def train_vae_into(
    out: str | Path,
    config: VAEConfig,
    data: ImageData,
    held_out: ImageData,
    device: Device | str = "cpu",
    *,
    saving: Saving | None = None,
    load: Mapping[str, Any] | None = None,
) -> tuple[AutoencoderKL, Quality]:
    """Train with a progress bar, measure, and keep everything in the folder `out`.

    Args:
        out: folder of the run; new or empty.
        config: all options of the run.
        data: training images.
        held_out: images of the same kind, for the measurement and the picture.
        device: device of the training.
        saving: how often to save; by default every five minutes.
        load: arguments of `minidiff.data.load` that gave both, except the split, so that
            `minidiff train-vae --resume` finds them.
    Raises:
        InvalidArgument: config and data do not fit together, or torchrun started several
            processes; nothing is written then.
        CheckpointError: the folder is not empty or cannot be written.
        TrainingError: the loss is not finite. The log and the snapshots stay.
        Stopped: by SIGINT or SIGTERM, after the step under way, with everything saved.
    """
    device = pick_device(device)
    _check(config, data, held_out)
    run = Run.begin(out, COMMAND, config, data, device, saving=saving, load=load)
    return _train(run, data, held_out, device)


def resume(
    out: str | Path,
    data: ImageData,
    held_out: ImageData,
    device: Device | str | None = None,
    *,
    print_line: PrintLine = print,
    load: Mapping[str, Any] | None = None,
    minutes: Amount | None = None,
    steps: Amount | None = None,
) -> tuple[AutoencoderKL, Quality]:
    """Resume a run from its newest snapshot that verifies, or from its beginning.

    Args:
        out: folder of the run.
        data, held_out: the arguments of `train_vae_into`.
        device: device of the training; by default that of the run.
        print_line: called with the snapshots that are skipped and where the run continues.
        load, minutes, steps: the arguments of `minidiff.runs.diffusion.resume`.
    Raises:
        CheckpointError: the folder is no run of train-vae, none of its snapshots verifies, or the
            data are not those of the run; otherwise as `train_vae_into`.
        InvalidArgument: a budget in the other unit, or one that is spent.
    """
    run = Run.reopen(out, COMMAND, data, print_line, load=load, minutes=minutes, steps=steps)
    AutoencoderKL.check_replaceable(run.out / VAE)  # which the end of the run replaces
    device = pick_device(run.settings.device if device is None else device)
    _check(run.settings.config, data, held_out)
    return _train(run, data, held_out, device)


def _check(config: VAEConfig, data: ImageData, held_out: ImageData) -> None:
    """Refuse several processes, and images that cannot be trained on. Raises InvalidArgument."""
    if launched():
        raise InvalidArgument("train-vae is for one process: start it without torchrun")
    check(config, data)
    check(config, held_out)


def _train(
    run: Run, data: ImageData, held_out: ImageData, device: Device
) -> tuple[AutoencoderKL, Quality]:
    """Train, and write the autoencoder and its reconstructions."""
    with run.kept() as autosave:
        vae = train_vae(
            run.settings.config, data, device,
            autosave.on_log_row, autosave.resume, autosave.after_step,
        )  # fmt: skip
    vae.save_pretrained(run.out / VAE)
    made = reconstructed(vae, held_out)
    chosen = slice(PICTURE_IMAGES)
    plot.save(side_by_side(held_out.images[chosen], made[chosen]), run.out / PICTURE)
    return vae, measure(vae, made, data, held_out)


def open_vae(path: str | Path) -> AutoencoderKL:
    """Read the autoencoder of a run, of a pipeline folder, or its folder itself.

    Raises:
        CheckpointError: it is none of these, or it is damaged.
    """
    path = user_path(path)
    for folder in (path / VAE, path / MODEL / VAE, path):
        if (folder / CONFIG).is_file():
            return AutoencoderKL.from_pretrained(folder)
    raise CheckpointError(f"{path}: neither a run (no {VAE}/{CONFIG}) nor a vae (no {CONFIG})")


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, data: ImageData) -> Tensor:
    """Return the reconstructions from the most likely latents of all images, uint8 (N, C, H, W)."""
    device = next(vae.parameters()).device
    batches = (data.batch(index)[0] for index in torch.arange(len(data)).split(BATCH))
    return torch.cat([to_uint8(vae(x.to(device))).cpu() for x in batches])


def side_by_side(images: Tensor, made: Tensor, columns: int = 10) -> Image.Image:
    """Return a grid of uint8 images (N, C, H, W), below each row its reconstructions.

    N is a multiple of `columns`.
    """
    rows = zip(images.split(columns), made.split(columns), strict=True)
    both = torch.cat([row for pair in rows for row in pair])
    return plot.grid(both.permute(0, 2, 3, 1).numpy(), columns)


def measure(vae: AutoencoderKL, made: Tensor, train: ImageData, held_out: ImageData) -> Quality:
    """Compare held-out images with their reconstructions.

    The Fréchet distance is that of `minidiff evaluate`, from all reconstructions to all training
    images, and so comparable with the scores of samples. A perfect autoencoder would reach that of
    the held-out images themselves.

    Args:
        vae: the autoencoder.
        made: reconstructions of the held-out images, see `reconstructed`.
        train, held_out: training images, and other images.
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
