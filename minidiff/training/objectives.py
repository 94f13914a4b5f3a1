"""Objectives by the names of their options, which `TrainConfig` and the command line use."""

import numpy as np

from minidiff.errors import InvalidArgument
from minidiff.names import SPREADS
from minidiff.objective import (
    MIN_SNR_GAMMA,
    MOMENTS,
    SIGMA_MAX,
    SIGMA_MIN,
    EDMObjective,
    FlowObjective,
    LearnedVariance,
    Objective,
    Spread,
    Weight,
)
from minidiff.schedule import Level
from minidiff.schedulers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    Scheduler,
)
from minidiff.training.config import check_objective


def make(
    prediction_type: str = "v_prediction",
    noise_levels: str | None = None,
    level_mean: float | None = None,
    level_std: float | None = None,
    loss_weight: str = "none",
    min_snr_gamma: float | None = None,
    sigma_data: float | None = None,
    beta_schedule: str | None = None,
    learn_variance: bool = False,
    num_train_timesteps: int = 1000,
    kind: type[Objective] | None = None,
    scheduler: Scheduler | None = None,
) -> Objective:
    """Return an objective with the scheduler that samples it.

    Args:
        prediction_type, loss_weight: rows of the tables in `minidiff.objective`.
        noise_levels: distribution of the levels; None for the usual one of the prediction type.
        level_mean, level_std: mean and standard deviation of ln(σ/α); None for the paper's.
        min_snr_gamma: γ; None for 5.
        sigma_data: standard deviation of the data; needed for "edm".
        beta_schedule: noise schedule of epsilon, sample and v_prediction; None for the cosine.
        learn_variance: the network learns the variance of DDPM's steps.
        num_train_timesteps: number of steps of the noise schedule.
        kind: custom class, see `class_of`.
        scheduler: scheduler whose targets and noise schedule are learnt; None for a fresh one.
    Raises:
        InvalidArgument: names the option.
    """
    check_objective(
        prediction_type, noise_levels, level_mean, level_std, loss_weight, min_snr_gamma,
        sigma_data, beta_schedule, learn_variance,
    )  # fmt: skip
    kind = class_of(prediction_type, learn_variance, kind)
    if sigma_data is None and "edm" in (prediction_type, loss_weight):
        raise InvalidArgument("sigma_data must be given for 'edm': the data's standard deviation")
    if scheduler is None:
        scheduler = _scheduler(
            prediction_type, beta_schedule, sigma_data, learn_variance, num_train_timesteps
        )
    return kind(
        scheduler,
        _spread(noise_levels or SPREADS[prediction_type][0], level_mean, level_std),
        _weight(loss_weight, min_snr_gamma or MIN_SNR_GAMMA, sigma_data),
    )


def class_of(
    prediction_type: str, learn_variance: bool, own: type[Objective] | None = None
) -> type[Objective]:
    """Return the class of an objective: a custom one, or the usual one of the prediction type.

    Args:
        prediction_type: prediction type of the network.
        learn_variance: the network learns the variance of DDPM's steps.
        own: custom class; a subclass of LearnedVariance, FlowObjective, EDMObjective or Objective,
            whichever is the usual one, with the same number of output channels.
    Raises:
        InvalidArgument: another class.
    """
    of_type = {"flow": FlowObjective, "edm": EDMObjective}
    usual = LearnedVariance if learn_variance else of_type.get(prediction_type, Objective)
    if own is None:
        return usual
    if not (isinstance(own, type) and issubclass(own, usual) and own.channels == usual.channels):
        raise InvalidArgument(
            f"objective must be a subclass of {usual.__name__} for prediction_type "
            f"{prediction_type!r}{' and learn_variance' if learn_variance else ''}, with channels "
            f"{usual.channels}; got {own!r}"
        )
    return own


def _scheduler(
    prediction_type: str,
    beta_schedule: str | None,
    sigma_data: float | None,
    learn_variance: bool,
    num_train_timesteps: int,
) -> Scheduler:
    """Return the scheduler that samples what is learnt, as in the papers."""
    common = {"num_train_timesteps": num_train_timesteps, "compat": "exact"}
    if prediction_type == "edm":
        return EDMDPMSolverMultistepScheduler(
            sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=sigma_data, **common
        )
    if prediction_type == "flow":
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, **common
        )
    common |= {
        "beta_schedule": beta_schedule or "squaredcos_cap_v2",
        "prediction_type": prediction_type,
    }
    if learn_variance:
        return DDPMScheduler(**common, variance_type="learned_range", timestep_spacing="trailing")
    return DPMSolverMultistepScheduler(**common)


def _spread(name: str, mean: float | None, std: float | None) -> Spread | None:
    """Return the distribution of the levels by its name; None is uniform."""
    if name == "uniform":
        return None
    usual_mean, usual_std = MOMENTS[name]
    return Spread(usual_mean if mean is None else mean, std or usual_std)


def _weight(name: str, gamma: float, sigma_data: float | None) -> Weight:
    """Return the weight of the network's error, without a division by the σ of a clean level.

    The network's error is (p − q·α/σ) times that of x̂0, so a weight w of x̂0's error is
    w·σ²/(p·σ − q·α)² of the network's.
    """

    def factor(level: Level, row: tuple) -> np.ndarray:
        p, q = row
        return (p * level.sigma - q * level.alpha) ** 2

    weights: dict[str, Weight] = {
        "none": lambda level, row: np.ones_like(level.sigma),
        "min_snr": lambda level, row: (
            np.minimum(level.alpha**2, gamma * level.sigma**2) / factor(level, row)
        ),
        "edm": lambda level, row: (
            (level.sigma**2 / sigma_data**2 + level.alpha**2) / factor(level, row)
        ),
    }
    return weights[name]
