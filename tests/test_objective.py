"""Objectives: the loss of a perfect network by theory, and samples of what is learnt."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from minidiff import Pipeline
from minidiff.data import ImageData, load
from minidiff.errors import InvalidArgument
from minidiff.names import NOISE_LEVELS, PREDICTION_TYPES, PRESERVING, SPREADS
from minidiff.objective import (
    FlowObjective,
    LearnedVariance,
    Objective,
    byte_log_likelihood,
    quantiles,
)
from minidiff.prediction import solve
from minidiff.sample import trajectory
from minidiff.schedule import Level, add_noise
from minidiff.schedulers.core.names import SAMPLERS, sampler
from minidiff.training.build import build, resolve
from minidiff.training.config import TrainConfig
from minidiff.training.diffusion import train
from minidiff.training.objectives import make

STD = 0.7  # of Gaussian data, for which everything is known
EVERY = [
    {"prediction_type": kind, "noise_levels": spread}
    for kind in PREDICTION_TYPES
    for spread in SPREADS[kind]
]


def objective(prediction_type: str, **options):
    if "edm" in (prediction_type, options.get("loss_weight")):
        options = {"sigma_data": STD} | options
    return make(prediction_type, **options)


def exact(x, level: Level):
    """Return E[x0 | x] for data N(0, STD²)."""
    return level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2) * x


def exact_network(objective, level: Level):
    """Return a perfect network at one level, whose input is that of the objective."""

    def network(given, t):
        x = given / objective.model_input(torch.ones(()), level)
        x0 = exact(x, level)
        p, q = objective.row(level)
        return p * x0 + q * (x - level.alpha * x0) / level.sigma

    return network


@pytest.mark.parametrize("weight", ["none", "min_snr", "edm"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_loss_of_a_perfect_network_follows_from_the_papers_weights(kind, weight):
    """x0 given x has the variance V = s²σ²/(α²s² + σ²); the network's output scales it."""
    learn = objective(kind, loss_weight=weight)
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    x0 = STD * torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    eps = torch.randn(n, 1, 1, generator=generator, dtype=torch.float64)
    for u in (0.15, 0.5, 0.8):
        levels = learn.levels(np.full(n, u))
        level = Level(float(levels.alpha[0]), float(levels.sigma[0]))
        snr, ratio = (level.alpha / level.sigma) ** 2, level.sigma / level.alpha
        v = (STD * level.sigma) ** 2 / ((level.alpha * STD) ** 2 + level.sigma**2)
        expected = {
            "none": {
                "epsilon": snr,
                "sample": 1,
                "v_prediction": snr + 1,
                "flow": 1 / level.sigma**2,
                "edm": (ratio**2 + STD**2) / (ratio * STD) ** 2,  # 1/c_out²
            }[kind],
            "min_snr": min(snr, 5),
            "edm": (ratio**2 + STD**2) / (ratio * STD) ** 2,  # λ(σ)
        }[weight]
        loss = learn.loss(exact_network(learn, level), x0, eps, levels.on(x0))
        assert float(loss.mean()) == pytest.approx(expected * v, rel=0.03)


def test_inputs_targets_and_weights_of_edm_are_normalized_at_every_level():
    """F, input and target have variance 1 at every σ; with λ the loss is that of F itself."""
    learn = objective("edm", loss_weight="edm")
    levels = learn.levels(np.linspace(0.01, 0.99, 50))
    assert levels.weight == pytest.approx(np.ones(50))
    sigma = levels.sigma
    p, q = learn.row(levels.level)
    assert (p * STD) ** 2 + q**2 == pytest.approx(np.ones(50))
    assert learn.model_input(np.sqrt(STD**2 + sigma**2), levels.level) == pytest.approx(np.ones(50))


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_levels_have_the_distribution_of_their_name(options):
    u = (np.arange(2000) + 0.5) / 2000
    learn = objective(**options, **({} if options["noise_levels"] == "uniform" else MOMENTS))
    levels = learn.levels(u)
    ratio = levels.sigma / levels.alpha
    if options["noise_levels"] == "uniform":
        gaps = np.diff(levels.t)
        assert gaps.max() - gaps.min() <= 1 + 1e-9  # even, in whole steps where there are steps
        assert (gaps >= 0).all()
        return
    wanted = np.exp(stats.norm.ppf(u, *MOMENTS.values()))
    if options["prediction_type"] in PRESERVING:  # the nearest whole step
        schedule = learn.scheduler.schedule
        step = schedule.timestep_of(wanted)
        assert np.abs(levels.t - step).max() <= 0.5 + 1e-9
        assert ratio == pytest.approx(schedule.sigma_of(levels.t))
    else:
        assert ratio == pytest.approx(wanted)


MOMENTS = {"level_mean": -0.7, "level_std": 1.1}


def test_the_defaults_are_the_parameters_of_the_papers():
    edm, flow = objective("edm"), make("flow")
    middle = np.array([0.5])
    assert edm.levels(middle).sigma == pytest.approx([math.exp(-1.2)])  # Karras et al., table 1
    assert flow.levels(middle).sigma == pytest.approx([0.5])  # Esser et al., rf/lognorm(0, 1)
    up = np.array([stats.norm.cdf(1)])
    assert edm.levels(up).sigma == pytest.approx([1.0])
    assert flow.levels(up).sigma == pytest.approx([1 / (1 + math.exp(-1))])


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_training_and_sampling_condition_the_network_on_the_same_times(kind):
    learn = objective(kind, noise_levels="uniform")
    scheduler = learn.scheduler
    scheduler.set_timesteps(7)
    for t, level in zip(scheduler.grid, scheduler.levels, strict=False):
        u = {"flow": level.sigma, "edm": math.log(level.sigma / 0.002) / math.log(40_000)}
        levels = learn.levels(np.array([u.get(kind, (t + 0.5) / 1000)]))
        assert levels.t == pytest.approx([t], abs=1e-9)
        assert (levels.alpha[0], levels.sigma[0]) == pytest.approx(level, abs=1e-12)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_target_and_input_are_undone_by_the_sampler(kind):
    """The target as model output gives back image and noise."""
    learn = objective(kind)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(64, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    levels = learn.levels(quantiles(64, generator))
    alpha, sigma = (torch.from_numpy(v).view(-1, 1, 1) for v in levels.level)
    level = Level(alpha, sigma)
    out = learn.scheduler.target(x0, eps, level)
    found = solve(out, alpha * x0 + sigma * eps, level, learn.row(level))
    for got, wanted in zip(found, (x0, eps), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("kind", [*PREDICTION_TYPES, "learned variance"])
def test_a_perfect_network_sampled_by_its_scheduler_gives_the_data(kind):
    learned = kind == "learned variance"
    learn = objective("epsilon" if learned else kind, learn_variance=learned)
    scheduler = learn.scheduler
    if learned:
        scheduler = scheduler.from_config(scheduler.config, clip_sample=False)  # data have tails
    scheduler.set_timesteps(500 if learned else 60)
    x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    levels = dict(zip(scheduler.grid, scheduler.levels, strict=False))

    def denoise(given, t):
        out = exact_network(learn, levels[t])(given, t)
        return torch.cat([out, torch.zeros_like(out)], 1) if learned else out

    for step in trajectory(
        denoise, scheduler, x * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    ):
        x = step.next_x
    assert float(x.std()) == pytest.approx(STD, rel=0.015)


# --- learned variance ------------------------------------------------------------------------


def test_the_variational_bound_is_the_divergence_of_the_two_gaussians():
    learn = make("epsilon", learn_variance=True)
    assert isinstance(learn, LearnedVariance)
    generator = torch.Generator().manual_seed(0)
    x0, guess, v = (torch.randn(5, 2, 3, generator=generator) / 2 for _ in range(3))
    steps = torch.tensor([1, 2, 400, 998, 999])
    found = learn.bound(v, guess, x0, steps)
    betas, bars = learn.scheduler.betas, learn.scheduler.alphas_cumprod
    for i, t in enumerate(steps.tolist()):
        beta, bar, before = betas[t], bars[t], bars[t - 1]
        small = (1 - before) / (1 - bar) * beta
        fraction = (v[i].double() + 1) / 2
        variance = beta**fraction * small ** (1 - fraction)
        gain = before.sqrt() * beta / (1 - bar)
        q = torch.distributions.Normal(gain * x0[i].double(), small.sqrt())
        p = torch.distributions.Normal(gain * guess[i].double(), variance.sqrt())
        wanted = torch.distributions.kl_divergence(q, p).mean()
        assert float(found[i]) == pytest.approx(float(wanted), rel=2e-3)


def test_at_the_first_step_the_bound_is_the_likelihood_of_the_bytes():
    grey = torch.arange(256) / 127.5 - 1
    for mean, std in ((0.3, 0.2), (-1.0, 0.01), (0.999, 1.0)):
        log_p = byte_log_likelihood(grey, torch.tensor(mean), torch.tensor(math.log(std)))
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-4)
    learn = make("sample", learn_variance=True)
    x0 = grey[torch.tensor([[[3, 200]]])]
    bound = learn.bound(torch.zeros_like(x0), x0, x0, torch.tensor([0]))
    levels = learn.scheduler.schedule.levels()
    beta = levels[0].sigma ** 2
    small = levels[0].sigma ** 2 / levels[1].sigma ** 2 * levels[1].variance_since(levels[0])
    std = math.sqrt(math.sqrt(beta * small))  # halfway between the two, in logarithms
    inside = math.erf(1 / 255 / std / math.sqrt(2))
    assert float(bound) == pytest.approx(-math.log(inside), rel=1e-3)


def test_the_bound_trains_the_variance_and_the_simple_loss_the_mean():
    learn = make("v_prediction", learn_variance=True)
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(8, 1, 2, 2, generator=generator) for _ in range(2))
    levels = learn.levels(quantiles(8, generator)).on(x0)
    out = torch.randn(8, 2, 2, 2, generator=generator).requires_grad_()
    learn.loss(lambda x, t: out, x0, eps, levels).sum().backward()
    mean, variance = out.grad.chunk(2, 1)
    target = learn.scheduler.target(x0, eps, levels.level)
    assert torch.allclose(mean, 2 * (out.detach()[:, :1] - target) / 4, atol=1e-6)
    assert float(variance.abs().min()) > 0


# --- training --------------------------------------------------------------------------------

LEARNING = [
    *({"prediction_type": kind} for kind in PREDICTION_TYPES),
    {"prediction_type": "sample", "learn_variance": True},
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            {"prediction_type": "epsilon", "loss_weight": "min_snr", "noise_levels": "log_normal"},
            {"prediction_type": "v_prediction", "loss_weight": "edm"},
            {"prediction_type": "flow", "noise_levels": "uniform", "loss_weight": "min_snr"},
        )
    ),
]


def few() -> ImageData:
    return ImageData("few", load("digits").images[:64], None, ())


@pytest.mark.parametrize("options", LEARNING, ids=str)
def test_every_objective_is_trained_and_read_back_from_its_folder(options, tmp_path):
    rows, data = [], few()
    config = TrainConfig(
        steps=40, channels=(8, 16), batch_size=32, pictures=0, num_inference_steps=3, **options
    )
    pipe = train(config, data, on_log_row=rows.append)
    fresh, learn = build(config, data), resolve(config, data).objective()
    z = fresh.vae.to_latents(data.batch(torch.arange(64))[0])
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(z.shape, generator=generator)
    levels = learn.levels(quantiles(64, generator)).on(z)
    with torch.no_grad():
        before, after = (float(learn.loss(p.unet, z, eps, levels).mean()) for p in (fresh, pipe))
    assert rows[-1].loss < 0.8 * before
    assert after < before

    pipe.save_pretrained(tmp_path / "model")
    back = Pipeline.from_pretrained(tmp_path / "model")
    assert options_of(back) == options_of(pipe)
    first, second = (p(num_images=2, seed=3, output_type="pt").images for p in (pipe, back))
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max()))


def options_of(pipe) -> dict:
    """Return the options of its scheduler, given or default."""
    config = pipe.scheduler.config
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def test_the_standard_deviation_is_measured_where_the_objective_needs_it():
    data = load("digits")
    pipe = build(TrainConfig(steps=1, prediction_type="edm", channels=(8, 8)), data)
    wanted = float(data.batch(torch.arange(len(data)))[0].double().std(correction=0))
    assert pipe.scheduler.config.sigma_data == pytest.approx(wanted)
    given = build(
        TrainConfig(steps=1, prediction_type="edm", sigma_data=0.4, channels=(8, 8)), data
    )
    assert given.scheduler.config.sigma_data == 0.4
    grey = ImageData("grey", torch.full((2, 1, 8, 8), 9, dtype=torch.uint8), None, ())
    with pytest.raises(InvalidArgument, match="data grey are of one grey"):
        build(TrainConfig(steps=1, prediction_type="edm", channels=(8, 8)), grey)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_levels": "cosine"}, "noise_levels must be one of uniform, log_normal, logit"),
        ({"prediction_type": "edm", "noise_levels": "logit_normal"}, "'edm' must be one of log_n"),
        ({"prediction_type": "flow", "noise_levels": "log_normal"}, "'flow' must be one of logit"),
        ({"noise_levels": "logit_normal"}, "noise_levels of prediction_type 'v_prediction'"),
        ({"level_mean": 0.0}, "level_mean is for noise_levels other than 'uniform'"),
        ({"prediction_type": "edm", "level_std": 0}, "level_std must be above 0"),
        ({"prediction_type": "edm", "level_mean": 1e9}, "level_mean must be in"),
        ({"loss_weight": "snr"}, "loss_weight must be one of none, min_snr, edm"),
        ({"min_snr_gamma": 5}, "min_snr_gamma is for loss_weight 'min_snr'"),
        ({"sigma_data": 0.5}, "sigma_data is for prediction_type or loss_weight 'edm'"),
        ({"prediction_type": "edm", "sigma_data": -1}, "sigma_data must be"),
        ({"prediction_type": "edm", "beta_schedule": "linear"}, "beta_schedule is for epsilon"),
        ({"prediction_type": "flow", "learn_variance": True}, "learn_variance is for epsilon"),
        ({"noise_levels": "log_normal", "learn_variance": True}, "learn_variance is for"),
        ({"loss_weight": "min_snr", "learn_variance": True}, "learn_variance has its own weights"),
        ({"learn_variance": 1}, "learn_variance must be True or False"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(options, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainConfig(steps=1, **options)


def test_every_spread_is_named():
    assert {name for names in SPREADS.values() for name in names} == set(NOISE_LEVELS)


# --- samplers of another name, for what was learnt ----------------------------------------------


THERE = {
    "v_prediction": tuple(SAMPLERS),
    "flow": ("euler", "dpm++", "dpm++3", "dpm++2s", "sde-dpm++", "unipc"),
    "edm": ("euler", "dpm++", "dpm++3", "sde-dpm++"),
}


@pytest.mark.parametrize("kind", THERE)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_chosen_by_name_uses_the_levels_of_training_or_is_refused(name, kind):
    learn = objective(kind)
    if name not in THERE[kind]:
        with pytest.raises(InvalidArgument, match="this model's levels must be one of euler, dpm"):
            sampler(name, learn.scheduler)
        return
    scheduler = sampler(name, learn.scheduler)
    scheduler.set_timesteps(100)
    x = torch.randn(5000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    levels = dict(zip(scheduler.grid, scheduler.levels, strict=False))

    def denoise(given, t):
        level = levels[t]
        alpha, _ = level
        # a sampler may carry the same sample at another scale: α = 1 instead of α² + σ² = 1
        own = Level(1 / (1 + level.sigma**2) ** 0.5, level.sigma / (1 + level.sigma**2) ** 0.5)
        at = own if kind == "v_prediction" and alpha == 1 and level.sigma else level
        return exact_network(learn, at)(given, t)

    start = x * scheduler.init_noise_sigma
    for step in trajectory(denoise, scheduler, start, torch.Generator().manual_seed(1)):
        x = step.next_x
    assert float(x.std()) == pytest.approx(STD, rel=0.05)


class Doubled(Objective):
    """Twice the loss."""

    def loss(self, network, x0, eps, levels):
        return 2 * super().loss(network, x0, eps, levels)


class OwnVariance(LearnedVariance):
    """An unchanged subclass."""


class Consistent(FlowObjective):
    """Two evaluations, whose slopes are to agree at half of the noise."""

    def loss(self, network, x0, eps, levels):
        half = levels._replace(alpha=1 - levels.sigma / 2, sigma=levels.sigma / 2, t=levels.t / 2)
        first, second = (network(add_noise(x0, eps, of.level), of.t) for of in (levels, half))
        apart = (first - second).square().flatten(1).mean(1)
        return super().loss(network, x0, eps, levels) + apart


def descended(own, **options):
    """Return the weights after three steps of plain descent, which scales with the loss."""
    config = TrainConfig(steps=3, batch_size=4, channels=(8, 8), warmup=0, clip=0, **options)
    pipe = train(
        config, load("digits"), objective=own, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3)
    )
    return weights_of(pipe)


def weights_of(pipe):
    return torch.cat([parameter.detach().flatten() for parameter in pipe.unet.parameters()])


def test_a_custom_objective_is_trained():
    same = type("Same", (Objective,), {})
    assert torch.equal(descended(same), descended(None))
    start = weights_of(build(TrainConfig(steps=3, channels=(8, 8)), load("digits")))
    once, twice = (descended(own) - start for own in (None, Doubled))
    cosine = torch.nn.functional.cosine_similarity(once, twice, dim=0)
    assert cosine > 0.999
    assert twice.norm() / once.norm() == pytest.approx(2, rel=0.02)


def test_a_custom_objective_may_evaluate_the_network_twice():
    options = {"prediction_type": "flow"}
    consistent, usual = descended(Consistent, **options), descended(None, **options)
    assert torch.isfinite(consistent).all()
    assert not torch.equal(consistent, usual)


@pytest.mark.parametrize(
    ("own", "options", "usual"),
    [
        (Objective, {"prediction_type": "flow"}, "FlowObjective"),
        (FlowObjective, {"prediction_type": "edm"}, "EDMObjective"),
        (Doubled, {"learn_variance": True}, "LearnedVariance"),
        (OwnVariance, {}, "Objective"),  # the network has half of its channels
        (make(), {}, "Objective"),
        ("epsilon", {}, "Objective"),
    ],
)
def test_a_custom_objective_that_does_not_fit_is_refused(own, options, usual):
    with pytest.raises(InvalidArgument, match=f"objective must be a subclass of {usual} for"):
        train(TrainConfig(steps=1, **options), load("digits"), objective=own)
