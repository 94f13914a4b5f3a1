"""Everything that decides a run, except the data: one frozen dataclass.

Every field carries its own sentence, which is also its line in `minidiff train --help`; flags,
configuration files and presets speak of the same names. `LoopConfig` is what every training loop
needs, `TrainConfig` adds what makes a diffusion model, `VAEConfig` what makes an autoencoder.
"""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from minidiff.errors import (
    InvalidArgument,
    listed,
    one_of,
    real_number,
    true_or_false,
    whole_number,
)
from minidiff.guidance import interval_of
from minidiff.noise import MAX_SEED
from minidiff.objective import LOSS_WEIGHTS, NOISE_LEVELS, PREDICTION_TYPES, Objective
from minidiff.runtime.device import DTYPES
from minidiff.schedule import BETA_SCHEDULES, MAX_TRAIN_TIMESTEPS
from minidiff.schedulers import Scheduler
from minidiff.schedulers.core.names import SAMPLERS
from minidiff.training import objectives

MAX_BATCH = 65536  # a batch is held in memory; more than this is a typing error
OPTIMIZERS = ("adamw", "muon")
RECONSTRUCTIONS = ("l1", "l2")


def _option(
    default: Any,
    help: str,
    kind: type | None = None,
    flag: str | None = None,
    values: tuple[str, ...] | None = None,
) -> Any:
    """A field: its default, its sentence, the type of its values and its flag where not its name.

    The flag "" is none: the command line has its own. `values` names those of a flag with several.
    """
    about = {"help": help, "type": kind or type(default), "flag": flag, "values": values}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class LoopConfig:
    """Budget, batches, optimizer. Checked when built; raises InvalidArgument naming the field."""

    # The budget: exactly one of the two. It decides the whole learning-rate schedule.
    minutes: float | None = _option(None, "budget in minutes of wall-clock time", float)
    steps: int | None = _option(None, "budget in optimizer steps, instead of minutes", int)
    seed: int = _option(0, "of weights, order of the data, levels and noise", flag="")

    # Optimization
    batch_size: int = _option(32, "images a step")
    final_batch_size: int | None = _option(
        None, "images a step at the end: the batch doubles on the way, each size for an equal "
        "share of the budget; default: as at the start", int,
    )  # fmt: skip
    learning_rate: float = _option(2e-3, "of the optimizer, at its peak")
    warmup: float = _option(0.02, "share of the budget in which the learning rate rises from zero")
    weight_decay: float = _option(0.01, "of the optimizer")
    clip: float = _option(1.0, "norm that the gradient is cut to; 0 for none")
    ema_half_life: float = _option(
        0.05, "share of the run, counted back from its end, that holds half the weight of the "
        "averaged weights; 0 for the raw weights"
    )  # fmt: skip
    dtype: str = _option("float32", f"{', '.join(DTYPES)}, of the network's matrix work", flag="")
    skip_nonfinite: int = _option(
        0, "how many steps of the run may have a loss or gradient that is not finite: they are "
        "passed over and logged; one more stops the run"
    )  # fmt: skip

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise InvalidArgument("give a budget: either minutes or steps")
        if self.minutes is not None and real_number("minutes", self.minutes, 0) == 0:
            raise InvalidArgument("minutes must be more than 0, got 0")
        if self.steps is not None:
            whole_number("steps", self.steps, 1)
        whole_number("seed", self.seed, 0, MAX_SEED)
        whole_number("batch_size", self.batch_size, 1, MAX_BATCH)
        if self.final_batch_size is not None:
            whole_number("final_batch_size", self.final_batch_size, self.batch_size, MAX_BATCH)
        for name in ("learning_rate", "weight_decay", "clip"):
            real_number(name, getattr(self, name), 0)
        for name in ("warmup", "ema_half_life"):
            real_number(name, getattr(self, name), 0, 0.99)
        one_of("dtype", self.dtype, DTYPES)
        whole_number("skip_nonfinite", self.skip_nonfinite, 0)

    def batch_sizes(self) -> list[int]:
        """The sizes of the batch along the run, each for an equal share of the budget."""
        sizes, last = [self.batch_size], self.final_batch_size or self.batch_size
        while sizes[-1] < last:
            sizes.append(min(2 * sizes[-1], last))
        return sizes


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """A run. Checked when built; raises InvalidArgument naming the field."""

    optimizer: str = _option(
        "adamw", "adamw, or muon: more is learnt in a step, which takes longer; not with --shard"
    )
    accumulate: int = _option(1, "parts of a batch that are in memory one after the other")
    compile: bool = _option(
        False, "compile the network first, which takes minutes and a C++ compiler, on a GPU "
        "Triton too"
    )  # fmt: skip
    cuda_graph: bool = _option(
        False, "record the kernels of a step once and replay them: a GPU then need not wait for "
        "Python between any two; for one process, not with --compile"
    )  # fmt: skip

    # The objective, see `minidiff.objective`
    prediction_type: str = _option("v_prediction", ", ".join(PREDICTION_TYPES))
    noise_levels: str | None = _option(
        None, f"{', '.join(NOISE_LEVELS)}; default: log_normal for edm, logit_normal for flow, "
        "else uniform", str,
    )  # fmt: skip
    level_mean: float | None = _option(None, "of the (log, logit) normal distribution", float)
    level_std: float | None = _option(None, "of the (log, logit) normal distribution", float)
    loss_weight: str = _option("none", ", ".join(LOSS_WEIGHTS))
    min_snr_gamma: float | None = _option(None, "γ of loss_weight min_snr; default: 5", float)
    sigma_data: float | None = _option(
        None, "standard deviation of the data, for edm; default: measured", float
    )
    stable_target: int = _option(
        0, "training images a step whose mean, weighed by how well each explains a noisy image, is "
        "learnt in place of the one behind it; 0 for that one alone; see `stable_target`"
    )  # fmt: skip
    learn_variance: bool = _option(False, "learn the variance of DDPM's steps as well")
    beta_schedule: str | None = _option(
        None, f"{', '.join(BETA_SCHEDULES)}, for epsilon, sample and v; default: "
        "squaredcos_cap_v2", str,
    )  # fmt: skip
    num_train_timesteps: int = _option(1000, "steps of the noise schedule")
    shift: int = _option(0, "move every image at random, by up to so many pixels along each axis")
    flip: bool = _option(False, "mirror every second image; of photographs, never of digits")
    label_dropout: float = _option(
        0.1, "share of images whose class or caption is hidden, so that guidance is possible; with "
        "0 the network has no label for 'no class', and no guidance is stored"
    )  # fmt: skip

    # The network
    block: int = _option(2, "side of the pixel blocks that become channels; 1 for none")
    channels: tuple[int, ...] = _option((48, 96), "of each level; half the size at each level")
    layers: int = _option(1, "residual blocks a level")
    dropout: float = _option(0.0, "in the residual blocks")
    text_width: int = _option(64, "channels of a token, for data with captions")
    text_layers: int = _option(2, "of the text encoder, for data with captions")
    text_learning_rate: float = _option(
        0.1, "of the text encoder, as a share of learning_rate; at all of it the encoder changes "
        "sooner than the network learns what rare words mean"
    )  # fmt: skip

    # What is stored for sampling, and seen on the way
    guidance_scale: float = _option(1.5, "stored with the model", flag="guidance")
    guidance_interval: tuple[float, float] | None = _option(
        None, "σ/α between which guidance leads, stored with the model; default: everywhere", float,
        values=("LOW", "HIGH"),
    )  # fmt: skip
    autoguidance_scale: float = _option(
        1.0, "stored with the model, as is then a second network, which it leads away from: the "
        "averaged weights of an earlier time; 1 for none; see `guidance.autoguidance`",
        flag="autoguidance",
    )  # fmt: skip
    weaker_at: float = _option(
        0.0625, "share of the run after which that second network is set aside"
    )  # fmt: skip
    sampler: str | None = _option(
        None, f"stored with the model: {', '.join(SAMPLERS)}; default: dpm++, for learn_variance "
        "ddpm", str,
    )  # fmt: skip
    num_inference_steps: int = _option(10, "stored with the model", flag="sampling-steps")
    pictures: int = _option(4, "how many grids of samples to save along the way, the end included")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        whole_number("accumulate", self.accumulate, 1)
        true_or_false("compile", self.compile)
        self._check_cuda_graph()
        if self.accumulate > self.batch_size:
            raise InvalidArgument(
                f"accumulate must be at most batch_size, {self.batch_size}, got {self.accumulate}"
            )
        self._check_objective()
        self._check_network()
        real_number("guidance_scale", self.guidance_scale, -math.inf)
        interval_of(self.guidance_interval)
        real_number("autoguidance_scale", self.autoguidance_scale, -math.inf)
        real_number("weaker_at", self.weaker_at, 0, 0.99)
        if self.sampler is not None:
            one_of("sampler", self.sampler, SAMPLERS)
        whole_number("num_inference_steps", self.num_inference_steps, 1, self.num_train_timesteps)
        whole_number("pictures", self.pictures, 0)

    def _check_cuda_graph(self) -> None:
        if not true_or_false("cuda_graph", self.cuda_graph):
            return
        if self.compile:
            raise InvalidArgument("compile must be False with cuda_graph, got True")
        if self.accumulate != 1:
            raise InvalidArgument(f"accumulate must be 1 with cuda_graph, got {self.accumulate}")

    def _check_objective(self) -> None:
        whole_number("num_train_timesteps", self.num_train_timesteps, 1, MAX_TRAIN_TIMESTEPS)
        whole_number("shift", self.shift, 0)
        true_or_false("flip", self.flip)
        true_or_false("learn_variance", self.learn_variance)
        whole_number("stable_target", self.stable_target, 0, MAX_BATCH)
        if self.stable_target and self.learn_variance:
            raise InvalidArgument(
                "stable_target must be 0 for learn_variance, whose bound asks for the image "
                f"itself; got {self.stable_target}"
            )
        real_number("label_dropout", self.label_dropout, 0, 0.99)
        objectives.check(**{name: getattr(self, name) for name in _OBJECTIVE})
        if self.beta_schedule is not None:
            one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)

    def _check_network(self) -> None:
        for name in ("block", "layers", "text_width", "text_layers"):
            whole_number(name, getattr(self, name), 1)
        _check_widths("channels", self.channels)
        real_number("dropout", self.dropout, 0, 0.99)
        real_number("text_learning_rate", self.text_learning_rate, 0, 1)

    @property
    def measures_data(self) -> bool:
        """Whether the objective needs the data's standard deviation and was not told it."""
        return self.sigma_data is None and "edm" in (self.prediction_type, self.loss_weight)

    def objective(
        self, kind: type[Objective] | None = None, scheduler: Scheduler | None = None
    ) -> Objective:
        """Return the objective, with its scheduler.

        Args:
            kind: custom class, see `minidiff.training.objectives.class_of`.
            scheduler: scheduler of a pipeline that is trained on; None for a fresh one.
        Raises:
            InvalidArgument: for an unmeasured σ_data, or a class that does not fit.
        """
        options = {name: getattr(self, name) for name in _OBJECTIVE}
        steps = self.num_train_timesteps
        return objectives.make(**options, num_train_timesteps=steps, kind=kind, scheduler=scheduler)


@dataclass(frozen=True)
class VAEConfig(LoopConfig):
    """A run of train-vae. Checked when built; raises InvalidArgument naming the field."""

    # The loss, see `minidiff.training.autoencoder`
    reconstruction: str = _option("l1", f"what an error costs: {', '.join(RECONSTRUCTIONS)}")
    kl_weight: float = _option(
        1e-2, "of the latents' divergence from the standard normal distribution, in nats, beside "
        "the error summed over the pixels"
    )  # fmt: skip
    adversarial_weight: float = _option(
        0.1, "of a discriminator's verdict, beside the error; 1 makes both pull equally hard on "
        "the decoder's last layer; 0 for no discriminator"
    )  # fmt: skip
    adversarial_start: float = _option(
        0.5, "share of the budget after which the discriminator judges"
    )
    discriminator_channels: tuple[int, ...] = _option(
        (32, 64), "of each of its levels; half the size at each level"
    )

    # The network
    latent_channels: int = _option(4, "of the latents")
    channels: tuple[int, ...] = _option(
        (16, 32, 64), "of each level; all but the last halve the size"
    )
    layers: int = _option(1, "residual blocks a level; the decoder has one more")
    attention: bool = _option(False, "attention in the middle, at the smallest size")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("reconstruction", self.reconstruction, RECONSTRUCTIONS)
        for name in ("kl_weight", "adversarial_weight"):
            real_number(name, getattr(self, name), 0)
        real_number("adversarial_start", self.adversarial_start, 0, 1)
        true_or_false("attention", self.attention)
        whole_number("latent_channels", self.latent_channels, 1)
        whole_number("layers", self.layers, 1)
        for name in ("channels", "discriminator_channels"):
            _check_widths(name, getattr(self, name))


def _check_widths(name: str, widths: object) -> None:
    if not listed(name, widths):
        raise InvalidArgument(f"{name} must list at least one level, got none")
    for width in widths:
        whole_number(name, width, 1)


_OBJECTIVE = (
    "prediction_type", "noise_levels", "level_mean", "level_std", "loss_weight", "min_snr_gamma",
    "sigma_data", "beta_schedule", "learn_variance",
)  # fmt: skip
Kind = TypeVar("Kind", bound=LoopConfig)


def _options(kind: type[LoopConfig]) -> dict[str, Field]:
    """The fields of a config's class by name, in the order in which help shows them."""
    return {option.name: option for option in fields(kind)}


OPTIONS, VAE_OPTIONS = _options(TrainConfig), _options(VAEConfig)


def merged(*layers: Mapping[str, Any], kind: type[Kind] = TrainConfig) -> Kind:
    """The config of several layers of options, of which the later ones win.

    A budget in minutes in one layer takes the place of one in steps in the layers before, and the
    other way round.

    Args:
        kind: the config's class.
    Raises:
        InvalidArgument: a name that is no option, or as the class.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        if {"minutes", "steps"} & {name for name, value in layer.items() if value is not None}:
            result.pop("minutes", None)
            result.pop("steps", None)
        result |= layer
    for name in result:
        one_of("option", name, _options(kind))
    for name in ("channels", "guidance_interval", "discriminator_channels"):
        if isinstance(result.get(name), list):
            result[name] = tuple(result[name])  # JSON and TOML have lists
    return kind(**result)


def options_of(config: TrainConfig) -> dict[str, Any]:
    """The options in which a config departs from the defaults."""
    return {
        name: getattr(config, name)
        for name, option in OPTIONS.items()
        if getattr(config, name) != option.default
    }
