"""The pipeline: a network, a scheduler, and everything between a seed and images.

`Pipeline.__call__` follows the method: request, start, loop, decode. Arguments select
text-to-image, image-to-image or inpainting.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument, one_of, whole_number
from minidiff.guidance import Denoiser, Network, interval_of
from minidiff.names import GUIDES
from minidiff.nn import AutoencoderKL, ControlNet, DenoisingNetwork, SpaceToDepth
from minidiff.noise import Generators
from minidiff.pipeline import card
from minidiff.pipeline import folder as pipeline_folder
from minidiff.pipeline.denoiser import Guidance, Method, build_denoiser, evaluated_by
from minidiff.pipeline.late import LateMethods
from minidiff.pipeline.parts import (
    check_autoguidance_scale,
    check_class_names,
    check_guidance_network,
    check_guidance_scale,
    check_kinds,
    check_parts,
)
from minidiff.pipeline.request import Request
from minidiff.pipeline.space import LatentSpace, PointSpace, space_of
from minidiff.pipeline.start import InitialState, initial_state
from minidiff.pipeline.walk import StepEnd, StepFunction, WalkedStep, walked
from minidiff.runtime.device import pick_device
from minidiff.runtime.files import user_path
from minidiff.runtime.progress import progress_bar
from minidiff.runtime.tensors import DTYPES
from minidiff.sample import Step
from minidiff.schedulers import Scheduler
from minidiff.text.prompts import WordPrompts
from minidiff.text.sd3 import AnyPrompts


class PipelineOutput(NamedTuple):
    """Images of a pipeline.

    Attributes:
        images: a list of PIL images ("pil"), a uint8 array (N, H, W, C) ("np"), or an unclipped
            float tensor (N, C, H, W), nominally in [−1, 1] ("pt"); samples of the network
            (N, C, h, w) for "latent". Points are (N, D): a float32 array ("np") or a tensor.
        labels: (N,) int64 class labels on the CPU, or None.
        flagged: names of the concepts that a filter found in each image, () for none; None without
            a filter, see `minidiff.adapters.concept_filter`.
    """

    images: Any
    labels: Tensor | None
    flagged: list[tuple[str, ...]] | None = None


class Pipeline(LateMethods):
    """A network and a scheduler that generate images together.

    Args:
        unet: network whose output is `scheduler.config.prediction_type`, in the space of `vae`: a
            `UNet` or `MMDiT`, or an `MLP` for points.
        scheduler: sampler; replace it at any time: `pipe.scheduler = DDIMScheduler(…)`.
        vae: maps images to the network's space and back; None for pixels.
        class_names: one name per class. A network with one more class embedding uses the last as
            "no class", which classifier-free guidance needs.
        guidance_scale, num_inference_steps, guidance_interval, guide: defaults of a call; `guide`
            is a name of `guidance.METHODS`.
        prompts: tokenizer and text encoder of a network that is conditioned on text.
        weaker: guidance network of autoguidance: a smaller or less trained network with the same
            inputs and outputs.
        autoguidance_scale: default of a call; must be 1 without `weaker`.
        controlnets: networks that a control image steers `unet` through, see
            `minidiff.adapters.control`.
    Attributes:
        wraps: functions from a denoiser to a denoiser, applied in order to the guided denoiser
            of every call. Sliding windows and inference engines are such functions.
        finishers: functions from images (B, C, H, W) in [−1, 1] to images, applied in order after
            decoding. Watermarks are such functions, and concept filters, which return `Flagged`.
        engines: from a network, or the prompts, to a function that returns its function evaluated
            in another way; filled by `optimize`.
        guidance_network: the argument `weaker`.
        dtype: number type of the U-Net's matrix products, see `to`.
    Raises:
        InvalidArgument: the network does not fit vae, class_names, prompts, guidance_scale or
            weaker.
    """

    def __init__(
        self,
        unet: DenoisingNetwork,
        scheduler: Scheduler,
        vae: SpaceToDepth | AutoencoderKL | None = None,
        class_names: Sequence[str] = (),
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        prompts: AnyPrompts | None = None,
        guidance_interval: Sequence[float] | None = None,
        weaker: DenoisingNetwork | None = None,
        autoguidance_scale: float = 1.0,
        guide: str = "cfg",
        controlnets: Sequence[ControlNet] = (),
    ) -> None:
        check_kinds(unet, scheduler, vae, prompts, weaker)
        self.unet, self.scheduler, self.vae, self.prompts = unet, scheduler, vae, prompts
        self.class_names, self.weaker = check_class_names(class_names, unet), weaker
        check_parts(unet, vae, prompts, self.class_names, self.space.channels)
        self.controlnets = self.with_controls(controlnets).controlnets
        check_guidance_network(weaker, unet)
        self.autoguidance_scale = check_autoguidance_scale(autoguidance_scale, weaker)
        if guidance_scale is None:
            guidance_scale = 1.0 if prompts is None else prompts.guidance_scale
        self.guidance_scale = check_guidance_scale(guidance_scale, self.is_guidable)
        self.num_inference_steps = whole_number("num_inference_steps", num_inference_steps, 1)
        one_of("guide", guide, GUIDES)
        self.guide, self.guidance_interval = guide, interval_of(guidance_interval)
        self.wraps: list[Callable[[Denoiser], Denoiser]] = []
        self.finishers: list[Callable[[Tensor], Tensor]] = []
        self.engines: dict[Any, Callable] = {}
        self.dtype = torch.float32

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | int | Sequence[int] | Tensor | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images: int | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        clip_skip: int | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        resamples: int = 1,
        jump_length: int = 1,
        reconstruction_guidance: float = 0.0,
        control_image: Any = None,
        control_scale: float | Sequence[float] = 1.0,
        control_interval: Sequence = (0.0, 1.0),
        guess_mode: bool = False,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance_scale: float | None = None,
        guide: Method | str | None = None,
        eta: float | None = None,
        seed: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        first_index: int = 0,
        batch_size: int = 256,
        output_type: str = "pil",
        callback: Callable[[Step], None] | None = None,
        callback_on_step_end: StepFunction | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool | None = None,
    ) -> PipelineOutput:
        """Generate images, or edit given ones.

        Args:
            prompt: one text, or one per image, for a network that is conditioned on text; "" is
                the unconditional text. `minidiff.text.phrase` has weights of words and mixtures.
                For a network with classes, an alias of class_labels.
            class_labels: one class, or one per image, by number or by name; None for all classes
                in turn (image i gets class i modulo their number).
            num_images: N; by default the number of prompts, labels or given images, else 1.
            negative_prompt: text that guidance moves away from, one for all or one per image; None
                for the empty text. Without guidance it has no effect, and a warning says so.
            prompt_2, negative_prompt_2: texts for the second encoder of Stable Diffusion XL and 3;
                None for the same.
            prompt_3, negative_prompt_3: texts for the third encoder of Stable Diffusion 3, T5.
            clip_skip: last layers of the text encoder that are left out for prompt, as in
                diffusers; SDXL and Stable Diffusion 3 leave out one in any case.
            image: image-to-image: one image to start from, or one per image, in any form that
                `images.pixels.as_pixels` accepts.
            strength: fraction of the way to noise and back, in [0, 1]: the last
                ⌊strength · steps⌋ steps are taken, and 0 returns the image unchanged. The default
                is 0.8, or 1 with a mask, where sampling then starts from pure noise.
            mask_image: inpainting: white (1) where the image is replaced, black where it is kept
                bit for bit, grey where the two are blended; see `images.pixels.as_mask`.
            resamples: how many times RePaint takes every step; 1 for plain inpainting.
            jump_length: steps that RePaint goes back at a time (the paper: 10 of 250 steps, each
                taken 10 times).
            reconstruction_guidance: w of `inpaint.reconstructing`, at least 0: how strongly the
                kept part guides the rest. 5 closes seams, in two to three times the time.
            control_image: image that steers the ControlNet, of the size of the images: one for all
                or one per image, in a form of `images.pixels.as_pixels`, floats in [0, 1]. With
                several ControlNets a list with one of these for each.
            control_scale: factor of the ControlNet's residuals, or a list for several; 0 is the
                network alone.
            control_interval: fractions of the steps between which the ControlNet acts, two
                numbers in [0, 1], or a list of such pairs for several.
            guess_mode: True to let the ControlNet guess without a prompt: weaker at the larger
                sizes, and without effect on the unconditional half of guidance.
            num_images_per_prompt: consecutive images per prompt, label or given image.
            height, width: image size in pixels; by default the size of the given image, or the one
                that the network was trained on.
            num_inference_steps: steps of the scheduler.
            timesteps: the steps themselves, strictly falling, instead of their number.
            sigmas: noise levels instead of either, as the scheduler's `set_timesteps` takes them.
            guidance_scale: w of classifier-free guidance; 1 disables it. Below 1 it interpolates
                towards the unconditional network; Stable Diffusion checkpoints are then not guided
                at all, as in diffusers.
            guidance_rescale: φ of `guidance.rescaled`, in [0, 1].
            guidance_interval: two σ/α between which guidance applies, see `guidance.within`.
                (0, inf) is everywhere, even for a model that stores an interval.
            autoguidance_scale: w of `guidance.autoguidance`; 1 disables it. It applies in
                guidance_interval, before all other guidance, and needs a guidance network.
            guide: way of guidance: "cfg", "rescale" or "apg" (`guidance.METHODS`), or a function
                (pair, w) → denoiser.
            eta: η of DDIM; only for schedulers whose step has it.
            seed: image i draws its noise from (seed, first_index + i) alone, for every batch size
                and device. By default drawn from torch's global random state.
            generator: instead of a seed, one torch.Generator for all or a list of one per image.
            latents: the initial standard normal noise (N, C, h, w), in the network's space;
                stochastic samplers still draw from seed or generator.
            first_index: number of the first image, to generate part of a larger set.
            batch_size: images in the network at once; it affects memory, not images.
            output_type: "pil", "np" or "pt"; "latent" for the network's samples, not decoded.
            callback: called with every `Step` of every batch.
            callback_on_step_end: function as in diffusers, called as (pipe, step, timestep,
                tensors) after every step; tensors that it returns by name replace those given.
                Setting `pipe._interrupt = True` ends sampling after this step.
            callback_on_step_end_tensor_inputs: names of these tensors: "latents" is x and
                "denoised" x̂0. A network conditioned on text also has "prompt_embeds", the negative
                ones first where it is guided; see `walk.NETWORK_INPUTS`.
            progress: True for a progress bar, False for none; None for one where someone watches,
                see `minidiff.runtime.progress`.
        Raises:
            InvalidArgument: an argument is not allowed; raised before a network runs.
        """
        arguments = dict(locals())
        del arguments["self"]
        own, request = self._one_call(**arguments)
        if request.first_step == len(own.scheduler.grid):  # strength 0: nothing to do
            return self._unchanged(request)
        images = []
        total = len(request.batches) * request.evaluations
        with progress_bar(total, request.progress, unit="step") as bar:
            for batch in request.batches:
                if own._interrupt or self._interrupt:
                    break
                start, steps = own.sampling(request, batch)
                for step in steps:
                    if request.callback is not None:
                        request.callback(step)
                    bar.update()
                    if own._interrupt or self._interrupt:
                        break
                images.append(
                    step.next_x
                    if request.output_type == "latent"
                    else start.finish(self.decode(step.next_x))
                )
        return self.output(request, images)

    def walk(self, *arguments: Any, **options: Any) -> Iterator[WalkedStep]:
        """Generate images one step of the loop at a time.

            for step in pipe.walk(class_labels=7, seed=1):
                print(step.t, step.change)  # step.images: what x̂0 looks like

        Args:
            arguments, options: those of a call, for images of one batch.
        Returns:
            Iterator over `minidiff.pipeline.walk.WalkedStep`; the last one's `next_images` are what
            a call with these arguments returns, bit for bit.
        Raises:
            InvalidArgument: as a call, before the first step; or the images do not fit in one
                batch, or strength is 0.
        """
        return walked(self, *self._one_call(*arguments, **options))

    def _one_call(self, *arguments: Any, **options: Any) -> tuple["Pipeline", Request]:
        """Return this pipeline with a separate scheduler, and the request of a call.

        Calls in several threads, or between two steps of a walk, then change nothing of each other.
        """
        own = copy.copy(self)
        own.scheduler = self.scheduler.copied()
        own._interrupt = self._interrupt = False  # diffusers' name: a callback may set it
        request = Request.of(own, *arguments, **options)
        vars(self.scheduler).update(vars(own.scheduler.copied()))  # shows the grid of this call
        return own, request

    def sampling(self, request: Request, batch: slice) -> tuple[InitialState, Iterator[Step]]:
        """Return where one batch of a request starts, and the steps of its sampling."""
        source = request.source_of(batch)
        start = initial_state(request, batch, self.space, self.scheduler, source, self.device)
        step_end = request.on_step_end()
        denoise = self._denoiser_of(request, batch, start, step_end)
        after_step = step_end.following(start.after_step)
        options = request.step_options
        return start, start.walk(denoise, self.scheduler, start.x, source, after_step, **options)

    def _denoiser_of(
        self, request: Request, batch: slice, start: InitialState, step_end: StepEnd
    ) -> Denoiser:
        """Return the denoiser of one batch of a request."""
        conditioning, negative = request.conditioning, request.negative
        denoise = self.denoiser(
            None if conditioning is None else conditioning[batch],
            request.guidance,
            negative=None if negative is None else negative[batch],
            size=self.space.image_size(request.shape),
            extra_channels=start.extra_channels,
            watch=request.watching(batch, step_end),
        )
        return start.wrap(denoise)

    def _unchanged(self, request: Request) -> PipelineOutput:
        """Return the given images of a request of strength 0."""
        pixels = request.original.pixels
        latent = request.output_type == "latent"
        return self.output(request, [self.space.mode(pixels.to(self.device)) if latent else pixels])

    def output(self, request: Request, batches: list[Tensor]) -> PipelineOutput:
        """Return finished images and labels of batches, of the request's output type."""
        images = torch.cat(batches)
        labels = request.conditioning if isinstance(request.conditioning, Tensor) else None
        labels = None if labels is None else labels[: len(images)]
        if request.output_type == "latent":
            return PipelineOutput(images, labels)
        images, flagged = self.finished(images)
        return PipelineOutput(self.space.output(images, request.output_type), labels, flagged)

    def denoiser(
        self,
        conditioning: Tensor | Sequence[str] | None,
        guidance: float | Guidance = 1.0,
        *,
        negative: Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        extra_channels: Tensor | None = None,
        watch: Callable[[Network], Network] = lambda network: network,
    ) -> Denoiser:
        """Return the network under conditioning and guidance, as a function (x_t, t) → output.

        Args:
            conditioning: class labels (B,) or B prompts; None for an unconditional network.
            guidance: scale w of classifier-free guidance, or scale and method.
            negative: B prompts to guide away from; None for the empty text.
            size: (height, width) of the images, an input of SDXL; by default the network's own.
            extra_channels: further input channels of an inpainting network, (B, C', h, w).
            watch: function from the network to the one that is evaluated.
        """
        if not isinstance(guidance, Guidance):
            guidance = Guidance(guidance)
        size = size or self.space.image_size(self.space.shape())
        denoise = build_denoiser(
            self, conditioning, guidance, negative, size, extra_channels, watch
        )
        for wrap in self.wraps:
            denoise = wrap(denoise)
        return denoise

    @property
    def unets(self) -> tuple[DenoisingNetwork, ...]:
        """The network, and the guidance network if there is one."""
        return (self.unet,) if self.weaker is None else (self.unet, self.weaker)

    @property
    def guidance_network(self) -> DenoisingNetwork | None:
        """Network that autoguidance moves samples away from; None without autoguidance."""
        return self.weaker

    @property
    def takes_guidance_scale(self) -> bool:
        """Whether the network was distilled with guidance and takes w as an input."""
        return self.unet.config.get("time_cond_proj_dim") is not None

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.unet.parameters()).device

    @property
    def space(self) -> LatentSpace | PointSpace:
        """Space of the network, and the maps from images and back."""
        return space_of(self.unet, self.vae)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images that the network was trained on; (D,) of points."""
        return (self.space.image_channels, *self.space.image_size(self.space.shape()))

    def encode(self, pixels: Tensor, generator: Generators = None) -> Tensor:
        """Map images (B, C, H, W) in [−1, 1] to the network's space, see `LatentSpace.encode`."""
        return self.space.encode(pixels, generator)

    def decode(self, z: Tensor) -> Tensor:
        """Map samples of the network to images (B, C, H, W), nominally in [−1, 1]."""
        return evaluated_by(self, self.vae, self.space.decode)(z)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Move the networks; return the pipeline.

        Args:
            device: "cpu", "cuda", "cuda:1", "auto", …; None to leave the networks where they are.
            dtype: number type of the U-Net's matrix products: float32, or bfloat16 or float16 by
                autocast. Weights and sampler stay as they are.
        Raises:
            InvalidArgument: another dtype, or a device that this machine does not have.
        """
        allowed = (torch.float32, torch.bfloat16, torch.float16)
        if dtype is not None and dtype not in allowed:
            raise InvalidArgument(f"dtype must be one of {allowed}, got {dtype}")
        place = None if device is None else pick_device(device)
        for network in self.networks:
            network.to(place)
        self.dtype = dtype or self.dtype
        return self

    @property
    def has_null_class(self) -> bool:
        """Whether the network has a class embedding for "no class", which guidance needs."""
        return bool(self.class_names) and self.unet.num_labels > len(self.class_names)

    @property
    def is_guidable(self) -> bool:
        """Whether classifier-free guidance is possible, or the network takes a guidance scale."""
        return self.has_null_class or self.prompts is not None

    @property
    def is_guided_below_one(self) -> bool:
        """Whether guidance_scale < 1 interpolates towards the unconditional network.

        Stable Diffusion checkpoints follow diffusers, which guides only above 1.
        """
        is_diffusers = self.prompts is not None and not isinstance(self.prompts, WordPrompts)
        return self.takes_guidance_scale or not is_diffusers

    # --- folders ---------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, *, facts: card.Facts = card.NO_FACTS) -> None:
        """Write `model_index.json`, one folder per part in diffusers' format, and a model card.

        diffusers reads the whole folder of a pipeline with CLIP's tokenizer, and of an
        unconditional one in pixels with a scheduler of `folder.UNCONDITIONAL`. An existing pipeline
        folder is replaced as a whole, unless it holds files that do not belong to a pipeline. A
        `README.md` that minidiff did not write stays.

        Args:
            folder: folder of the pipeline.
            facts: data, options and scores for the model card, see `minidiff.pipeline.card`.
        Raises:
            CheckpointError: the folder cannot be written, or holds files that would be lost.
            InvalidArgument: there is a guidance network, which diffusers' pipelines do not have.
        """
        self.check_fused("save_pretrained")
        pipeline_folder.write(folder, self, facts)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> "Pipeline":
        """Read a folder that minidiff or diffusers wrote.

        Of diffusers' pipelines it reads Stable Diffusion 1.x, 2.x and XL, with ControlNets or
        without, Stable Diffusion 3.x, latent consistency models, and unconditional ones
        (DDPMPipeline, DDIMPipeline).

        Args:
            folder: folder with `model_index.json`.
            torch_dtype: number type of the weights: float32, float64, float16 or bfloat16.
            variant: "fp16" for the files `….fp16.safetensors`.
        Raises:
            CheckpointError: a file is missing, damaged or not understood; the error names it.
            InvalidArgument: another torch_dtype.
        """
        folder = user_path(folder)
        try:
            return cls(**pipeline_folder.read(folder, torch_dtype, variant)).filtered_as(folder)
        except InvalidArgument as error:
            if torch_dtype not in DTYPES:
                raise
            raise CheckpointError(f"{folder / pipeline_folder.INDEX}: {error}") from error
