"""The use of a scheduler by programs written for diffusers, besides stepping through a grid."""

import copy
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    Scheduler,
)

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

EULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
UNASKED = (*EULERS, "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def walk(scheduler, x: Tensor, steps: slice = slice(None)) -> Tensor:
    """Return x after these steps of a tanh network, with the noise of one seed per step."""
    for t in scheduler.timesteps[steps]:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        options = {}
        if "generator" in scheduler.step.__code__.co_varnames:
            options["generator"] = torch.Generator().manual_seed(int(float(t) * 7) % 1000)
        out = torch.tanh(0.7 * scaled.float()).to(x.dtype)
        x = scheduler.step(out, t, x, **options).prev_sample
    return x


def pair(name: str, **options) -> tuple[Scheduler, object]:
    return SCHEDULERS[name](**options), getattr(diffusers, name)(**options)


# --- configs ------------------------------------------------------------------------------------


def test_a_saved_config_can_be_read_changed_and_built(tmp_path: Path) -> None:
    EulerDiscreteScheduler(use_karras_sigmas=True).save_config(tmp_path)
    config = EulerDiscreteScheduler.load_config(tmp_path)
    config["timestep_spacing"] = "trailing"
    built = EulerDiscreteScheduler.from_config(config)
    at_once = EulerDiscreteScheduler.from_pretrained(tmp_path, timestep_spacing="trailing")
    assert dict(built.config) == dict(at_once.config)
    assert built.config.use_karras_sigmas
    assert built.config.timestep_spacing == "trailing"
    with pytest.raises(InvalidArgument, match="spacing"):
        EulerDiscreteScheduler.from_pretrained(tmp_path, spacing="trailing")


@pytest.mark.parametrize("compat", ["diffusers", "exact"])
def test_a_file_leaves_no_option_to_the_defaults(tmp_path: Path, compat: str) -> None:
    saved = DDIMScheduler(beta_end=0.012, compat=compat)
    saved.save_pretrained(tmp_path)
    read = DDIMScheduler.from_pretrained(tmp_path)
    expected = {k: v for k, v in saved.config.items() if k != "_use_default_values"}
    assert dict(read.config) == expected


@pytest.mark.parametrize("target", SCHEDULERS)
@pytest.mark.parametrize("source", SCHEDULERS)
def test_every_class_builds_from_every_other_as_in_diffusers(source: str, target: str) -> None:
    wanted = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "beta_end": 0.012}
    options = {k: v for k, v in wanted.items() if SCHEDULERS[source].has_option(k)}
    mine, theirs = pair(source, **options)
    mine = SCHEDULERS[target].from_config(mine.config).config
    theirs = getattr(diffusers, target).from_config(theirs.config).config
    own = {k: v for k, v in mine.items() if not k.startswith("_") and k != "compat"}
    assert own == {k: theirs[k] for k in own}


# scheduler_config.json of published pipelines, with the options that their class lets lie idle:
# thresholding beside clip_sample, steps_offset beside trailing, skip_prk_steps outside PNDM.
STOCK = {
    "Stable Diffusion 1.5": {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None,
    },
    "Stable Diffusion XL": {
        "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "clip_sample": False, "interpolation_type": "linear",
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "timestep_spacing": "trailing", "trained_betas": None, "use_karras_sigmas": False,
    },
    "DeepFloyd IF": {
        "_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001, "clip_sample": True, "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.95, "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "sample_max_value": 1.5, "thresholding": True,
        "trained_betas": None, "variance_type": "learned_range",
    },
}  # fmt: skip


@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_config_of_a_published_pipeline_reads_as_in_diffusers(name: str, stock: str) -> None:
    mine, theirs = SCHEDULERS[name], getattr(diffusers, name)
    mine, theirs = mine.from_config(STOCK[stock]), theirs.from_config(STOCK[stock])
    own = {k: v for k, v in mine.config.items() if not k.startswith("_") and k != "compat"}
    assert own == {k: theirs.config[k] for k in own}
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(8)
    torch.testing.assert_close(mine.timesteps, theirs.timesteps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_compatibles_equal_diffusers_and_give_the_config_back(name: str) -> None:
    mine, theirs = pair(name)
    expected = {c.__name__ for c in theirs.compatibles} & SCHEDULERS.keys()
    expected -= {"EDMEulerScheduler"} - {name}  # its network is preconditioned, no other's is
    assert {cls.__name__ for cls in mine.compatibles} == expected
    for other in mine.compatibles:
        moved = other.from_config(mine.config)
        assert type(moved) is other
        assert dict(type(mine).from_config(moved.config).config) == dict(mine.config)


def test_an_option_comes_back_after_a_class_that_lacks_it(tmp_path: Path) -> None:
    pndm = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1)
    euler = EulerDiscreteScheduler.from_config(pndm.config)
    assert "skip_prk_steps" not in euler.config
    euler.save_pretrained(tmp_path)
    for config in (euler.config, EulerDiscreteScheduler.from_pretrained(tmp_path).config):
        back = PNDMScheduler.from_config(config)
        assert back.config.skip_prk_steps
        assert back.config.set_alpha_to_one
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path).config
    assert theirs.skip_prk_steps


def test_the_last_value_given_for_an_option_counts() -> None:
    euler = EulerDiscreteScheduler.from_config(PNDMScheduler(skip_prk_steps=True).config)
    assert not PNDMScheduler.from_config(euler.config, skip_prk_steps=False).config.skip_prk_steps


# Configs of diffusers 0.1 to 0.10, and what they mean today.
OF_2022 = [
    ({"predict_epsilon": True}, {"prediction_type": "epsilon"}),
    ({"predict_epsilon": False}, {"prediction_type": "sample"}),
    ({"predict_epsilon": True, "prediction_type": "v_prediction"},
     {"prediction_type": "v_prediction"}),
    ({"timesteps": 500}, {"num_train_timesteps": 500}),
    ({"clip_alpha_at_one": False}, {"set_alpha_to_one": False}),
    ({"tensor_format": "pt"}, {}),
    ({"tensor_format": "np", "timestep_values": None}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("old", "today"), OF_2022, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_config_of_2022_is_read_for_what_it_meant(
    tmp_path: Path, name: str, old: dict, today: dict
) -> None:
    kind = SCHEDULERS[name]
    if today.get("prediction_type") == "sample" and any(
        kind in name for kind in ("EDM", "Ancestral", "KDPM2")
    ):
        pytest.skip("not implemented by diffusers in this class, so refused by its name")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(old | {"_class_name": name}))
    read = kind.from_pretrained(tmp_path)
    expected = kind.from_config(today)
    for option in set(kind._defaults()):
        assert read.config[option] == expected.config[option]
    assert read.config.get("_carried") == expected.config.get("_carried")


@pytest.mark.parametrize(
    ("option", "value"),
    [("tensor_format", "jax"), ("timestep_values", [1, 2]), ("predict_epsilon", "yes"),
     ("timesteps", 0), ("clip_alpha_at_one", 1), ("steps", 3)],
)  # fmt: skip
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_old_option_that_nothing_stands_for_is_refused(name: str, option: str, value) -> None:
    with pytest.raises(InvalidArgument, match=option):
        SCHEDULERS[name].from_config({option: value})


@pytest.mark.parametrize("source", SCHEDULERS)
@pytest.mark.parametrize("target", SCHEDULERS)
def test_a_file_of_a_class_with_other_noise_levels_is_refused(
    tmp_path: Path, source: str, target: str
) -> None:
    SCHEDULERS[source]().save_pretrained(tmp_path)
    if [k in source for k in ("EDM", "FlowMatch")] == [k in target for k in ("EDM", "FlowMatch")]:
        with suppress(InvalidArgument):  # an option that only the other class has
            SCHEDULERS[target].from_pretrained(tmp_path)
    else:
        with pytest.raises(CheckpointError, match=f"written by {source}, .* {target} does not"):
            SCHEDULERS[target].from_pretrained(tmp_path)


def test_a_solver_with_flow_sigmas_reads_the_file_of_a_flow(tmp_path: Path) -> None:
    SCHEDULERS["FlowMatchEulerDiscreteScheduler"]().save_pretrained(tmp_path)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert DPMSolverMultistepScheduler.from_pretrained(tmp_path, **flow).config.use_flow_sigmas


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_scales_and_adds_noise_before_set_timesteps_as_in_diffusers(name: str) -> None:
    x, eps = noise(2, 3, 4, 4), noise(2, 3, 4, 4).flip(0)
    count = len(getattr(diffusers, name)(num_train_timesteps=64).timesteps)
    for i in (0, 5, count - 1):
        mine, theirs = pair(name, num_train_timesteps=64)
        t = theirs.timesteps[i][None]
        assert torch.equal(mine.timesteps, theirs.timesteps)
        torch.testing.assert_close(mine.add_noise(x, eps, t), theirs.add_noise(x, eps, t))
        scaled = theirs.scale_model_input(x, t)
        torch.testing.assert_close(mine.scale_model_input(x, t), scaled)
    with pytest.raises(InvalidArgument, match="timestep 10 is not among"):
        pair(name)[0].scale_model_input(x, 10)


HAVE_BETAS = [n for n, cls in SCHEDULERS.items() if cls.has_option("beta_start")]


@pytest.mark.parametrize("name", HAVE_BETAS)
def test_a_schedule_of_tiny_betas_samples_as_in_diffusers(name: str) -> None:
    for start, end in ((1e-6, 1e-6), (1e-5, 2e-4)):
        mine, theirs = pair(name, beta_start=start, beta_end=end, beta_schedule="linear")
        for scheduler in (mine, theirs):
            scheduler.set_timesteps(10)
        x = noise(1, 3, 4, 4) * mine.init_noise_sigma
        torch.testing.assert_close(walk(mine, x), walk(theirs, x), rtol=3e-5, atol=3e-5)


def test_what_diffusers_ignores_is_refused_in_both_readings() -> None:
    assert "thresholding" not in diffusers.DDIMInverseScheduler(thresholding=True).config
    for compat in ("exact", "diffusers"):
        with pytest.raises(InvalidArgument, match="unexpected keyword argument 'thresholding'"):
            SCHEDULERS["DDIMInverseScheduler"](thresholding=True, compat=compat)
        for name in HAVE_BETAS:
            with pytest.raises(InvalidArgument, match="one number for each of num_train_timesteps"):
                SCHEDULERS[name](trained_betas=[0.1, 0.3], compat=compat)
            with pytest.raises(InvalidArgument, match="beta_end"):
                SCHEDULERS[name](beta_start=0.1, beta_end=2, compat=compat)


# --- attributes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", "PNDMScheduler"])
def test_final_alpha_cumprod_is_that_of_diffusers(name: str, to_one: bool) -> None:
    mine, theirs = pair(name, set_alpha_to_one=to_one)
    torch.testing.assert_close(mine.final_alpha_cumprod, theirs.final_alpha_cumprod)


@pytest.mark.parametrize("steps", [None, 4, 7])
@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler"])
def test_previous_timestep_is_that_of_diffusers(name: str, steps: int | None) -> None:
    mine, theirs = pair(name)
    for scheduler in (mine, theirs) if steps else ():
        scheduler.set_timesteps(steps)
    for t in theirs.timesteps[-5:]:
        for given in (t, int(t)):
            assert int(mine.previous_timestep(given)) == int(theirs.previous_timestep(given))
    with pytest.raises(InvalidArgument, match="timestep 1000"):
        mine.previous_timestep(1000)


@pytest.mark.parametrize(
    "name", [n for n in SCHEDULERS if hasattr(getattr(diffusers, n), "index_for_timestep")]
)
def test_index_for_timestep_is_that_of_diffusers(name: str) -> None:
    mine, theirs = pair(name)
    for scheduler in (mine, theirs):
        scheduler.set_timesteps(6)
    for grid in (None, torch.tensor([9, 5, 5, 5, 3])):
        for t in (mine if grid is None else theirs).timesteps if grid is None else (9, 5, 3):
            other = (t if grid is not None else theirs.timesteps[mine.grid.index(t)], grid)
            assert mine.index_for_timestep(t, grid) == theirs.index_for_timestep(*other)
    with pytest.raises(InvalidArgument, match="not among"):
        mine.index_for_timestep(1234)


# --- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDIMScheduler, LCMScheduler])
def test_an_output_is_read_by_attribute_name_and_position(kind: type[Scheduler]) -> None:
    scheduler = kind()
    scheduler.set_timesteps(4)
    output = scheduler.step(noise(1, 2, 3, 3), scheduler.timesteps[0], noise(1, 2, 3, 3))
    assert output["prev_sample"] is output.prev_sample is output[0] is output[:1][0]
    assert output.keys()[0] == "prev_sample"
    assert output.to_tuple() == output.values() == (output[0], output[1])
    assert type(output.to_tuple()) is tuple


@pytest.mark.parametrize("name", EULERS)
def test_the_starting_sigma_is_a_tensor_where_it_is_one_in_diffusers(name: str) -> None:
    mine, theirs = pair(name)
    torch.testing.assert_close(mine.init_noise_sigma, torch.as_tensor(theirs.init_noise_sigma))


# --- grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNASKED)
def test_without_set_timesteps_the_grid_is_every_training_step(name: str) -> None:
    x = noise(2, 3, 4, 4)
    mine, theirs = pair(name)
    with pytest.warns(UserWarning, match="step before set_timesteps"):
        mine = walk(mine, x, slice(10, 14))
    theirs = walk(theirs, x, slice(10, 14))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_the_sigmas_of_euler_can_be_given_back_as_a_grid(end: str) -> None:
    spaced, given = (EulerDiscreteScheduler(final_sigmas_type=end) for _ in range(2))
    spaced.set_timesteps(7)
    given.set_timesteps(sigmas=spaced.sigmas)
    x = noise(2, 3, 4, 4) * spaced.init_noise_sigma
    torch.testing.assert_close(walk(given, x), walk(spaced, x), rtol=1e-5, atol=1e-5)


def test_eulers_sigmas_may_not_rise_at_the_end() -> None:
    with pytest.raises(InvalidArgument, match="falling"):
        EulerDiscreteScheduler().set_timesteps(sigmas=[3.0, 1.0, 2.0])


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.25, 0.5])
def test_a_threshold_below_one_is_the_same_for_every_image(limit: float) -> None:
    options = {"thresholding": True, "sample_max_value": limit}
    runs = []
    for scheduler in pair("DDIMScheduler", **options):
        scheduler.set_timesteps(5)
        runs.append(walk(scheduler, noise(2, 3, 4, 4)))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)


def test_a_solver_accepts_an_output_without_its_learned_variance() -> None:
    plain = DPMSolverMultistepScheduler()
    learned = DPMSolverMultistepScheduler(variance_type="learned_range")
    for scheduler in (plain, learned):
        scheduler.set_timesteps(5)
    x = noise(2, 3, 4, 4)
    assert torch.equal(walk(plain, x), walk(learned, x))


LAYOUTS = {
    "one image": noise(1, 3, 4, 4),
    "tokens": noise(2, 16, 4),
    "video": noise(2, 3, 2, 4, 4),
    "transposed": noise(2, 3, 4, 4).transpose(2, 3),
    "channels last": noise(2, 3, 4, 4).to(memory_format=torch.channels_last),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_of_any_dtype_and_layout_give_the_results_of_diffusers(
    name: str, layout: str, dtype: torch.dtype
) -> None:
    runs = []
    for scheduler in pair(name):
        scheduler.set_timesteps(6)
        sigma = float(getattr(scheduler, "init_noise_sigma", 1))  # FlowMatch has none in diffusers
        runs.append(walk(scheduler, (LAYOUTS[layout] * sigma).to(dtype)))
    mine, theirs = runs
    assert mine.dtype == dtype
    far = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1)
    assert far < TOLERANCE[dtype]  # false for NaN


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_made_during_sampling_gives_the_result_of_the_original(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(8)
    x = walk(scheduler, noise(2, 3, 4, 4) * float(scheduler.init_noise_sigma), slice(4))
    other = copy.deepcopy(scheduler)
    assert torch.equal(walk(scheduler, x, slice(4, None)), walk(other, x, slice(4, None)))


@pytest.mark.parametrize("name", [name for name, cls in SCHEDULERS.items() if cls.history])
def test_past_evaluations_are_released_after_the_last_step(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(4)
    x = walk(scheduler, noise(1, 1, 2, 2), slice(3))
    assert scheduler.past
    walk(scheduler, x, slice(3, None))
    assert not scheduler.past
