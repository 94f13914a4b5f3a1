"""Samplers by the short names of the command line."""

from typing import Any, NamedTuple

from minidiff.errors import InvalidArgument, one_of
from minidiff.schedulers import SCHEDULERS, Scheduler


class Sampler(NamedTuple):
    """What a short name stands for."""

    title: str
    scheduler: str
    options: dict[str, Any]


_MULTISTEP = "DPMSolverMultistepScheduler"

SAMPLERS = {
    "ddpm": Sampler("DDPM", "DDPMScheduler", {"clip_sample": False}),
    "ddim": Sampler("DDIM", "DDIMScheduler", {"clip_sample": False}),
    "euler": Sampler("Euler", "EulerDiscreteScheduler", {}),
    "euler-a": Sampler("Euler ancestral", "EulerAncestralDiscreteScheduler", {}),
    # Heun's trapezoid cannot span the first even step of a cosine schedule, from σ of 20,000 to 6.
    "heun": Sampler("Heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "dpm++": Sampler("DPM-Solver++ (2M)", _MULTISTEP, {}),
    "dpm++3": Sampler("DPM-Solver++ (3M)", _MULTISTEP, {"solver_order": 3}),
    "dpm++2s": Sampler("DPM-Solver++ (2S)", "DPMSolverSinglestepScheduler", {}),
    "sde-dpm++": Sampler(
        "SDE-DPM-Solver++ (2M)", _MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}
    ),
    "unipc": Sampler("UniPC (2)", "UniPCMultistepScheduler", {}),
}


def sampler(name: str, like: Scheduler) -> Scheduler:
    """A sampler for the noise schedule and prediction type of another scheduler.

    Nothing is clipped, and timesteps are "trailing", so that all start at the noisiest level
    (Lin et al. 2023, arXiv:2305.08891, section 3.3).

    Args:
        name: a key of `SAMPLERS`. LCM is not among them, as it wants a distilled
            network, nor PNDM, whose first steps fail near zero SNR.
        like: usually the scheduler that the model was trained with.
    Raises:
        InvalidArgument: another name, or a schedule or prediction type that the sampler lacks.
    """
    one_of("sampler", name, SAMPLERS)
    cls, options = SCHEDULERS[SAMPLERS[name].scheduler], SAMPLERS[name].options
    schedule = {
        option: like.config[option]
        for option in (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
            "prediction_type",
            "compat",
        )
        if option in like.config
    }
    if like.config.get("rescale_betas_zero_snr") and not cls.has_option("rescale_betas_zero_snr"):
        raise InvalidArgument(
            f"sampler {name!r} has no rescale_betas_zero_snr, which this model was trained with"
        )
    return cls.from_config(schedule | options, timestep_spacing="trailing")
