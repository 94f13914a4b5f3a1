"""Everything that decides a run, except the data: one frozen dataclass.

Every field carries its help text in `minidiff train --help` and its check. Flags, configuration
files and presets use the same names. `LoopConfig` is what every training loop needs, `TrainConfig`
adds what makes a diffusion model, `VAEConfig` what makes an autoencoder.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from minidiff import names
from minidiff.errors import InvalidArgument, one_of, real_number, whole_number
from minidiff.runtime.checks import (
    Check,
    check_all,
    check_fields,
    choice,
    each,
    flag,
    interval_of,
    option,
    optional,
    positive,
    real,
    whole,
)

if TYPE_CHECKING:
    from minidiff.objective import Objective
    from minidiff.schedulers import Scheduler

MAX_STEPS = 10**12  # more would take longer than any machine lasts
MAX_BATCH = 65536  # a batch is held in memory; more than this is a typing error
OPTIMIZERS = ("adamw", "muon")
RECONSTRUCTIONS = ("l1", "l2")
FRACTION = real(0, 0.99)  # of a run, or of images
WIDTHS = each(whole(1), least=1)
COUNT = whole(1)  # from 1
NUMBER = whole(0)  # from 0


def _scale(name: str, value: float) -> float:
    """Allow numbers in (0, 10000]."""
    return positive(name, real_number(name, value, 0, 1e4))


CHECKS: dict[str, Check] = {
    "prediction_type": choice(*names.PREDICTION_TYPES),
    "noise_levels": optional(choice(*names.NOISE_LEVELS)),
    "level_mean": optional(real(-10, 10)),
    "level_std": optional(_scale),
    "loss_weight": choice(*names.LOSS_WEIGHTS),
    "min_snr_gamma": optional(_scale),
    "sigma_data": optional(_scale),
    "beta_schedule": optional(choice(*names.BETA_SCHEDULES)),
    "learn_variance": flag,
}


def check_objective(
    prediction_type: str,
    noise_levels: str | None,
    level_mean: float | None,
    level_std: float | None,
    loss_weight: str,
    min_snr_gamma: float | None,
    sigma_data: float | None,
    beta_schedule: str | None,
    learn_variance: bool,
) -> None:
    """Refuse options that are not allowed, alone or together. Raises InvalidArgument.

    Args:
        prediction_type, noise_levels, level_mean, level_std, loss_weight: see `objectives.make`.
        min_snr_gamma, sigma_data, beta_schedule, learn_variance: see `objectives.make`.
    """
    options = locals()
    check_all(options, CHECKS)
    if noise_levels is not None and noise_levels not in (allowed := names.SPREADS[prediction_type]):
        raise InvalidArgument(
            f"noise_levels of prediction_type {prediction_type!r} must be one of "
            f"{', '.join(allowed)}; got {noise_levels!r}"
        )
    spread = noise_levels or names.SPREADS[prediction_type][0]
    preserving = prediction_type in names.PRESERVING
    measured = prediction_type == "edm" or loss_weight == "edm"
    for name, value, used, where in (
        ("level_mean", level_mean, spread != "uniform", "noise_levels other than 'uniform'"),
        ("level_std", level_std, spread != "uniform", "noise_levels other than 'uniform'"),
        ("min_snr_gamma", min_snr_gamma, loss_weight == "min_snr", "loss_weight 'min_snr'"),
        ("sigma_data", sigma_data, measured, "prediction_type or loss_weight 'edm'"),
        ("beta_schedule", beta_schedule, preserving, "epsilon, sample and v"),
    ):
        if value is not None and not used:
            raise InvalidArgument(f"{name} is for {where}; leave it out, got {value!r}")
    if learn_variance and (not preserving or spread != "uniform"):
        raise InvalidArgument(
            "learn_variance is for epsilon, sample and v_prediction with noise_levels 'uniform': "
            f"got prediction_type {prediction_type!r} and noise_levels {spread!r}"
        )
    if learn_variance and loss_weight != "none":
        raise InvalidArgument(
            f"learn_variance has its own weights: loss_weight must be 'none', got {loss_weight!r}"
        )


def declared(
    group: str,
    default: Any,
    check: Check,
    help: str,
    kind: type | None = None,
    flag: str | None = None,
    values: tuple[str, ...] | None = None,
) -> Any:
    """Return a field with its check and what the command line needs.

    Args:
        group: group of flags in `--help`.
        default: default value.
        check: what the value may be.
        help: noun phrase without the default, unless that is computed.
        kind: type of the value; by default that of the default.
        flag: name of the flag where it is not that of the field; "" for none.
        values: metavars of a flag with several values.
    """
    about = {"group": group, "type": kind or type(default), "flag": flag, "values": values}
    return option(default, help, check, **about)


@dataclass(frozen=True)
class LoopConfig:
    """Budget, batches, optimizer. Checked when built; raises InvalidArgument naming the field."""

    # Exactly one of the two, which decides the whole learning-rate schedule.
    minutes: float | None = declared(
        "budget", None, optional(positive), "minutes of wall-clock time", float
    )
    steps: int | None = declared(
        "budget", None, optional(whole(1, MAX_STEPS)), "optimizer steps, instead of minutes", int
    )
    seed: int = declared(
        "run", 0, whole(0, names.MAX_SEED), "seed of weights, order of the data, levels and noise",
        flag="",
    )  # fmt: skip

    batch_size: int = declared("optimisation", 32, whole(1, MAX_BATCH), "images per step")
    final_batch_size: int | None = declared(
        "optimisation", None, optional(whole(1, MAX_BATCH)), "images per step at the end; the "
        "batch doubles on the way, each size for an equal part of the budget (default: batch_size)",
        int,
    )  # fmt: skip
    learning_rate: float = declared(
        "optimisation", 2e-3, real(0), "peak learning rate of the optimizer"
    )
    warmup: float = declared(
        "optimisation", 0.02, FRACTION, "fraction of the budget in which the learning rate rises "
        "from zero",
    )  # fmt: skip
    weight_decay: float = declared(
        "optimisation", 0.01, real(0), "decoupled weight decay of the optimizer"
    )
    clip: float = declared(
        "optimisation", 1.0, real(0), "norm above which the gradient is clipped; 0 for no clipping"
    )
    ema_half_life: float = declared(
        "optimisation", 0.05, FRACTION, "fraction of the run, counted back from its end, that has "
        "half the weight in the averaged weights; 0 for the raw weights",
    )  # fmt: skip
    dtype: str = declared(
        "run", "float32", choice(*names.DTYPE_NAMES), "number type of the network's matrix work",
        flag="",
    )  # fmt: skip
    skip_nonfinite: int = declared(
        "optimisation", 0, NUMBER, "steps of the run that may be skipped and logged because loss "
        "or gradient is not finite; one more stops the run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise InvalidArgument("give a budget: either minutes or steps")
        check_fields(self)
        if self.final_batch_size is not None:
            whole_number("final_batch_size", self.final_batch_size, self.batch_size, MAX_BATCH)

    def batch_sizes(self) -> list[int]:
        """Return the batch sizes along the run, each for an equal part of the budget."""
        sizes, last = [self.batch_size], self.final_batch_size or self.batch_size
        while sizes[-1] < last:
            sizes.append(min(2 * sizes[-1], last))
        return sizes


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """A run. Checked when built; raises InvalidArgument naming the field."""

    optimizer: str = declared(
        "optimisation", "adamw", choice(*OPTIMIZERS), "optimizer: adamw, or muon, which learns "
        "more in a step that takes longer; muon does not work with --shard",
    )  # fmt: skip
    accumulate: int = declared(
        "optimisation", 1, COUNT, "number of parts that a batch is processed in, to save memory"
    )
    compile: bool = declared(
        "optimisation", False, flag, "compile the network, which takes minutes and needs a "
        "C++ compiler, on a GPU also Triton",
    )  # fmt: skip
    cuda_graph: bool = declared(
        "optimisation", False, flag, "one CUDA graph per step, so that a GPU need not wait for "
        "Python between kernels; for one process, not with --compile",
    )  # fmt: skip

    # The objective, see `minidiff.objective`
    prediction_type: str = declared(
        "objective", "v_prediction", CHECKS["prediction_type"],
        f"prediction type of the network: {', '.join(names.PREDICTION_TYPES)}",
    )  # fmt: skip
    noise_levels: str | None = declared(
        "objective", None, CHECKS["noise_levels"], f"distribution of the noise levels: "
        f"{', '.join(names.NOISE_LEVELS)} (default: log_normal for edm, logit_normal for flow, "
        "else uniform)", str,
    )  # fmt: skip
    level_mean: float | None = declared(
        "objective", None, CHECKS["level_mean"], "mean of ln(σ/α) for normal noise levels "
        "(default: the paper's)", float,
    )  # fmt: skip
    level_std: float | None = declared(
        "objective", None, CHECKS["level_std"], "standard deviation of ln(σ/α) for normal noise "
        "levels (default: the paper's)", float,
    )  # fmt: skip
    loss_weight: str = declared(
        "objective", "none", CHECKS["loss_weight"],
        f"weight of the loss by noise level: {', '.join(names.LOSS_WEIGHTS)}",
    )  # fmt: skip
    min_snr_gamma: float | None = declared(
        "objective", None, CHECKS["min_snr_gamma"], "γ of loss_weight min_snr (default: 5)", float
    )
    sigma_data: float | None = declared(
        "objective", None, CHECKS["sigma_data"], "standard deviation of the data, for edm "
        "(default: measured)", float,
    )  # fmt: skip
    stable_target: int = declared(
        "objective", 0, whole(0, MAX_BATCH), "number of training images per step whose mean, "
        "weighted by how well each explains a noisy image, is the target for it; 0 for none",
    )  # fmt: skip
    learn_variance: bool = declared(
        "objective", False, CHECKS["learn_variance"], "learn the variance of DDPM's steps"
    )
    beta_schedule: str | None = declared(
        "objective", None, CHECKS["beta_schedule"], "noise schedule of epsilon, sample and "
        f"v_prediction: {', '.join(names.BETA_SCHEDULES)} (default: squaredcos_cap_v2)", str,
    )  # fmt: skip
    num_train_timesteps: int = declared(
        "objective", 1000, whole(1, names.MAX_TRAIN_TIMESTEPS), "steps of the noise schedule"
    )
    shift: int = declared(
        "data", 0, NUMBER, "largest random shift of every image along each axis, in pixels"
    )
    flip: bool = declared(
        "data", False, flag, "flip images left to right at random; for photographs, not for digits"
    )
    label_dropout: float = declared(
        "objective", 0.1, FRACTION, "fraction of images whose class or caption is hidden, which "
        "guidance needs; with 0 the network has no label for 'no class' and no guidance is stored",
    )  # fmt: skip

    # The network
    block: int = declared(
        "network", 2, COUNT, "side of the pixel blocks that become channels; 1 for none"
    )
    channels: tuple[int, ...] = declared(
        "network", (48, 96), WIDTHS, "channels of each level; every level halves the size; for "
        "points, the last is the width of the network",
    )  # fmt: skip
    layers: int = declared("network", 1, COUNT, "residual blocks per level")
    dropout: float = declared("network", 0.0, FRACTION, "dropout in the residual blocks")
    text_width: int = declared("network", 64, COUNT, "channels of a token, for data with captions")
    text_layers: int = declared(
        "network", 2, COUNT, "layers of the text encoder, for data with captions"
    )
    text_learning_rate: float = declared(
        "optimisation", 0.1, real(0, 1), "learning rate of the text encoder as a fraction of "
        "learning_rate; at 1 the encoder changes faster than the network learns rare words",
    )  # fmt: skip

    # Settings of sampling that are stored with the model, and pictures along the way
    guidance_scale: float = declared(
        "sampling", 1.5, real(), "guidance scale stored with the model", flag="guidance"
    )
    guide: str = declared(
        "sampling", "cfg", choice(*names.GUIDES), "guidance rule stored with the model"
    )
    guidance_interval: tuple[float, float] | None = declared(
        "sampling", None, lambda _, value: interval_of(value), "range of σ/α with guidance, stored "
        "with the model (default: everywhere)", float, values=("LOW", "HIGH"),
    )  # fmt: skip
    autoguidance_scale: float = declared(
        "sampling", 1.0, real(), "scale of autoguidance stored with the model, and with it a "
        "guidance network, the averaged weights of an earlier time; 1 for none",
        flag="autoguidance",
    )  # fmt: skip
    weaker_at: float = declared(
        "sampling", 0.0625, FRACTION, "fraction of the run after which the guidance network of "
        "autoguidance is kept",
    )  # fmt: skip
    sampler: str | None = declared(
        "sampling", None, optional(choice(*names.SAMPLERS)), "sampler stored with the model: "
        f"{', '.join(names.SAMPLERS)} (default: dpm++, for learn_variance ddpm)", str,
    )  # fmt: skip
    num_inference_steps: int = declared(
        "sampling", 10, COUNT, "number of sampling steps stored with the model",
        flag="sampling-steps",
    )  # fmt: skip
    pictures: int = declared(
        "run", 4, NUMBER, "number of grids of samples saved in the course of the run, with the last"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate > self.batch_size:
            raise InvalidArgument(
                f"accumulate must be at most batch_size, {self.batch_size}, got {self.accumulate}"
            )
        if self.cuda_graph and self.compile:
            raise InvalidArgument("compile must be False with cuda_graph, got True")
        if self.cuda_graph and self.accumulate != 1:
            raise InvalidArgument(f"accumulate must be 1 with cuda_graph, got {self.accumulate}")
        if self.stable_target and self.learn_variance:
            raise InvalidArgument(
                "stable_target must be 0 for learn_variance, whose bound needs the image itself; "
                f"got {self.stable_target}"
            )
        check_objective(**{name: getattr(self, name) for name in CHECKS})
        whole_number("num_inference_steps", self.num_inference_steps, 1, self.num_train_timesteps)

    @property
    def measures_data(self) -> bool:
        """True where the objective needs the data's standard deviation and it is not given."""
        return self.sigma_data is None and "edm" in (self.prediction_type, self.loss_weight)

    def objective(
        self, kind: "type[Objective] | None" = None, scheduler: "Scheduler | None" = None
    ) -> "Objective":
        """Return the objective, with its scheduler.

        Args:
            kind: custom class, see `minidiff.training.objectives.class_of`.
            scheduler: scheduler of a pipeline that is trained on; None for a fresh one.
        Raises:
            InvalidArgument: for an unmeasured σ_data, or a class that does not fit.
        """
        from minidiff.training import objectives  # here, because it imports torch

        options = {name: getattr(self, name) for name in CHECKS}
        steps = self.num_train_timesteps
        return objectives.make(**options, num_train_timesteps=steps, kind=kind, scheduler=scheduler)


@dataclass(frozen=True)
class VAEConfig(LoopConfig):
    """A run of train-vae. Checked when built; raises InvalidArgument naming the field."""

    # The loss, see `minidiff.training.autoencoder`
    reconstruction: str = declared(
        "objective", "l1", choice(*RECONSTRUCTIONS),
        f"reconstruction error: {', '.join(RECONSTRUCTIONS)}",
    )  # fmt: skip
    kl_weight: float = declared(
        "objective", 1e-2, real(0), "weight of the latents' divergence from the standard normal "
        "distribution, in nats, relative to the error summed over the pixels",
    )  # fmt: skip
    adversarial_weight: float = declared(
        "objective", 0.1, real(0), "weight of the discriminator relative to the error; at 1 both "
        "have the same gradient at the decoder's last layer; 0 for no discriminator",
    )  # fmt: skip
    adversarial_start: float = declared(
        "objective", 0.5, real(0, 1), "fraction of the budget after which the discriminator is used"
    )
    discriminator_channels: tuple[int, ...] = declared(
        "network", (32, 64), WIDTHS, "channels of each level of the discriminator; every level "
        "halves the size",
    )  # fmt: skip

    # The network
    latent_channels: int = declared("network", 4, COUNT, "channels of the latents")
    channels: tuple[int, ...] = declared(
        "network", (16, 32, 64), WIDTHS, "channels of each level; all but the last halve the size"
    )
    layers: int = declared(
        "network", 1, COUNT, "residual blocks per level; the decoder has one more"
    )
    attention: bool = declared(
        "network", False, flag, "attention in the middle, at the smallest size"
    )


Kind = TypeVar("Kind", bound=LoopConfig)


def fields_of(kind: type[LoopConfig]) -> dict[str, Field]:
    """Return the fields of a config's class by name, in the order of `--help`."""
    return {option.name: option for option in fields(kind)}


OPTIONS, VAE_OPTIONS = fields_of(TrainConfig), fields_of(VAEConfig)


def merged(*layers: Mapping[str, Any], kind: type[Kind] = TrainConfig) -> Kind:
    """Return the config of several layers of options; later layers win.

    A budget in minutes replaces one in steps of an earlier layer, and the other way round.

    Args:
        layers: options by name.
        kind: class of the config.
    Raises:
        InvalidArgument: an unknown option, or as the class.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        if {"minutes", "steps"} & {name for name, value in layer.items() if value is not None}:
            result.pop("minutes", None)
            result.pop("steps", None)
        result |= layer
    for name in result:
        one_of("option", name, fields_of(kind))
    for name in ("channels", "guidance_interval", "discriminator_channels", "intervals"):
        if isinstance(result.get(name), list):
            result[name] = tuple(result[name])  # JSON and TOML have lists
    return kind(**result)


def options_of(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a config that differ from the defaults of a training."""
    return {
        name: getattr(config, name)
        for name, option in fields_of(type(config)).items()
        if getattr(config, name) != OPTIONS.get(name, option).default
    }
