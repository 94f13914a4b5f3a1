"""One pipeline: a network, a scheduler, and the whole way from a seed to pictures.

`Pipeline.__call__` reads like the method: prepare the condition, prepare the start, loop, decode.
Text-to-image, image-to-image and inpainting are its arguments.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff.errors import CheckpointError, InvalidArgument, true_or_false, whole_number
from minidiff.guidance import (
    Condition,
    Denoiser,
    Network,
    autocast,
    autoguidance,
    autoguided,
    beside,
    both,
    conditional,
    each_tensor,
    extrapolated,
    in_dtype,
    interval_of,
    within,
)
from minidiff.images.pixels import as_output, check_output, original_of
from minidiff.nn import AutoencoderKL, SpaceToDepth, UNet
from minidiff.nn.blocks.embeddings import SinusoidalTime
from minidiff.noise import Generators
from minidiff.pipeline import folder as pipeline_folder
from minidiff.pipeline.inpaint import length, repaint
from minidiff.pipeline.parts import (
    autoguidance_of,
    check_parts,
    check_weaker,
    class_names_of,
    scale_of,
)
from minidiff.pipeline.request import (
    EXTRAPOLATED,
    Guidance,
    Guide,
    StepEnd,
    against_of,
    entry_of,
    guidance_of,
    number_of,
    optional_function,
    parts_of,
    reconstruction_of,
    sides_of,
    step_options,
    told_of,
    walks_of,
    with_callback,
)
from minidiff.pipeline.space import Space
from minidiff.pipeline.start import sources, start_of, starts
from minidiff.runtime.device import pick_device
from minidiff.runtime.tensors import DTYPES
from minidiff.sample import Step, meaning_of
from minidiff.schedulers import Scheduler
from minidiff.text.prompts import Prompts, PromptsXL


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
        guidance_scale, num_inference_steps, guidance_interval: used where a call gives none.
        prompts: what makes of a text the tokens that the network looks at.
        weaker: a network that is told and says the same, smaller or less trained, which
            autoguidance leads away from.
        autoguidance_scale: used where a call gives none; other than 1 only with `weaker`.
    Raises:
        InvalidArgument: the network does not fit vae, class_names, prompts, guidance_scale or
            weaker.
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
        guidance_interval: Sequence[float] | None = None,
        weaker: UNet | None = None,
        autoguidance_scale: float = 1.0,
    ) -> None:
        self.unet, self.scheduler, self.vae, self.prompts = unet, scheduler, vae, prompts
        self.class_names, self.weaker = tuple(class_names_of(class_names, unet)), weaker
        check_parts(unet, vae, prompts, self.class_names, self.space.channels)
        check_weaker(weaker, unet)
        self.autoguidance_scale = autoguidance_of(autoguidance_scale, weaker)
        if guidance_scale is None:
            guidance_scale = 1.0 if prompts is None else prompts.guidance_scale
        self.guidance_scale = scale_of(guidance_scale, self.is_guidable)
        self.num_inference_steps = whole_number("num_inference_steps", num_inference_steps, 1)
        self.guidance_interval = interval_of(guidance_interval)
        self.dtype = torch.float32

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | Sequence[int] | Tensor | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_images: int | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        resamples: int = 1,
        jump_length: int = 1,
        reconstruction_guidance: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance_scale: float | None = None,
        guide: Guide | None = None,
        eta: float | None = None,
        seed: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        first_index: int = 0,
        batch_size: int = 256,
        output_type: str = "pil",
        callback: Callable[[Step], None] | None = None,
        callback_on_step_end: StepEnd | None = None,
        progress: bool = False,
    ) -> PipelineOutput:
        """Generate pictures, or change those that are given.

        Args:
            prompt: what to draw: one text, or one an image, for a network that looks at texts,
                where "" is no text at all; for one with classes the same as class_labels.
            class_labels: one class, or one an image; None for equal shares of all classes
                (image i gets class i modulo their number).
            num_images: N; by default as many as there are prompts, labels or given images, or 1.
            negative_prompt: what guidance leads away from, one text or one an image; None for no
                text. Without guidance it has no effect, of which a warning tells.
            image: image-to-image: where to start from, one picture or one each, in any form of
                `pictures.pixels_of`.
            strength: how much of the way to noise and back is gone, in [0, 1]: the last
                ⌊strength · steps⌋ steps are taken. 0 returns the image as it is. By default 0.8, or
                1 with a mask, which then starts from noise alone.
            mask_image: inpainting: white (1) where the image is to be replaced, black where every
                bit of it stays, grey where the two are blended; see `pictures.mask_of`.
            resamples: how often every step is taken with RePaint, 1 for once; see `inpaint.py`.
            jump_length: how many steps RePaint goes back at a time (the paper: 10 of 250 steps,
                each taken 10 times).
            reconstruction_guidance: w of `inpaint.reconstructing`, at least 0: how much what the
                network guesses of the kept part has to say about the rest; 5 closes seams, in two
                to three times the time.
            num_images_per_prompt: how many of each prompt, label or image, one after another.
            height, width: of the pictures in pixels; by default those of the image, or that the
                network was trained for.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w of classifier-free guidance, 1 for none.
            guidance_rescale: φ of `guidance.rescaled`, in [0, 1].
            guidance_interval: two σ/α; guidance between them alone, see `guidance.within`. (0, inf)
                is everywhere, also where the model has an interval of its own.
            autoguidance_scale: w of `guidance.autoguidance`, away from the model's weaker network,
                1 for none; between the same σ/α, and before all other guidance.
            guide: another way of guidance, (pair, w) → denoiser, such as
                `lambda pair, w: projected(pair, w, meaning_of(pipe.scheduler))`.
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
            callback_on_step_end: as in diffusers, called as (pipe, step, timestep,
                {"latents": x}) after every step; a tensor "latents" that it returns replaces x.
            progress: show a progress bar.
        Raises:
            InvalidArgument: names the argument, before a network runs.
        """
        # 1. condition
        space = self.space
        check_output(output_type, space.image_channels)
        true_or_false("progress", progress)
        optional_function("callback", callback)
        optional_function("callback_on_step_end", callback_on_step_end)
        original = original_of(
            image, mask_image, space.image_channels, needs_mask=space.is_told_mask
        )
        told, n = told_of(
            prompt, class_labels, number_of(num_images, num_images_per_prompt, original),
            num_images_per_prompt, first_index, self.prompts, self.class_names,
        )  # fmt: skip
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        scale = scale_of(scale, self.is_guidable)
        against = against_of(
            negative_prompt, n, num_images_per_prompt, scale, self.prompts, self.is_told_guidance
        )
        guidance = guidance_of(
            guidance_rescale,
            guidance_interval or self.guidance_interval,
            guide,
            self.autoguidance_scale if autoguidance_scale is None else autoguidance_scale,
            self.is_guidable and not self.is_told_guidance,
            self.weaker,
        )
        options = step_options(self.scheduler, eta)
        shape = space.shape(*sides_of(height, width, original))

        # 2. start
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        restart = partial(self._restart, steps)
        restart(0)  # refuses a bad number before anything else happens
        begin = entry_of(self.scheduler, strength, original)
        walks = walks_of(self.scheduler, begin, resamples, jump_length, original)
        pull = reconstruction_of(reconstruction_guidance, original, space.is_told_mask)
        parts = parts_of(n, batch_size)
        source_of = sources(n, seed, generator, first_index)
        noise_of = starts(latents, (n, *shape), self.device)
        original = None if original is None else original.times(n)
        if not walks:
            return self._output([original.pixels], told, output_type)
        results = []
        with tqdm(total=len(parts) * length(walks), unit="step", disable=not progress) as bar:
            for part in parts:
                source = source_of(part)
                restart(begin)
                start = start_of(
                    None if original is None else original.part(part, self.device),
                    space, self.scheduler, begin, partial(noise_of, part, source), source,
                    fresh=resamples > 1, reconstruction=pull,
                )  # fmt: skip

                # 3. loop
                denoise = start.lead(
                    self.denoiser(
                        None if told is None else told[part],
                        scale,
                        negative=None if against is None else against[part],
                        size=space.image_size(shape),
                        guidance=guidance,
                        shown=start.shown,
                    )
                )
                after = with_callback(start.after, callback_on_step_end, self)
                for step in repaint(
                    denoise, self.scheduler, start.x, source, walks, restart, after, **options
                ):
                    if callback is not None:
                        callback(step)
                    bar.update()

                # 4. decode
                results.append(start.finish(self.decode(step.next_x)))
        return self._output(results, told, output_type)

    def _restart(self, steps: int, begin: int = 0) -> None:
        """Forget any sampling under way; begin at this entry of a grid of so many steps."""
        self.scheduler.set_timesteps(steps, device=self.device)
        if begin:
            self.scheduler.set_begin_index(begin)

    def _output(
        self, parts: list[Tensor], told: Tensor | list[str] | None, output_type: str
    ) -> PipelineOutput:
        labels = told if isinstance(told, Tensor) else None
        return PipelineOutput(as_output(torch.cat(parts), output_type), labels)

    def denoiser(
        self,
        told: Tensor | Sequence[str] | None,
        scale: float = 1.0,
        *,
        negative: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        guidance: Guidance = EXTRAPOLATED,
        shown: Tensor | None = None,
    ) -> Denoiser:
        """The network under a condition and guidance, as a function (x_t, t) → output.

        Args:
            told: labels (B,) or B prompts; None for a network that is told nothing.
            scale: w of guidance.
            negative: B prompts to lead away from; None leads away from no text.
            size: (height, width) of the pictures, which SDXL is told; by default the usual one.
            guidance: in which way; by default extrapolation at every level.
            shown: channels that the network is shown beside x, (B, C', h, w).
        """
        size = size or self.space.image_size(self.space.shape())
        condition = self._condition(told, size)
        if self.is_told_guidance:
            condition = {**condition, "timestep_cond": self._guidance(scale, len(told))}
        condition, network = self._on_network(condition), self._network(self.unet, shown)
        led = plain = conditional(network, condition)
        auto = guidance.autoguidance
        if auto != 1:
            weaker = conditional(self._network(self.weaker, shown), condition)
            led = autoguidance(plain, weaker, auto)
        if not self.is_told_guidance and (scale != 1 or guidance.guide is not extrapolated):
            null = self._null(told, size) if negative is None else self._condition(negative, size)
            pair = both(network, condition, self._on_network(null))
            led = guidance.guide(pair if auto == 1 else autoguided(pair, weaker, auto), scale)
        if led is plain or guidance.interval is None:
            return led
        return within(led, plain, meaning_of(self.scheduler), *guidance.interval)

    def _network(self, network: UNet, shown: Tensor | None) -> Network:
        """A U-Net in its number type, float32 outside."""
        weights = next(network.parameters()).dtype
        if weights != torch.float32:
            network = in_dtype(network, weights)
        elif self.dtype != torch.float32:
            network = autocast(network, self.dtype)
        return network if shown is None else beside(network, shown)

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
    def space(self) -> Space:
        """Where the network works, and the way there and back."""
        return Space(self.unet.config, self.vae)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the pictures that the network was trained for."""
        return (self.space.image_channels, *self.space.image_size(self.space.shape()))

    def encode(self, pixels: Tensor, generator: Generators = None) -> Tensor:
        """From pictures (B, C, H, W) in [−1, 1] to the network's space, see `Space.encode`."""
        return self.space.encode(pixels, generator)

    def decode(self, z: Tensor) -> Tensor:
        """From the network's space to pictures (B, C, H, W), nominally in [−1, 1]."""
        return self.space.decode(z)

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
        for network in (self.unet, self.weaker, self.vae, *encoders):
            if network is not None:
                network.to(place)
        self.dtype = dtype or self.dtype
        return self

    @property
    def has_null_class(self) -> bool:
        """Whether the network knows a label for "no class", so that guidance is possible."""
        return bool(self.class_names) and self.unet.config.num_class_embeds > len(self.class_names)

    @property
    def is_guidable(self) -> bool:
        """Whether the network knows the absence of what it is told, so that guidance is possible;
        for a distilled network, whether it can be told a scale."""
        return self.has_null_class or self.prompts is not None

    # --- folders ---------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model_index.json` and a folder a part, which are diffusers'.

        A pipeline with prompts is written as diffusers' StableDiffusionPipeline or
        StableDiffusionXLPipeline. An existing pipeline folder is replaced as a whole.

        Raises:
            CheckpointError: the folder cannot be written, or holds something else.
            InvalidArgument: there is a weaker network, which diffusers' pipelines do not know.
        """
        pipeline_folder.write(
            folder,
            {
                "unet": self.unet,
                "scheduler": self.scheduler,
                "vae": self.vae,
                "weaker": self.weaker,
            },
            self.prompts,
            {
                "class_names": list(self.class_names),
                "guidance_scale": self.guidance_scale,
                "num_inference_steps": self.num_inference_steps,
                "guidance_interval": self.guidance_interval,
                "autoguidance_scale": self.autoguidance_scale,
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
