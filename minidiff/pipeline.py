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

from minidiff import pipeline_folder
from minidiff.device import pick_device
from minidiff.errors import CheckpointError, InvalidArgument, one_of, real_number, whole_number
from minidiff.guidance import (
    Condition,
    Denoiser,
    autocast,
    classifier_free,
    conditional,
    each_tensor,
    in_dtype,
)
from minidiff.nn import AutoencoderKL, SpaceToDepth, UNet
from minidiff.nn.embeddings import SinusoidalTime
from minidiff.noise import MAX_SEED, Generators
from minidiff.pipeline_input import as_output, class_names_of, sources, starts, texts_of
from minidiff.prompt import Prompts, PromptsXL
from minidiff.sample import Step, trajectory
from minidiff.schedulers import DDIMScheduler, Scheduler
from minidiff.weights import DTYPES

OUTPUT_TYPES = ("pil", "np", "pt")
MAX_SIDE = 1 << 14
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
        prompts: what makes of a text the tokens that the network looks at.
    Raises:
        InvalidArgument: the network does not fit vae, class_names, prompts or guidance_scale.
    """

    def __init__(
        self,
        unet: UNet,
        scheduler: Scheduler,
        vae: SpaceToDepth | AutoencoderKL | None = None,
        class_names: Sequence[str] = (),
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        prompts: Prompts | PromptsXL | None = None,
    ) -> None:
        self.unet, self.scheduler, self.vae, self.prompts = unet, scheduler, vae, prompts
        self.class_names = tuple(class_names_of(class_names, unet))
        self._check_parts()
        if guidance_scale is None:
            guidance_scale = 1.0 if prompts is None else prompts.guidance_scale
        self.guidance_scale = self._scale(guidance_scale)
        self.num_inference_steps = whole_number("num_inference_steps", num_inference_steps, 1)
        self.dtype = torch.float32

    def _check_parts(self) -> None:
        channels = self.unet.config.in_channels
        if self.vae is not None:
            self.vae.check_channels(channels)
        wanted = self.unet.text_channels
        given = None if self.prompts is None else self.prompts.width
        if wanted != given:
            raise InvalidArgument(
                f"prompts must give tokens of {wanted} channels, which the network looks at "
                f"(None: it looks at none), got {given}"
            )
        if self.prompts is not None and self.class_names:
            raise InvalidArgument(
                "class_names must be empty beside prompts: a picture is of a text or of a class, "
                f"got {list(self.class_names)}"
            )
        numbers = self.unet.config.get("addition_embed_type") is not None
        if self.prompts is not None and self.prompts.needs_numbers != numbers:
            raise InvalidArgument(
                f"prompts must be {'PromptsXL' if numbers else 'Prompts'} for a network with "
                f"addition_embed_type={self.unet.config.addition_embed_type!r}"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | Sequence[int] | Tensor | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images: int | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        seed: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        first_index: int = 0,
        batch_size: int = 256,
        output_type: str = "pil",
        callback: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> PipelineOutput:
        """Generate pictures.

        Args:
            prompt: what to draw: one text, or one an image, for a network that looks at texts; for
                one with classes the same as class_labels.
            class_labels: one class, or one an image; None for equal shares of all classes
                (image i gets class i modulo their number).
            num_images: N; by default as many as there are prompts or labels, or 1.
            negative_prompt: what guidance leads away from, one text or one an image; None for no
                text. It needs a guidance_scale other than 1.
            height, width: of the pictures in pixels; by default those that the network was
                trained for.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w of classifier-free guidance, 1 for none.
            eta: DDIM's η; only for schedulers whose step has it.
            seed: image i draws its noise from (seed, first_index + i) alone, whatever the batch
                size or the device. By default a seed from torch's global random state.
            generator: instead of a seed, one torch.Generator for all or a list of one an image.
            latents: the start itself, standard normal noise (N, C, h, w) in the network's space;
                stochastic samplers still draw from seed or generator.
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
        told = self._told(prompt, class_labels, num_images, first_index)
        n = (num_images or 1) if told is None else len(told)
        scale = self._scale(self.guidance_scale if guidance_scale is None else guidance_scale)
        negative = self._negative(negative_prompt, n, scale)
        options = self._step_options(eta)
        whole_number("batch_size", batch_size, 1)
        shape = self._latent_shape(height, width)
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps)  # refuses a bad number before anything else happens

        # 2. start
        source_of = sources(n, seed, generator, first_index)
        start_of = starts(latents, (n, *shape), self.device)
        results = []
        with tqdm(total=n, unit="image", disable=not progress) as bar:
            for start in range(0, n, batch_size):
                part = slice(start, min(start + batch_size, n))
                self.scheduler.set_timesteps(steps, device=self.device)
                source = source_of(part)
                x = start_of(part, source) * self.scheduler.init_noise_sigma

                # 3. loop
                denoise = self.denoiser(
                    None if told is None else told[part],
                    scale,
                    negative=None if negative is None else negative[part],
                    size=self.image_size(shape),
                )
                for step in trajectory(denoise, self.scheduler, x, source, **options):
                    if callback is not None:
                        callback(step)

                # 4. decode
                results.append(self.decode(step.next_x))
                bar.update(len(x))
        labels = told if isinstance(told, Tensor) else None
        return PipelineOutput(as_output(torch.cat(results), output_type), labels)

    def denoiser(
        self,
        told: Tensor | Sequence[str] | None,
        scale: float = 1.0,
        *,
        negative: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Denoiser:
        """The network under a condition and guidance, as a function (x_t, t) → output.

        Args:
            told: labels (B,) or B prompts; None for a network that is told nothing.
            scale: w of classifier-free guidance.
            negative: B prompts to lead away from; None leads away from no text.
            size: (height, width) of the pictures, which SDXL is told; by default the usual one.
        """
        size = size or self.image_size(self._latent_shape())
        condition = self._condition(told, size)
        if self.is_told_guidance:
            condition = {**condition, "timestep_cond": self._guidance(scale, len(told))}
        condition = self._on_network(condition)
        denoise = conditional(self.unet, condition)
        if scale != 1 and not self.is_told_guidance:
            null = self._null(told, size) if negative is None else self._condition(negative, size)
            denoise = classifier_free(self.unet, condition, self._on_network(null), scale)
        weights = next(self.unet.parameters()).dtype
        if weights != torch.float32:
            return in_dtype(denoise, weights)
        return denoise if self.dtype == torch.float32 else autocast(denoise, self.dtype)

    @property
    def is_told_guidance(self) -> bool:
        """Whether the network was distilled from a guided one: it is told w, not led by it."""
        return self.unet.config.get("time_cond_proj_dim") is not None

    def _guidance(self, scale: float, n: int) -> Tensor:
        """Sinusoids of w − 1 (Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378)."""
        sinusoids = SinusoidalTime(self.unet.config.time_cond_proj_dim, False, freq_shift=1)
        return sinusoids(torch.full((n,), 1000 * (scale - 1)))

    def _condition(self, told: Tensor | Sequence[str] | None, size: tuple[int, int]) -> Condition:
        if told is None:
            return {}
        if isinstance(told, Tensor):
            return {"class_labels": told}
        return self.prompts.condition(told, size)

    def _null(self, told: Tensor | Sequence[str] | None, size: tuple[int, int]) -> Condition:
        """The condition that guidance leads away from."""
        if told is None:
            return {}
        if isinstance(told, Tensor):
            return {"class_labels": torch.full_like(told, len(self.class_names))}
        return self.prompts.null(len(told), size)

    def _on_network(self, condition: Condition) -> Condition:
        """Every tensor on the network's device, numbers with a fraction in its dtype."""
        like = next(self.unet.parameters())
        return each_tensor(
            condition,
            lambda tensor: tensor.to(
                like.device, like.dtype if tensor.is_floating_point() else None, non_blocking=True
            ),
        )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.unet.parameters()).device

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the pictures that the network was trained for."""
        shape = self._latent_shape()
        return shape if self.vae is None else self.vae.image_shape(shape)

    def image_size(self, latent_shape: Sequence[int]) -> tuple[int, int]:
        """(height, width) in pixels of what (C, h, w) in the network's space decodes to."""
        shape = latent_shape if self.vae is None else self.vae.image_shape(latent_shape)
        return tuple(shape[-2:])

    def decode(self, z: Tensor) -> Tensor:
        """From the network's space to pictures (B, C, H, W), nominally in [−1, 1]."""
        if self.vae is None:
            return z
        weights = next(self.vae.parameters(), z)  # a permutation has none
        return self.vae.from_latents(z.to(weights.dtype)).to(z.dtype)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Move the networks; returns the pipeline.

        Args:
            dtype: of the U-Net's matrix work: float32, or bfloat16 or float16 by autocast. The
                weights and the sampler stay as they are.
        Raises:
            InvalidArgument: another dtype, or a device that this machine does not have.
        """
        allowed = (torch.float32, torch.bfloat16, torch.float16)
        if dtype is not None and dtype not in allowed:
            raise InvalidArgument(f"dtype must be one of {allowed}, got {dtype}")
        place = None if device is None else pick_device(device)
        encoders = () if self.prompts is None else self.prompts.encoders
        for network in (self.unet, self.vae, *encoders):
            if network is not None:
                network.to(place)
        self.dtype = dtype or self.dtype
        return self

    @property
    def has_null_class(self) -> bool:
        """Whether the network knows a label for "no class", so that guidance is possible."""
        return bool(self.class_names) and self.unet.config.num_class_embeds > len(self.class_names)

    # --- folders ---------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model_index.json` and a folder a part, which are diffusers'.

        A pipeline with prompts is written as diffusers' StableDiffusionPipeline or
        StableDiffusionXLPipeline. An existing pipeline folder is replaced as a whole.

        Raises:
            CheckpointError: the folder cannot be written, or holds something else.
        """
        pipeline_folder.write(
            folder,
            {"unet": self.unet, "scheduler": self.scheduler, "vae": self.vae},
            self.prompts,
            {
                "class_names": list(self.class_names),
                "guidance_scale": self.guidance_scale,
                "num_inference_steps": self.num_inference_steps,
            },
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> "Pipeline":
        """Read a folder that `save_pretrained` of minidiff wrote, or diffusers: Stable Diffusion
        1.x, 2.x and XL, and pictures without a condition (DDPMPipeline, DDIMPipeline).

        Args:
            torch_dtype: of the networks' weights: float32, float64, float16 or bfloat16.
            variant: "fp16" for the files `….fp16.safetensors`.
        Raises:
            CheckpointError: names the file that is missing, damaged or not understood.
            InvalidArgument: another dtype.
        """
        try:
            return cls(**pipeline_folder.read(folder, torch_dtype, variant))
        except InvalidArgument as error:
            if torch_dtype not in DTYPES:
                raise
            raise CheckpointError(f"{Path(folder) / pipeline_folder.INDEX}: {error}") from error

    # --- arguments, checked ----------------------------------------------------------------

    def _told(
        self,
        prompt: str | Sequence[str] | int | Sequence[int] | Tensor | None,
        class_labels: int | Sequence[int] | Tensor | None,
        num_images: int | None,
        first: int,
    ) -> Tensor | list[str] | None:
        """What every image is of: labels (N,), N prompts, or None."""
        if num_images is not None:
            whole_number("num_images", num_images, 1, MAX_IMAGES)
        whole_number("first_index", first, 0, MAX_SEED)
        for name, given, able in (
            ("prompt", prompt, self.prompts is not None or bool(self.class_names)),
            ("class_labels", class_labels, bool(self.class_names)),
        ):
            if given is not None and not able:
                raise InvalidArgument(f"{name} must be None: this model takes none, got {given!r}")
        if self.class_names and prompt is not None:
            if class_labels is not None:
                raise InvalidArgument("give either prompt or class_labels, not both")
            class_labels = prompt
        if self.prompts is not None:
            if prompt is None:
                raise InvalidArgument("prompt must be given: this model draws what a text says")
            return texts_of("prompt", prompt, num_images)
        return self._labels(class_labels, num_images, first) if self.class_names else None

    def _labels(
        self, given: int | Sequence[int] | Tensor | None, num_images: int | None, first: int
    ) -> Tensor:
        classes = len(self.class_names)
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

    def _negative(
        self, given: str | Sequence[str] | None, n: int, scale: float
    ) -> list[str] | None:
        if given is None:
            return None
        why = None
        if self.prompts is None:
            why = "this model takes no prompts"
        elif self.is_told_guidance:
            why = "this model was distilled, nothing leads it away from a text"
        elif scale == 1:
            why = "guidance_scale is 1"
        if why:
            raise InvalidArgument(f"negative_prompt must be None: {why}, got {given!r}")
        return texts_of("negative_prompt", given, n)

    def _scale(self, given: float) -> float:
        scale = real_number("guidance_scale", given, -math.inf)
        if scale != 1 and not (self.has_null_class or self.prompts):
            raise InvalidArgument(
                f"guidance_scale must be 1 for a model that takes no prompt and knows no label "
                f"for 'no class', got {scale:g}"
            )
        return scale

    def _step_options(self, eta: float | None) -> dict[str, float]:
        if eta is None:
            return {}
        if not isinstance(self.scheduler, DDIMScheduler):
            raise InvalidArgument(f"eta is DDIM's; {type(self.scheduler).__name__} has none")
        return {"eta": real_number("eta", eta, 0, 1)}

    def _latent_shape(
        self, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w) in the network's space, of pictures of this size or of the usual one."""
        config = self.unet.config
        usual = config.sample_size
        divisor = 1 if self.vae is None else self.vae.divisor
        if usual is None and None in (height, width):
            raise InvalidArgument(
                "height and width must be given: the network's config names no sample_size"
            )
        sides = list(usual) if isinstance(usual, list | tuple) else [usual, usual]
        for i, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is not None:
                if whole_number(name, pixels, 1, MAX_SIDE) % divisor:
                    raise InvalidArgument(f"{name} must be a multiple of {divisor}, got {pixels}")
                sides[i] = pixels // divisor
        return (config.in_channels, *sides)
