"""Methods of a pipeline that start what lies on higher floors: engines and adapters.

They import when they are called, so that a pipeline needs neither.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.errors import InvalidArgument

if TYPE_CHECKING:
    from minidiff.adapters.stack import Stack
    from minidiff.nn import ControlNet
    from minidiff.pipeline.pipeline import Pipeline


FILTER = "concept_filter.safetensors"  # in the folder of a model that declares one


class Flagged(NamedTuple):
    """What a finisher that looks for concepts returns.

    Attributes:
        images: images (B, C, H, W) in [−1, 1], those that were found changed.
        flagged: names of what was found in each image.
    """

    images: Tensor
    flagged: list[tuple[str, ...]]


class LateMethods:
    """The base of `Pipeline` that has these methods."""

    stack: "Stack | None" = None  # the adapters, and the networks without them

    @property
    def networks(self) -> list[nn.Module]:
        """All networks that move with the pipeline."""
        encoders = () if self.prompts is None else self.prompts.encoders
        mine = (*self.unets, *self.controlnets, self.vae, *encoders)
        mine = [part for part in mine if part is not None]
        return mine + (self.stack.networks if self.stack else [])

    # --- adapters --------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, float]:
        """Scales of the loaded adapters by name; change them with `set_adapter`."""
        return {n: scale for n, (_, scale) in self.stack.adapters.items()} if self.stack else {}

    def check_fused(self, wish: str) -> None:
        """Refuse what needs one set of weights. Raises InvalidArgument, with the wish's name."""
        if self.adapters:
            raise InvalidArgument(
                f"{wish} needs one set of weights, but adapters are loaded: "
                f"{', '.join(self.adapters)}; call fuse() or remove_adapter() first"
            )

    def load_adapter(
        self, path: str | Path, scale: float = 1.0, name: str | None = None
    ) -> "Pipeline":
        """Change the networks by an adapter: LoRA, new words or other differences of weights.

        Several adapters add up, in any order. At scale 0 an adapter has no effect at all.

        Args:
            path: a run of `minidiff train --learn`, a folder that such a run or diffusers wrote
                (`pytorch_lora_weights.safetensors`, `learned_embeds.safetensors`), or one such
                file. Kohya's names and those of old attention processors are read.
            scale: factor on the differences.
            name: name in `adapters`; by default that of the folder or file.
        Returns:
            The pipeline itself.
        Raises:
            CheckpointError: the files are missing, damaged, pickles, or for another network; names
                the layer and both shapes.
            InvalidArgument: a name that is taken, a word that the model knows, a scale that is not
                finite, or the networks are evaluated by an engine.
        """
        from minidiff.adapters.files import load

        return load(self, path, scale, name)

    def set_adapter(self, name: str, scale: float) -> "Pipeline":
        """Set the scale of an adapter; return the pipeline. Raises InvalidArgument."""
        from minidiff.adapters.stack import set_scale

        return set_scale(self, name, scale)

    def remove_adapter(self, name: str) -> "Pipeline":
        """Remove an adapter; return the pipeline.

        Without adapters the networks are those of the base, bit for bit.

        Raises:
            InvalidArgument: no adapter has that name.
        """
        from minidiff.adapters.stack import remove

        return remove(self, name)

    def save_adapter(self, folder: str | Path, name: str | None = None) -> None:
        """Write an adapter in diffusers' format, where it has one.

        Low-rank differences are `pytorch_lora_weights.safetensors`, new words
        `learned_embeds.safetensors`. Other differences are `weight_changes.safetensors`, which only
        minidiff reads.

        Args:
            folder: new or empty folder, or one that holds an adapter.
            name: name of the adapter; may be left out where there is only one.
        Raises:
            InvalidArgument: no adapter has that name.
            CheckpointError: the folder cannot be written, or holds files that would be lost.
        """
        from minidiff.adapters.files import save

        save(self, folder, name)

    def fuse(self) -> "Pipeline":
        """Make the adapters a part of the networks; return the pipeline.

        It is then saved, trained and exported as any other. Raises InvalidArgument without
        adapters.
        """
        from minidiff.adapters.stack import fuse

        return fuse(self)

    def unfuse(self) -> "Pipeline":
        """Undo the last `fuse`; return the pipeline, whose base is the same bit for bit.

        Raises:
            InvalidArgument: nothing is fused, or adapters were loaded since.
        """
        from minidiff.adapters.stack import unfuse

        return unfuse(self)

    # --- filters ---------------------------------------------------------------------------

    def filtered_as(self, folder: Path) -> "Pipeline":
        """Append the concept filter that a model's folder declares; return the pipeline.

        Clear `finishers` to switch it off. Raises CheckpointError if the file is damaged.
        """
        if (folder / FILTER).is_file():
            from minidiff.adapters.concept_filter import ConceptFilter

            self.finishers.append(ConceptFilter.load(folder / FILTER))
        return self

    def finished(self, images: Tensor) -> Flagged | tuple[Tensor, None]:
        """Return images (B, C, H, W) after all finishers, and what filters flagged, or None."""
        flagged = None
        for finish in self.finishers:
            images = finish(images)
            if isinstance(images, Flagged):
                before = flagged or [()] * len(images.flagged)
                flagged = [old + new for old, new in zip(before, images.flagged, strict=True)]
                images = images.images
        return images, flagged

    # --- control ---------------------------------------------------------------------------

    controlnets: "tuple[ControlNet, ...]" = ()
    example: "Mapping[str, Any]" = MappingProxyType({})  # of a call for pictures of a training

    def with_controls(self, nets: "Sequence[ControlNet]") -> "Pipeline":
        """Return the same pipeline with ControlNets, whose images its calls then take.

            edges = pipe.with_controls([ControlNet.from_pretrained("edges")])
            edges("a red 7", control_image=drawing)

        Args:
            nets: ControlNets for its network; none to take them away.
        Raises:
            InvalidArgument: a net does not fit the network.
        """
        other = copy.copy(self)
        if nets:
            from minidiff.adapters.control import fitting

            nets = fitting(nets, self.unet, self.space)
        other.controlnets = tuple(nets)
        return other

    def watching(
        self, call: SimpleNamespace, n: int, size: tuple[int, ...], first_step: int
    ) -> Callable:
        """Return what of a call is around the network, see `minidiff.adapters.control.watching`.

        Args:
            call: arguments of the call.
            n: number of images.
            size: their height and width in pixels.
            first_step: entry of the scheduler's grid where sampling begins.
        """
        from minidiff.adapters.control import watching

        given = (call.control_image, call.control_scale, call.control_interval, call.guess_mode)
        return watching(self, *given, n=n, size=size, first_step=first_step)

    # --- engines ---------------------------------------------------------------------------

    def optimize(
        self, engine: str = "auto", dtype: str = "auto", cache: bool = True, memory: str = "normal"
    ) -> "Pipeline":
        """Evaluate the networks by an inference engine, and print its name; return the pipeline.

        Images agree with torch's within a grey level in float32. Where derivatives are wanted, or a
        network cannot be exported, torch evaluates it. Weights that change afterwards are refused.

        Args:
            engine: "auto", "torch", "openvino", "onnxruntime", "compile" or "cuda-graph".
            dtype: number type of matrix products: "float32", "bfloat16", or "auto", which is
                bfloat16 where the hardware is faster with it.
            cache: keep exported graphs in the user's cache folder, see `minidiff cache`.
            memory: "low" evaluates layers one image at a time, and feed-forward layers in parts:
                less memory, mostly less speed. It needs torch, which "auto" then is.
        Raises:
            InvalidArgument: an unknown engine, dtype or memory, or an engine that is not installed,
                not for this device, or not for low memory.
            MinidiffError: the cache cannot be written; or a network cannot be exported, unless
                engine is "auto".
        """
        from minidiff.engines.optimize import optimize

        return optimize(self, engine, dtype, cache, memory)

    def offload(self, device: str | torch.device = "cuda") -> "Pipeline":
        """Keep all weights on the CPU, and move them to a device to use them; return the pipeline.

        Text encoders are on the device as a whole while they are evaluated, the parts of the VAE in
        turn, and the U-Net one group of layers at a time. Sampling runs where x is, on the CPU.
        Only one call at a time may use the pipeline then. For less memory, call
        `optimize(memory="low")` afterwards.

        Args:
            device: "cuda", "cuda:1", …
        Raises:
            InvalidArgument: a device that this machine does not have, or `optimize` was called.
        """
        from minidiff.engines.memory import offload

        return offload(self, device)

    def export(self, folder: str | Path, format: str = "onnx") -> dict[str, Any]:
        """Write the pipeline with its networks as graphs, which other programs can run.

        The folder holds a graph for each network, and `export.json`, which describes their inputs.
        Every graph is compared with torch; the relative error is printed and must be below 1e-4.

        Args:
            folder: new or empty folder.
            format: "onnx", "openvino" or "pt2".
        Returns:
            The content of export.json.
        Raises:
            InvalidArgument: an unknown format, or one whose extra is not installed.
            MinidiffError: a network cannot be exported, or the folder cannot be written.
        """
        from minidiff.engines.exported import export

        return export(self, folder, format)
