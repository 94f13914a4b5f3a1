"""SHA-256 sums of pictures and of short trainings: proof that a change of the code changes no bit.

    python benchmarks/checksums.py [--json FILE] [--against FILE]

Everything runs in float32 on one CPU thread. Two checkouts print equal sums where machine and
version of torch are equal. `--against` compares with the file of an earlier `--json` and exits
with 1 where a sum differs.
"""

import argparse
import copy
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minidiff import Pipeline, TrainConfig, shipped, train
from minidiff.data import load
from minidiff.data.latents import LatentData
from minidiff.pipeline.edit import swap
from minidiff.pipeline.windows import panorama
from minidiff.runs import autoencoder, diffusion
from minidiff.runs.autosave import Saving
from minidiff.training.config import VAEConfig

PROMPTS = ["a green 5 on a white background", "a red 7"]
SMALL = {"channels": (24, 32), "batch_size": 16, "pictures": 1, "steps": 40}
SAVING = Saving(save_every=20)
Sums = Iterator[tuple[str, str]]  # name and SHA-256 in hexadecimal


def digest(images: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    array = images.detach().contiguous().numpy()
    total = hashlib.sha256(str(array.dtype).encode() + str(array.shape).encode())
    total.update(array.tobytes())
    return total.hexdigest()


def drawn(pipe: Pipeline, *arguments: Any, **options: Any) -> str:
    """Return the sum of the images of one call of a pipeline."""
    return digest(pipe(*arguments, **options, output_type="pt").images)


def text_to_image(pipe: Pipeline) -> Sums:
    """Yield the sums of images drawn from prompts alone."""
    yield "text to image", drawn(pipe, PROMPTS, seed=1, num_inference_steps=6)
    yield (
        "text to image, negative prompt, rescaled",
        drawn(
            pipe, PROMPTS, seed=1, num_inference_steps=6, negative_prompt="blue",
            guidance_rescale=0.5, guidance_interval=(0.3, 5.0), batch_size=1,
        ),
    )  # fmt: skip


def image_to_image(pipe: Pipeline) -> Sums:
    """Yield the sums of images that start from another image."""
    first = pipe(PROMPTS[0], seed=3, num_inference_steps=8, output_type="pt").images[0]
    pixels = ((first.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    side = first.shape[-1]
    mask = np.zeros((side, side), dtype=np.float32)
    mask[:, side // 2 :] = 1

    def changed(steps: int, **options: Any) -> str:
        return drawn(pipe, PROMPTS[1], image=pixels, seed=4, num_inference_steps=steps, **options)

    yield "image to image", changed(8, strength=0.6)
    yield "image to image with a mask", changed(8, mask_image=mask)
    yield "mask, RePaint", changed(8, mask_image=mask, resamples=2, jump_length=2)
    yield (
        "mask, reconstruction guidance",
        changed(5, mask_image=mask, reconstruction_guidance=5.0),
    )
    wide = drawn(panorama(pipe), PROMPTS, width=2 * side, seed=5, num_inference_steps=5)
    yield "panorama", wide
    swapped = swap(
        pipe, pixels, *PROMPTS, num_inference_steps=6, guidance_scale=2.0, output_type="pt"
    )
    yield "swap", digest(swapped.images)


def classes(pipe: Pipeline) -> Sums:
    """Yield the sums of images of classes, without and with a guidance network."""
    yield "classes", drawn(pipe, class_labels=[7, 7, 3], seed=0)
    guided = Pipeline(
        pipe.unet, pipe.scheduler, pipe.vae, pipe.class_names, weaker=_scaled(pipe.unet, 0.97)
    )
    yield (
        "classes with autoguidance",
        drawn(
            guided, class_labels=[1, 2], seed=0, guidance_scale=1.5, autoguidance_scale=1.7,
            guidance_interval=(0.4, 6.0),
        ),
    )  # fmt: skip


@torch.no_grad()
def _scaled(network: nn.Module, factor: float) -> nn.Module:
    """Return a copy of a network with all weights multiplied by a factor."""
    scaled = copy.deepcopy(network)
    for parameter in scaled.parameters():
        parameter.mul_(factor)
    return scaled


def last_snapshot(run: Path) -> Path:
    """Return the folder of a run's last snapshot."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def sum_of_weights(run: Path) -> str:
    """Return the sum of all tensors in the last snapshot of a run."""
    folder = last_snapshot(run)
    total = hashlib.sha256(folder.name.encode())
    sorted_as = {"weaker.safetensors": "guidance"}  # files are summed in a fixed order
    for path in sorted(folder.glob("*.safetensors"), key=lambda p: sorted_as.get(p.name, p.name)):
        total.update(path.read_bytes())
    return total.hexdigest()


def sum_of_log(run: Path) -> str:
    """Return the sum of a run's log without the wall-clock times."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def training(name: str, run: Path, resume: Callable[[Path], object]) -> Sums:
    """Yield the sums of a finished run, and of a copy resumed from the snapshot before the last."""
    yield f"{name}: weights, average and optimizer", sum_of_weights(run)
    yield f"{name}: log", sum_of_log(run)
    resumed = run.with_name(f"{run.name}-resumed")
    shutil.copytree(run, resumed)
    shutil.rmtree(last_snapshot(resumed))
    resume(resumed)
    yield f"{name}, resumed: weights, average and optimizer", sum_of_weights(resumed)
    yield f"{name}, resumed: log", sum_of_log(resumed)


def diffusion_trainings(root: Path) -> Sums:
    """Yield the sums of three diffusion trainings: classes, EDM's objective, captions."""
    digits, captions = load("digits"), load("captions")
    config = TrainConfig(
        **SMALL, autoguidance_scale=1.5, weaker_at=0.25, stable_target=64, optimizer="muon",
        shift=1, dropout=0.1,
    )  # fmt: skip
    pipe = diffusion.train_into(root / "classes", config, digits, saving=SAVING)
    yield from training("classes", root / "classes", lambda run: diffusion.resume(run, digits))
    yield "classes: samples", drawn(pipe, class_labels=[1, 5], seed=2, num_inference_steps=5)
    config = TrainConfig(**SMALL, prediction_type="edm", accumulate=2, final_batch_size=32)
    diffusion.train_into(root / "edm", config, digits, saving=SAVING)
    yield from training("edm", root / "edm", lambda run: diffusion.resume(run, digits))
    diffusion.train_into(root / "captions", TrainConfig(**SMALL), captions, saving=SAVING)
    yield from training("captions", root / "captions", lambda run: diffusion.resume(run, captions))


def autoencoder_training(root: Path) -> Sums:
    """Yield the sums of an autoencoder's training, and of a diffusion model on its latents."""
    digits, held_out = load("digits"), load("digits", split="test")
    config = VAEConfig(
        steps=40, batch_size=16, channels=(8, 16), discriminator_channels=(8, 16),
        adversarial_start=0.4,
    )  # fmt: skip
    vae, _ = autoencoder.train_vae_into(root / "vae", config, digits, held_out, saving=SAVING)
    yield from training("vae", root / "vae", lambda run: autoencoder.resume(run, digits, held_out))
    latent = train(TrainConfig(**SMALL | {"block": 1}), LatentData(vae, digits))
    yield "latent", drawn(latent, class_labels=[3, 4], seed=9, num_inference_steps=5)


def all_sums(root: Path) -> Sums:
    """Yield every sum in a fixed order; runs are written into the folder `root`."""
    text = Pipeline.from_pretrained(shipped.folder("digits-text"))
    yield from text_to_image(text)
    yield from image_to_image(text)
    yield from classes(Pipeline.from_pretrained(shipped.folder("mnist")))
    yield from diffusion_trainings(root)
    yield from autoencoder_training(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="file to write the sums to")
    parser.add_argument("--against", metavar="FILE", help="earlier file to compare with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name, value in all_sums(Path(root)):
            found[name] = value
            print(f"{value[:16]}  {name}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    if options.against:
        before = json.loads(Path(options.against).read_text())
        changed = sorted(k for k in found.keys() | before.keys() if found.get(k) != before.get(k))
        print(f"{len(before) - len(changed)} of {len(before)} sums are the same")
        print("".join(f"  differs: {name}\n" for name in changed), end="")
        sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
