"""Bad input to a scheduler is refused before any work, by a message that names the argument.

One table for the options, whichever class has them, and one for the calls, for every class.
"""

import inspect
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff.errors import InvalidArgument
from minidiff.schedulers import SCHEDULERS, Scheduler

NAN, INF = math.nan, math.inf
FLAG = (1, 0, "yes", None)
POSITIVE = (0, -1.0, NAN, INF, "one", True)
SHIFT = (*POSITIVE, 1e-308, 1e308)
COUNT = (0, -1, 2.5, "ten", True, None, NAN)

BAD_OPTIONS: dict[str, tuple] = {
    "num_train_timesteps": (*COUNT, 10**30),
    "beta_start": (0, -0.1, 1.0, NAN, "low"),
    "beta_end": (0, 1.5, NAN, INF, "high"),
    "beta_schedule": ("quadratic", "", None, 3),
    "trained_betas": (
        [],
        [0.1, -0.1],
        [0.1, 1.0],
        [NAN],
        "0.1",
        [[0.1]],
        0.1,
        [0.1, 0.2],
        [0.01] * 999,
    ),
    "rescale_betas_zero_snr": FLAG,
    "prediction_type": ("noise", "x0", None, 1),
    "compat": ("paper", None, True),
    "clip_sample": FLAG,
    "clip_sample_range": (-1, NAN, INF, 1e308, "wide"),
    "thresholding": FLAG,
    "dynamic_thresholding_ratio": (-0.1, 1.1, NAN, "most"),
    "sample_max_value": (0, 1e-308, 1e308, NAN, "big"),
    "timestep_spacing": ("karras", "", None),
    "steps_offset": (-1, 0.5, 10**30, "one", True),
    "set_alpha_to_one": FLAG,
    "final_sigmas_type": ("one", None, 0),
    "lambda_min_clipped": (NAN, INF, "low", None),
    "interpolation_type": ("cubic", None),
    "timestep_type": ("real", None),
    "use_karras_sigmas": FLAG,
    "use_exponential_sigmas": FLAG,
    "use_beta_sigmas": FLAG,
    "use_lu_lambdas": FLAG,
    "use_flow_sigmas": FLAG,
    "flow_shift": SHIFT,
    "shift": SHIFT,
    "shift_terminal": (0.0, 1.0, -0.5, NAN, "end"),
    "use_dynamic_shifting": FLAG,
    "time_shift_type": ("quadratic", None),
    "base_shift": (NAN, INF, "some"),
    "max_shift": (NAN, INF, "some"),
    "base_image_seq_len": (0, 1.5, "long"),
    "max_image_seq_len": (0, 1.5, "long"),
    "invert_sigmas": FLAG,
    "sigma_min": (0, -1.0, NAN, INF, "small"),
    "sigma_max": (0, -1.0, NAN, INF, "large"),
    "sigma_data": POSITIVE,
    "sigma_schedule": ("linear", None),
    "rho": POSITIVE,
    "original_inference_steps": COUNT,
    "timestep_scaling": (-1.0, NAN, INF, "much"),
    "variance_type": ("fixed_large_log", "none", 1),
    "solver_order": (0, 4, 2.0, "two", None, True),
    "solver_type": ("euler", None),
    "algorithm_type": ("deis", "dpm", None),
    "lower_order_final": FLAG,
    "euler_at_final": FLAG,
    "predict_x0": FLAG,
    "disable_corrector": ([-1], [0.5], 3, "all", None),
    "solver_p": ("DDIMScheduler", 1),
    "skip_prk_steps": FLAG,
    "stochastic_sampling": FLAG,
}


def options_of(name: str) -> list[str]:
    return [p for p in inspect.signature(SCHEDULERS[name].__init__).parameters if p != "self"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_option_refuses_values_outside_its_range(name: str) -> None:
    for option in options_of(name):
        for value in BAD_OPTIONS[option]:
            if name.startswith("DEIS") and value in ("deis", "logrho"):
                continue  # its own
            with pytest.raises(InvalidArgument, match=option):
                SCHEDULERS[name](**{option: value})
                pytest.fail(f"{name}({option}={value!r}) was accepted")


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if "trained_betas" in options_of(n)])
def test_a_file_with_another_number_of_betas_than_timesteps_is_refused(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": name, "num_train_timesteps": 3, "trained_betas": [0.1, 0.2]})
    )
    with pytest.raises(InvalidArgument, match=r"trained_betas must be .*=3, got 2"):
        SCHEDULERS[name].from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_option_that_does_not_exist_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"beta_strat.*its options are"):
        SCHEDULERS[name](beta_strat=0.1)
    with pytest.raises(InvalidArgument, match="beta_strat"):
        SCHEDULERS[name].from_config({"beta_strat": 0.1})


FORMULAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_formulas_for_sigma_exclude_each_other(name: str) -> None:
    own = [f for f in FORMULAS if f in options_of(name)]
    for first, second in pairwise(own):
        with pytest.raises(InvalidArgument, match=f"{first} and {second}"):
            SCHEDULERS[name](**{first: True, second: True})


# Two options that contradict each other, or one that has nothing to act on.
AT_ODDS = [
    ({"flow_shift": 3.0}, "flow_shift=3.0 needs use_flow_sigmas"),
    ({"use_dynamic_shifting": True, "use_flow_sigmas": False}, "use_dynamic_shifting"),
    ({"predict_x0": False, "thresholding": True, "final_sigmas_type": "sigma_min"}, "thresholding"),
    ({"prediction_type": "flow_prediction"}, "flow_prediction"),
    ({"sigma_min": 0.1, "interpolation_type": "linear"}, "sigma_min=0.1 needs"),
    ({"timestep_type": "continuous"}, "timestep_type 'continuous' needs"),
    (
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "zero", "flow_shift": 1.0},
        "final_sigmas_type",
    ),
    ({"sigma_min": 3.0, "sigma_max": 2.0, "rho": 7.0}, "sigma_min"),
]


@pytest.mark.parametrize(("options", "named"), AT_ODDS, ids=str)
def test_contradicting_options_are_refused_by_name(options: dict, named: str) -> None:
    having = [name for name in SCHEDULERS if options.keys() <= set(options_of(name))]
    assert having
    for name in (n for n in having if "EDM" not in n or "flow" not in named):  # F is no flow
        with pytest.raises(InvalidArgument, match=named):
            SCHEDULERS[name](**options)


LIMITS = {
    "clip_sample_range": (0, 1e4),
    "sample_max_value": (1e-4, 1e4),
    "dynamic_thresholding_ratio": (0, 1),
    "flow_shift": (1e-4, 1e4),
    "shift": (1e-4, 1e4),
    "lambda_min_clipped": (-1e308,),
    "rho": (1, 100),
    "sigma_data": (1e-10, 1e10),
    "timestep_scaling": (0, 1e10),
}
SWITCH = {
    "clip_sample_range": {"clip_sample": True},
    "sample_max_value": {"thresholding": True},
    "dynamic_thresholding_ratio": {"thresholding": True},
    "flow_shift": {"use_flow_sigmas": True},
}


@pytest.mark.parametrize("compat", ["exact", "diffusers"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_accepted_options_sample_to_the_end_at_the_limits_of_their_range(
    name: str, compat: str
) -> None:
    for option in LIMITS.keys() & set(options_of(name)):
        for value in LIMITS[option]:
            options = {option: value, **SWITCH.get(option, {}), "compat": compat}
            scheduler = SCHEDULERS[name](**options)
            scheduler.set_timesteps(5)
            x = torch.linspace(-2, 2, 36).reshape(1, 1, 6, 6) * float(scheduler.init_noise_sigma)
            for t in scheduler.timesteps:
                out = torch.tanh(scheduler.scale_model_input(x, t))
                x = scheduler.step(out, t, x).prev_sample
            assert bool(x.isfinite().all()), options


CHURNED = [n for n, c in SCHEDULERS.items() if "s_churn" in inspect.signature(c.step).parameters]


@pytest.mark.parametrize(
    ("churn", "named"),
    [
        ({"s_churn": 2.0, "s_tmin": 1.0, "s_tmax": 0.5}, "s_tmin must be at most s_tmax"),
        ({"s_churn": 2.0, "s_noise": 1e308}, "s_noise"),
        ({"s_churn": -1.0}, "s_churn"),
        ({"s_churn": NAN}, "s_churn"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CHURNED)
def test_churn_out_of_its_range_is_refused_by_name(name: str, churn: dict, named: str) -> None:
    scheduler = ready(name)
    with pytest.raises(InvalidArgument, match="s_churn" if "FlowMatch" in name else named):
        scheduler.step(x_of(), scheduler.timesteps[0], x_of(), **churn)


@pytest.mark.parametrize("mu", [NAN, INF, 10.0, "big", -10.0])
def test_a_dynamic_shift_beyond_float32_is_refused_by_name(mu: Any) -> None:
    for name in (n for n in SCHEDULERS if "use_dynamic_shifting" in options_of(n)):
        flow = {} if "FlowMatch" in name else {"use_flow_sigmas": True}
        with pytest.raises(InvalidArgument, match="mu"):
            SCHEDULERS[name](use_dynamic_shifting=True, **flow).set_timesteps(5, mu=mu)


# --- the grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    for bad in ("gpu", "cuda:99", 5.5, [1]):
        with pytest.raises(InvalidArgument, match="device must be one that torch has here"):
            SCHEDULERS[name]().set_timesteps(5, device=bad)
    assert SCHEDULERS[name](num_train_timesteps=10).timesteps.is_cpu


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_config_other_than_a_dict_is_refused_by_name(name: str) -> None:
    for bad in ("ddim", None, 5, [("beta_start", 0.1)]):
        with pytest.raises(InvalidArgument, match="config must be a dict of options, got"):
            SCHEDULERS[name].from_config(bad)


@pytest.mark.parametrize("n", [0, -3, 1.5, 10.0, "ten", True, NAN, [10]])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_invalid_number_of_steps_is_refused(name: str, n: Any) -> None:
    with pytest.raises(InvalidArgument, match="num_inference_steps"):
        SCHEDULERS[name]().set_timesteps(n)


REAL = ("EDM", "FlowMatch", "Euler", "Heun", "KDPM2", "LMS")  # real timesteps: any number of them


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if not any(k in n for k in REAL)])
def test_more_steps_than_training_had_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="num_inference_steps"):
        SCHEDULERS[name]().set_timesteps(1001)


TAKES_TIMESTEPS = [
    name
    for name, cls in SCHEDULERS.items()
    if "timesteps" in inspect.signature(cls.set_timesteps).parameters
]


@pytest.mark.parametrize(
    "timesteps",
    [[], [5, 5], [3, 7], [1000, 1], [5, -1], [5, NAN], [5, "one"], [INF, 5]],
    ids=str,
)
@pytest.mark.parametrize("name", TAKES_TIMESTEPS)
def test_timesteps_that_do_not_fall_are_refused(name: str, timesteps: list) -> None:
    scheduler = SCHEDULERS[name]()
    if "FlowMatch" in name and timesteps == [1000, 1]:
        timesteps = [1001, 1]  # its first step is T
    with pytest.raises(InvalidArgument, match="timesteps"):
        scheduler.set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_neither_or_both_of_a_number_and_a_grid_are_refused(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    takes = inspect.signature(scheduler.set_timesteps).parameters
    if takes["num_inference_steps"].default is None:
        with pytest.raises(InvalidArgument, match="num_inference_steps"):
            scheduler.set_timesteps()
    if "timesteps" in takes:
        with pytest.raises(InvalidArgument, match="timesteps"):
            scheduler.set_timesteps(3, timesteps=[9, 1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_refused_grid_leaves_the_one_before(name: str) -> None:
    scheduler = ready(name)
    before = list(scheduler.grid)
    with pytest.raises(InvalidArgument):
        scheduler.set_timesteps(-1)
    assert scheduler.grid == before
    assert scheduler.timesteps.tolist() == pytest.approx(before)


@pytest.mark.parametrize("begin", [-1, 1000, 0.5, "first", True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_begin_index_off_the_grid_is_refused(name: str, begin: Any) -> None:
    with pytest.raises(InvalidArgument, match="begin_index"):
        ready(name).set_begin_index(begin)


# --- a step -------------------------------------------------------------------------------------


def ready(name: str) -> Scheduler:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(5)
    return scheduler


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2, 3, 4, 4, dtype=dtype)


BAD_TENSORS = {
    "another shape": (x_of()[:1], x_of(), "model_output must have the shape of sample"),
    "more channels": (torch.cat([x_of(), x_of()], 1), x_of(), "model_output must have the shape"),
    "integers": (x_of(torch.int64), x_of(torch.int64), "floating point"),
    "an integer output": (x_of(torch.int32), x_of(), "model_output and sample"),
    "mixed dtypes": (x_of(torch.float16), x_of(), "model_output and sample.*float16 and.*float32"),
    "NaN": (x_of() + NAN, x_of(), "model_output must be finite, got NaN in 100.0%"),
    "one NaN": (x_of().index_fill(0, torch.tensor([1]), NAN), x_of(), "got NaN in 50.0%"),
    "infinity": (x_of() - INF, x_of(), "model_output must be finite, got infinite"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_tensors_that_do_not_fit_are_refused(name: str, kind: str) -> None:
    scheduler = ready(name)
    output, sample, message = BAD_TENSORS[kind]
    with pytest.raises(InvalidArgument, match=message):
        scheduler.step(output, scheduler.timesteps[0], sample)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_refused_step_can_be_taken_again(name: str) -> None:
    scheduler, other = ready(name), ready(name)
    t, out = scheduler.timesteps[0], x_of() + 0.5
    with pytest.raises(InvalidArgument, match="finite"):
        scheduler.step(out * NAN, t, x_of())
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(0)
    again = scheduler.step(out, t, x_of(), **options).prev_sample
    if options:
        options["generator"] = torch.Generator().manual_seed(0)
    assert torch.equal(again, other.step(out, t, x_of(), **options).prev_sample)


NO_TIMESTEP = [-1, 1234.5, NAN, "999", None, True, torch.tensor([999, 999]),
               999 + 0j, np.complex64(999), torch.tensor(999 + 0j), torch.tensor(True)]  # fmt: skip


@pytest.mark.parametrize("t", NO_TIMESTEP, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_timestep_off_the_grid_is_refused_in_any_step(name: str, t: Any) -> None:
    scheduler = ready(name)
    with pytest.raises(InvalidArgument, match="timestep"):
        scheduler.step(x_of(), t, x_of())
    scheduler.step(x_of(), scheduler.timesteps[0], x_of())
    with pytest.raises(InvalidArgument, match="timestep"):
        scheduler.step(x_of(), t, x_of())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sample_or_output_other_than_a_tensor_is_refused(name: str) -> None:
    scheduler = ready(name)
    for bad in (x_of().numpy(), None, 5, "x"):
        with pytest.raises(InvalidArgument, match="sample must be a tensor, got"):
            scheduler.step(x_of(), scheduler.timesteps[0], bad)
        with pytest.raises(InvalidArgument, match="model_output must be a tensor, got"):
            scheduler.step(bad, scheduler.timesteps[0], x_of())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sample_that_is_not_finite_is_refused(name: str) -> None:
    scheduler = ready(name)
    for bad in (NAN, INF):
        with pytest.raises(InvalidArgument, match="sample must be finite, got"):
            scheduler.step(x_of(), scheduler.timesteps[0], x_of() + bad)


# Also by a step that draws no noise: the next scheduler may draw some.
BAD_NOISE = {
    "generator": [3, "x", [torch.Generator()], [torch.Generator(), 3]],
    "variance_noise": [3, "x", x_of()[:1], x_of().numpy(), x_of() + NAN, x_of(torch.int64)],
    "return_dict": ["no", 1, None],
    "use_clipped_model_output": ["no", 1, None],
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_kind_of_noise_or_of_flag_is_refused_by_name(name: str) -> None:
    scheduler = ready(name)
    takes = inspect.signature(scheduler.step).parameters
    assert "return_dict" in takes
    for argument in BAD_NOISE.keys() & takes:
        for bad in BAD_NOISE[argument]:
            with pytest.raises(InvalidArgument, match=f"^{argument} must"):
                scheduler.step(x_of(), scheduler.timesteps[0], x_of(), **{argument: bad})


def test_tokens_of_another_kind_are_refused_by_name() -> None:
    scheduler = ready("FlowMatchEulerDiscreteScheduler")
    x = torch.zeros(2, 5, 3)
    for bad in (3, "x", torch.zeros(2, 4), torch.zeros(5)):
        with pytest.raises(InvalidArgument, match="per_token_timesteps must be a tensor"):
            scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=bad)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_input_to_scale_is_a_floating_point_tensor_at_a_number(name: str) -> None:
    scheduler = ready(name)
    t = scheduler.timesteps[0]
    for bad in (None, "x", 5, x_of().numpy(), x_of(torch.int64)):
        with pytest.raises(InvalidArgument, match="sample must be a tensor of floating point"):
            scheduler.scale_model_input(bad, t)
    for bad in ("x", 1j, True, [999]):
        with pytest.raises(InvalidArgument, match="timestep must be one number"):
            scheduler.scale_model_input(x_of(), bad)


@pytest.mark.parametrize("t", [-1, 1000, 5000])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_noising_at_a_step_outside_training_is_refused(name: str, t: int) -> None:
    with pytest.raises(InvalidArgument, match="timesteps"):
        SCHEDULERS[name]().add_noise(x_of(), x_of(), torch.tensor([t]))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_of_another_dtype_is_refused(name: str) -> None:
    scheduler = ready(name)
    for x0, eps in ((x_of(), x_of(torch.float64)), (x_of(torch.int64), x_of(torch.int64))):
        with pytest.raises(InvalidArgument, match="floating point of one dtype"):
            scheduler.add_noise(x0, eps, scheduler.timesteps[:1])


# The others walk every training step by default, in diffusers too.
NEEDS_A_GRID = [
    name
    for name, kind in SCHEDULERS.items()
    if name != "DDPMScheduler" and not getattr(kind, "has_default_grid", False)
]


@pytest.mark.parametrize("name", NEEDS_A_GRID)
def test_a_step_before_set_timesteps_is_refused(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    with pytest.raises(InvalidArgument, match="set_timesteps"):
        scheduler.step(x_of(), scheduler.timesteps[0], x_of())


LOOKS_UP = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler")  # steps in any order


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in LOOKS_UP])
def test_a_step_beyond_the_last_is_refused(name: str) -> None:
    scheduler = ready(name)
    for t in scheduler.timesteps:
        scheduler.step(x_of(), t, x_of())
    with pytest.raises(InvalidArgument, match="steps are done"):
        scheduler.step(x_of(), scheduler.timesteps[-1], x_of())


# --- noising ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noising_refuses_tensors_and_timesteps_that_do_not_fit(name: str) -> None:
    scheduler = ready(name)
    t = scheduler.timesteps[:1]
    with pytest.raises(InvalidArgument, match="shape"):
        scheduler.add_noise(x_of(), x_of()[:1], t)
    for bad in (torch.cat([t, t, t]), [], "first", torch.tensor([3 + 0j]), torch.tensor([True])):
        with pytest.raises(InvalidArgument, match="timestep"):
            scheduler.add_noise(x_of(), x_of(), bad)
    for bad in (None, 5, "x", x_of().numpy()):
        for noising in (scheduler.add_noise, scheduler.get_velocity):
            with pytest.raises(InvalidArgument, match="noise must be a tensor, got"):
                noising(x_of(), bad, t)
            with pytest.raises(InvalidArgument, match=r"samples? must be a tensor, got"):
                noising(bad, x_of(), t)
    with pytest.warns(UserWarning, match="noise must be finite, got NaN"):
        scheduler.add_noise(x_of(), x_of() + NAN, t)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_noising_at_anything_but_training_steps_names_timesteps(name: str) -> None:
    for bad in (torch.tensor([1, 2, 3]), torch.tensor([1.0]), [1.5], torch.tensor([True])):
        with pytest.raises(InvalidArgument, match=r"^timesteps must be (1 or 2 integers|numbers)"):
            ready(name).add_noise(x_of(), x_of(), bad)
