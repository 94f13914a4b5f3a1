"""Samplers by the short names of the command line."""

from collections.abc import Mapping, Sequence
from typing import Any

from minidiff.errors import InvalidArgument, one_of
from minidiff.names import SAMPLERS, Sampler
from minidiff.schedulers import SCHEDULERS, FlowMatchEulerDiscreteScheduler, Scheduler
from minidiff.schedulers.edm import EDMSigmas

# The same methods on levels other than those of a β schedule.
_FLOW = {
    "euler": Sampler("Euler", "FlowMatchEulerDiscreteScheduler", {}),
    **{name: SAMPLERS[name] for name in ("dpm++", "dpm++3", "dpm++2s", "sde-dpm++", "unipc")},
}
_EDM_MULTISTEP = "EDMDPMSolverMultistepScheduler"
_EDM = {
    "euler": Sampler("Euler", "EDMEulerScheduler", {}),
    **{
        name: SAMPLERS[name]._replace(scheduler=_EDM_MULTISTEP)
        for name in ("dpm++", "dpm++3", "sde-dpm++")
    },
}


def sampler(name: str, like: Scheduler) -> Scheduler:
    """Return a sampler for the levels and the prediction type of another scheduler.

    Nothing is clipped, and timesteps are "trailing", so that all start at the noisiest level
    (Lin et al. 2023, arXiv:2305.08891, section 3.3).

    Args:
        name: key of `SAMPLERS`. LCM is not among them, as it needs a distilled network, nor is
            PNDM, whose first steps fail near zero SNR.
        like: other scheduler, usually the one that the model was trained with.
    Raises:
        InvalidArgument: another name, or a schedule or prediction type that the sampler lacks.
    """
    one_of("sampler", name, SAMPLERS)
    config = like.config
    if isinstance(like, EDMSigmas):
        return _of(_EDM, name, config, ("sigma_min", "sigma_max", "sigma_data", "rho"))
    if isinstance(like, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas"):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        if name == "euler":
            return _of(_FLOW, name, config, (), shift=shift)
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return _of(_FLOW, name, config, (), **flow, flow_shift=shift)
    cls = SCHEDULERS[SAMPLERS[name].scheduler]
    if config.get("rescale_betas_zero_snr") and not cls.has_option("rescale_betas_zero_snr"):
        raise InvalidArgument(
            f"sampler {name!r} has no rescale_betas_zero_snr, which this model was trained with"
        )
    learned = {}
    if config.get("variance_type") == "learned_range":
        if not cls.has_option("variance_type"):
            raise InvalidArgument(f"sampler {name!r} cannot take a network that learns variances")
        learned = {"variance_type": "learned_range"}
    return _of(SAMPLERS, name, config, _SCHEDULE, **learned, timestep_spacing="trailing")


_SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def _of(
    samplers: dict[str, Sampler],
    name: str,
    config: Mapping[str, Any],
    names: Sequence[str],
    **options: Any,
) -> Scheduler:
    """Return the sampler of that name, with these options of another's config."""
    if name not in samplers:
        raise InvalidArgument(
            f"sampler for this model's levels must be one of {', '.join(samplers)}; got {name!r}"
        )
    _, scheduler, own = samplers[name]
    names = (*names, "num_train_timesteps", "prediction_type", "compat")
    taken = {option: config[option] for option in names if option in config}
    return SCHEDULERS[scheduler].from_config(taken | own | options)
