"""Samplers by the short names of the command line."""

from minidiff.errors import one_of
from minidiff.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    Scheduler,
)

SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "dpm++": "DPM-Solver++ (2M)",
    "sde-dpm++": "SDE-DPM-Solver++ (2M)",
}


def sampler(name: str, like: Scheduler) -> Scheduler:
    """A sampler for the noise schedule and prediction type of another scheduler.

    Nothing is clipped, and timesteps are "trailing", so that all start at the noisiest level
    (Lin et al. 2023, arXiv:2305.08891, section 3.3).

    Args:
        name: "ddpm", "ddim", "dpm++" or "sde-dpm++".
    Raises:
        InvalidArgument: another name.
    """
    one_of("sampler", name, SAMPLERS)
    shared = {
        "num_train_timesteps": like.config.num_train_timesteps,
        "beta_start": like.config.beta_start,
        "beta_end": like.config.beta_end,
        "beta_schedule": like.config.beta_schedule,
        "trained_betas": like.config.trained_betas,
        "rescale_betas_zero_snr": like.config.rescale_betas_zero_snr,
        "prediction_type": like.config.prediction_type,
        "compat": like.config.compat,
        "timestep_spacing": "trailing",
    }
    if name == "ddpm":
        return DDPMScheduler(clip_sample=False, **shared)
    if name == "ddim":
        return DDIMScheduler(clip_sample=False, **shared)
    algorithm = "dpmsolver++" if name == "dpm++" else "sde-dpmsolver++"
    return DPMSolverMultistepScheduler(algorithm_type=algorithm, **shared)
