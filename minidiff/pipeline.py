"""One pipeline: a network, a scheduler, and the whole way from a seed to pictures.

`Pipeline.__call__` reads like the method: prepare the condition, prepare the start, loop, decode.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minidiff import checkpoint
from minidiff.data import to_uint8
from minidiff.device import pick_device
from minidiff.errors import CheckpointError, InvalidArgument, one_of, real_number, whole_number
from minidiff.guidance import Denoiser, autocast, classifier_free, conditional
from minidiff.nn import SpaceToDepth, UNet
from minidiff.noise import MAX_SEED, Generators, image_generators, randn
from minidiff.sample import Step, trajectory
from minidiff.schedulers import SCHEDULERS, DDIMScheduler, Scheduler
from minidiff.schedulers.base import CONFIG_NAME

OUTPUT_TYPES = ("pil", "np", "pt")
INDEX = "model_index.json"
MAX_IMAGES = 1_000_000  # they are held in memory; more than this is a typing error


class PipelineOutput(NamedTuple):
    """What a pipeline returns.

    Attributes:
        images: a list of PIL images ("pil"), a uint8 array (N, H, W, C) ("np") or a float tensor
            (N, C, H, W) in [−1, 1] as the network left it ("pt").
        labels: (N,) int64 class labels on the CPU, or None.
    """

    images: Any
    labels: Tensor | None


class Pipeline:
    """A network and a scheduler that make pictures together.

    Args:
        unet: predicts what `scheduler.config.prediction_type` says, in the space of `vae`.
        scheduler: the sampler; replace it at any time: `pipe.scheduler = DDIMScheduler(…)`.
        vae: maps pictures to the space that the network works in; None for pixels.
        class_names: one a class. The network then knows one label more, the last, for "no class",
            which guidance needs; without it (num_class_embeds == len(class_names)) only
            guidance_scale 1 is possible.
        guidance_scale, num_inference_steps: used where a call gives none.
    Raises:
        InvalidArgument: the network does not fit the vae, class_names or guidance_scale.
    """

    def __init__(
        self,
        unet: UNet,
        scheduler: Scheduler,
        vae: SpaceToDepth | None = None,
        class_names: Sequence[str] = (),
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
    ) -> None:
        if isinstance(class_names, str) or not all(isinstance(n, str) for n in class_names):
            raise InvalidArgument(f"class_names must be a list of strings, got {class_names!r}")
        embeds = unet.config.num_class_embeds or 0
        if embeds not in (len(class_names), len(class_names) + 1) or bool(embeds) != bool(
            class_names
        ):
            raise InvalidArgument(
                f"class_names must name the network's {embeds} classes (all, or all but the last, "
                f"which then stands for no class); got {len(class_names)} names"
            )
        if vae is not None and unet.config.in_channels % vae.block**2:
            raise InvalidArgument(
                f"block must divide the network's {unet.config.in_channels} channels into blocks "
                f"of block² pixels, got {vae.block}"
            )
        self.unet, self.scheduler, self.vae = unet, scheduler, vae
        self.class_names = tuple(class_names)
        self.guidance_scale = self._scale(guidance_scale)
        self.num_inference_steps = whole_number("num_inference_steps", num_inference_steps, 1)
        self.dtype = torch.float32

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images: int | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        seed: int | None = None,
        generator: Generators = None,
        first_index: int = 0,
        batch_size: int = 256,
        output_type: str = "pil",
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> PipelineOutput:
        """Generate pictures.

        Args:
            class_labels: one class, or one an image; None for equal shares of all classes
                (image i gets class i modulo their number).
            num_images: N; by default as many as there are labels, or 1.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w of classifier-free guidance, 1 for none.
            eta: DDIM's η; only for schedulers whose step has it.
            seed: image i draws its noise from (seed, first_index + i) alone, whatever the batch
                size or the device. By default a seed from torch's global random state.
            generator: instead of a seed, one torch.Generator for all or a list of one an image.
            first_index: number of the first image, to make a part of a larger run.
            batch_size: images in the network at once; memory, not pictures, depends on it.
            output_type: "pil", "np" or "pt".
            callback: called with every `Step` of every batch.
            progress: show a progress bar.
        Raises:
            InvalidArgument: names the argument, before the network runs.
        """
        # 1. condition
        one_of("output_type", output_type, OUTPUT_TYPES)
        labels = self._labels(class_labels, num_images, first_index)
        n = len(labels) if labels is not None else num_images or 1
        scale = self._scale(self.guidance_scale if guidance_scale is None else guidance_scale)
        options = self._step_options(eta)
        whole_number("batch_size", batch_size, 1)
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps)  # refuses a bad number before anything else happens

        # 2. start
        source_of = _sources(n, seed, generator, first_index)
        shape, like = self._latent_shape(), next(self.unet.parameters())
        results = []
        with tqdm(total=n, unit="image", disable=not progress) as bar:
            for start in range(0, n, batch_size):
                part = slice(start, min(start + batch_size, n))
                source = source_of(part)
                self.scheduler.set_timesteps(steps, device=like.device)
                x = randn((part.stop - start, *shape), source, like.device)
                x = x * self.scheduler.init_noise_sigma

                # 3. loop
                denoise = self.denoiser(None if labels is None else labels[part], scale)
                for step in trajectory(denoise, self.scheduler, x, source, **options):
                    if callback is not None:
                        callback(step)

                # 4. decode
                results.append(self.decode(step.next_x))
                bar.update(len(x))
        return PipelineOutput(_as_output(torch.cat(results), output_type), labels)

    def denoiser(self, labels: Tensor | None, scale: float = 1.0) -> Denoiser:
        """The network under labels (B,) and guidance, as a function (x_t, t) → output."""
        if labels is None:
            denoise = conditional(self.unet, None)
        else:
            labels = labels.to(next(self.unet.parameters()).device, non_blocking=True)
            null = torch.full_like(labels, len(self.class_names))
            denoise = classifier_free(self.unet, labels, null, scale)
        return denoise if self.dtype == torch.float32 else autocast(denoise, self.dtype)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the pictures."""
        return tuple(self.decode(torch.empty(1, *self._latent_shape(), device="meta")).shape[1:])

    def decode(self, z: Tensor) -> Tensor:
        """From the network's space to pictures (B, C, H, W), nominally in [−1, 1]."""
        return z if self.vae is None else self.vae.decode(z)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Move the networks; returns the pipeline.

        Args:
            dtype: of the network's matrix work: float32, or bfloat16 or float16 by autocast. The
                weights and the sampler stay float32.
        Raises:
            InvalidArgument: another dtype, or a device that this machine does not have.
        """
        allowed = (torch.float32, torch.bfloat16, torch.float16)
        if dtype is not None and dtype not in allowed:
            raise InvalidArgument(f"dtype must be one of {allowed}, got {dtype}")
        self.unet.to(None if device is None else pick_device(device))
        self.dtype = dtype or self.dtype
        return self

    @property
    def has_null_class(self) -> bool:
        """Whether the network knows a label for "no class", so that guidance is possible."""
        return bool(self.class_names) and self.unet.config.num_class_embeds > len(self.class_names)

    # --- folders ---------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model_index.json`, `unet/`, `scheduler/` and, where there is one, `vae/`.

        The parts are diffusers' folders. An existing pipeline folder is replaced as a whole.

        Raises:
            CheckpointError: the folder cannot be written, or holds something else.
        """
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder}: not empty and not a pipeline, will not replace it")
        index: dict[str, Any] = {
            "_class_name": "Pipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "class_names": list(self.class_names),
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
        }
        with checkpoint.atomic_folder(folder) as temporary:
            self.unet.save_pretrained(temporary / "unet")
            self.scheduler.save_pretrained(temporary / "scheduler")
            if self.vae is not None:
                index["vae"] = ["minidiff", type(self.vae).__name__]
                self.vae.save_pretrained(temporary / "vae")
            checkpoint.write_json(temporary / INDEX, index)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Pipeline":
        """Read a folder that `save_pretrained` wrote.

        Raises:
            CheckpointError: names the file that is missing, damaged or not understood.
        """
        folder = Path(folder)
        index = checkpoint.read_json(folder / INDEX)
        known = {"_class_name", "unet", "scheduler", "vae", "class_names", "guidance_scale",
                 "num_inference_steps"}  # fmt: skip
        if index.get("_class_name") != "Pipeline" or not index.keys() <= known:
            raise CheckpointError(f"{folder / INDEX}: not written by minidiff's Pipeline")
        if missing := sorted(known - {"vae"} - index.keys()):
            raise CheckpointError(f"{folder / INDEX}: has no {missing[0]}")
        for part in ("unet", "scheduler", "vae"):
            if part in index and not _names_a_class(index[part]):
                raise CheckpointError(
                    f"{folder / INDEX}: {part} must be a library and a class, got {index[part]!r}"
                )
        if not isinstance(index["class_names"], list):
            raise CheckpointError(f"{folder / INDEX}: class_names must be a list")
        try:
            one_of("scheduler", index["scheduler"][1], SCHEDULERS)
            return cls(
                UNet.from_pretrained(folder / "unet"),
                _scheduler_from(folder / "scheduler", SCHEDULERS[index["scheduler"][1]]),
                SpaceToDepth.from_pretrained(folder / "vae") if "vae" in index else None,
                index["class_names"],
                index["guidance_scale"],
                index["num_inference_steps"],
            )
        except InvalidArgument as error:
            raise CheckpointError(f"{folder / INDEX}: {error}") from error

    # --- arguments, checked ----------------------------------------------------------------

    def _labels(
        self, given: int | Sequence[int] | Tensor | None, num_images: int | None, first: int
    ) -> Tensor | None:
        if num_images is not None:
            whole_number("num_images", num_images, 1, MAX_IMAGES)
        whole_number("first_index", first, 0, MAX_SEED)
        classes = len(self.class_names)
        if not classes:
            if given is not None:
                raise InvalidArgument("class_labels given, but this model has no classes")
            return None
        if given is None:
            return (torch.arange(num_images or 1) + first) % classes
        if isinstance(given, Tensor):
            given = given.tolist()
        if not isinstance(given, Sequence) or isinstance(given, str):
            given = [given] * (num_images or 1)
        labels = [whole_number("class_labels", label, 0, classes - 1) for label in given]
        if not labels or num_images not in (None, len(labels)):
            raise InvalidArgument(
                f"class_labels must name one class, or {num_images or 'at least 1'} of them; "
                f"got {len(labels)}"
            )
        return torch.tensor(labels)

    def _scale(self, given: float) -> float:
        scale = real_number("guidance_scale", given, -math.inf)
        if scale != 1 and not self.has_null_class:
            raise InvalidArgument(
                f"guidance_scale must be 1 for a model that knows no label for 'no class', "
                f"got {scale:g}"
            )
        return scale

    def _step_options(self, eta: float | None) -> dict[str, float]:
        if eta is None:
            return {}
        if not isinstance(self.scheduler, DDIMScheduler):
            raise InvalidArgument(f"eta is DDIM's; {type(self.scheduler).__name__} has none")
        return {"eta": real_number("eta", eta, 0, 1)}

    def _latent_shape(self) -> tuple[int, ...]:
        config = self.unet.config
        side = config.sample_size
        if side is None:
            raise InvalidArgument("the network's config names no sample_size")
        space = tuple(side) if isinstance(side, list | tuple) else (side, side)
        return (config.in_channels, *space)


def _names_a_class(entry: object) -> bool:
    return (
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
    )


def _scheduler_from(folder: Path, cls: type[Scheduler]) -> Scheduler:
    try:
        return cls.from_pretrained(folder)
    except InvalidArgument as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def _sources(
    n: int, seed: int | None, generator: Generators, first: int
) -> Callable[[slice], Generators]:
    """A function from a part of the n images to the source of its noise.

    Generators are made a batch at a time: torch's takes 5 kB, which 10,000 images would feel.
    """
    if seed is not None and generator is not None:
        raise InvalidArgument("give either seed or generator, not both")
    if generator is not None:
        if isinstance(generator, torch.Generator):
            return lambda part: generator
        listed = list(generator) if isinstance(generator, Sequence) else [generator]
        if not all(isinstance(one, torch.Generator) for one in listed):
            raise InvalidArgument(f"generator must be a torch.Generator or a list, got {generator}")
        if len(listed) != n:
            raise InvalidArgument(f"generator must list {n} generators, got {len(listed)}")
        return lambda part: listed[part]
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    # Plain ints, also where NumPy's were given: those overflow in the seed's mixing.
    seed = whole_number("seed", seed, 0, MAX_SEED)
    first = whole_number("first_index", first, 0, MAX_SEED + 1 - n)
    return lambda part: image_generators(seed, range(first + part.start, first + part.stop))


def _as_output(images: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return images
    array = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in array]
