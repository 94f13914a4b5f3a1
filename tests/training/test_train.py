"""Training: determinism, budget, batches, options, and refusals."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minidiff.data import ImageData, Stream, load
from minidiff.errors import CheckpointError, InvalidArgument, TrainingError
from minidiff.runtime.distributed import World
from minidiff.runtime.files import read_options
from minidiff.text.conditioning import ClassLabels
from minidiff.training.autoencoder import train_vae
from minidiff.training.build import check
from minidiff.training.config import TrainConfig, VAEConfig, merged, options_of
from minidiff.training.diffusion import Batches, DiffusionTraining, train
from minidiff.training.learner import Learner
from minidiff.training.presets import PRESETS
from minidiff.training.progress import batch_size

TINY = {"channels": (8, 8), "batch_size": 8, "pictures": 0}


def test_a_run_repeats_bit_for_bit():
    data = load("digits")
    config = TrainConfig(steps=3, channels=(8, 8), batch_size=8, pictures=0)
    first, second = (train(config, data).unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(TrainConfig(**{**vars(config), "seed": 1}), data).unet.state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_pictures_and_log_rows_are_evenly_spaced_over_the_budget(tmp_path):
    rows, pictures = [], []
    config = TrainConfig(steps=10, channels=(8, 8), batch_size=4, pictures=5)
    train(
        config,
        load("digits"),
        on_log_row=rows.append,
        picture=lambda p, step: pictures.append(step),
    )
    assert pictures == [2, 4, 6, 8]  # the fifth is the result
    assert rows[-1].step == 10
    assert rows[-1].images == 40
    assert rows[-1].learning_rate == 0


def test_a_budget_in_minutes_ends_in_time_with_a_rate_of_zero():
    rows = []
    config = TrainConfig(minutes=0.05, channels=(8, 8), batch_size=4, pictures=0)
    train(config, load("digits"), on_log_row=rows.append)
    assert 3 <= rows[-1].seconds < 10
    assert rows[-1].learning_rate == 0


TEN = tuple("0123456789")


def batches_of(config, data):
    learner = Learner(torch.nn.Identity(), ClassLabels(data.num_classes))
    objective = config.objective()
    part = World().part
    return Batches(config, data, learner, objective, lambda x0: x0, part, torch.device("cpu"))


def test_the_fraction_of_hidden_labels_is_label_dropout():
    labels = torch.arange(10).repeat(10_000)
    data = ImageData("grey", torch.zeros(100_000, 1, 2, 2, dtype=torch.uint8), labels, TEN)
    config = TrainConfig(steps=1, label_dropout=0.1)
    found = batches_of(config, data).take(0, len(labels)).labels
    expected = labels[Stream(len(data), config.seed).take(len(labels))]
    hidden = found == 10
    assert float(hidden.double().mean()) == pytest.approx(0.1, abs=4 * (0.09 / 1e5) ** 0.5)
    assert torch.equal(found[~hidden], expected[~hidden])


def test_the_noise_of_a_step_depends_on_the_seed_and_the_step_alone():
    data, config = load("digits"), TrainConfig(steps=1)
    first, second = batches_of(config, data), batches_of(config, data)
    second.take(0, 7)
    one, other = first.take(3, 8), second.take(3, 8)
    assert torch.equal(one.eps, other.eps)
    assert (one.levels.t == other.levels.t).all()
    assert not torch.equal(one.z, other.z)  # the images go on
    assert not torch.equal(one.eps, first.take(4, 8).eps)


def test_a_loss_that_is_not_finite_stops_the_run():
    config = TrainConfig(steps=50, channels=(8, 8), batch_size=4, pictures=0, learning_rate=1e30)
    with pytest.raises(
        TrainingError, match=r"the loss is .* is not finite at step \d+\. Likely: a learning rate"
    ):
        train(config, load("digits"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("digits", "'digits'"),
        ([1], "list"),
        ({"a": 1}, "dict"),
        (torch.zeros(4, 1, 8), "Tensor"),
    ],
)
def test_training_on_anything_but_a_data_set_is_refused(given, named):
    message = f"data must be a data set, such as .*load.* returns, got {named}"
    with pytest.raises(InvalidArgument, match=message):
        train(TrainConfig(steps=1), given)
    with pytest.raises(InvalidArgument, match=message):
        train_vae(VAEConfig(steps=1), given)


def test_a_config_and_data_in_the_wrong_order_are_refused():
    with pytest.raises(InvalidArgument, match=r"data must be a data set, .* got TrainConfig"):
        train(load("digits"), TrainConfig(steps=1))
    with pytest.raises(InvalidArgument, match="config must be of type TrainConfig, got dict"):
        train({"steps": 1}, load("digits"))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("optimizer", "adam", "optimizer must be a function, got 'adam'"),
        ("learner", 5, "learner must be a function, got 5"),
        ("on_log_row", 5, "on_log_row must be a function, got 5"),
        ("picture", 5, "picture must be a function, got 5"),
        ("resume", "run", "resume must be a function, got 'run'"),
        ("after_step", 5, "after_step must be a function, got 5"),
        ("start", "mnist", "start must be of type Pipeline, got 'mnist'"),
        ("start", 5, "start must be of type Pipeline, got 5"),
        ("world", 5, "world must be of type World, got 5"),
        ("progress", "x", "progress must be True or False, got 'x'"),
    ],
)
def test_an_argument_of_another_type_is_refused(name, given, message):
    with pytest.raises(InvalidArgument, match=message):
        train(TrainConfig(steps=1, **TINY), load("digits"), **{name: given})


@pytest.mark.parametrize(("size", "levels"), [(1, 2), (2, 3), (8, 5), (9, 6)])
def test_images_that_the_levels_of_a_network_cannot_halve_are_refused(size, levels):
    """Every level but the last halves a side, rounded up; a side of one pixel stays as it is."""
    data = ImageData("small", torch.zeros(4, 1, size, 2 * size, dtype=torch.uint8), None, ())
    config = TrainConfig(steps=1, block=1, channels=(8,) * levels)
    with pytest.raises(InvalidArgument, match=f"channels must have few .* halve {size}×{2 * size}"):
        check(config, data)
    check(TrainConfig(steps=1, block=1, channels=(8,) * (levels - 1)), data)


def test_training_does_not_touch_the_callers_random_state():
    torch.manual_seed(1234)  # not a state that a run leaves behind
    state = torch.random.get_rng_state()
    train(TrainConfig(steps=1, channels=(8, 8), batch_size=4, pictures=0), load("digits"))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either minutes or steps"),
        ({"steps": 1, "minutes": 1}, "either minutes or steps"),
        ({"steps": 0}, r"steps must be in 1\.\.1000000000000, got 0"),
        ({"steps": 10**400}, r"steps must be in 1\.\.1000000000000"),
        ({"minutes": float("nan")}, "minutes"),
        ({"minutes": float("inf")}, "minutes"),
        ({"steps": 1, "batch_size": 0}, "batch_size"),
        ({"steps": 1, "learning_rate": -1}, "learning_rate"),
        ({"steps": 1, "label_dropout": 1.5}, "label_dropout"),
        ({"steps": 1, "ema_half_life": 1}, "ema_half_life"),
        ({"steps": 1, "prediction_type": "noise"}, "prediction_type must be one of epsilon"),
        ({"steps": 1, "dtype": "half"}, "dtype must be one of float32, bfloat16"),
        ({"steps": 1, "batch_size": 10**15}, "batch_size must be in 1..65536"),
        ({"steps": 1, "num_inference_steps": 1001}, "num_inference_steps must be in 1..1000"),
        ({"steps": 1, "seed": 2**32}, "seed"),
        ({"steps": 1, "accumulate": 33}, "accumulate must be at most batch_size, 32, got 33"),
        ({"steps": 1, "final_batch_size": 31}, "final_batch_size must be in 32..65536"),
        ({"steps": 1, "compile": 1}, "compile must be True or False"),
        ({"steps": 1, "cuda_graph": 1}, "cuda_graph must be True or False"),
        (
            {"steps": 1, "cuda_graph": True, "compile": True},
            "compile must be False with cuda_graph",
        ),
        ({"steps": 1, "cuda_graph": True, "accumulate": 2}, "accumulate must be 1 with cuda_graph"),
        ({"steps": 1, "clip": -1}, "clip"),
        ({"steps": 1, "dropout": 1}, "dropout"),
        ({"steps": 1, "skip_nonfinite": -1}, "skip_nonfinite"),
        ({"steps": 1, "num_train_timesteps": 0}, "num_train_timesteps"),
        ({"steps": 1, "beta_schedule": "x"}, "beta_schedule must be one of linear, scaled"),
        ({"steps": 1, "channels": ()}, "channels"),
        ({"steps": 1, "channels": 48}, "channels"),
        ({"steps": 1, "channels": (8, 0)}, "channels"),
    ],
)
def test_a_bad_option_is_refused_when_the_config_is_built(options, message):
    with pytest.raises(InvalidArgument, match=message):
        TrainConfig(**options)


def test_the_average_is_a_deep_copy_so_the_live_weights_stay():
    from minidiff.training.optim import EMA

    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    average = EMA(model, 0.05)
    average.update(model)
    with torch.no_grad():
        average.model.weight.zero_()
    assert torch.equal(model.weight, before["weight"])


def test_without_hidden_labels_there_is_no_label_for_no_class_and_no_guidance():
    """A label that never occurs in training would guide by random weights."""
    config = TrainConfig(steps=1, channels=(8, 8), batch_size=4, pictures=0, label_dropout=0)
    pipe = train(config, load("digits"))
    assert pipe.unet.config.num_class_embeds == 10
    assert pipe.guidance_scale == 1
    with pytest.raises(InvalidArgument, match="no class"):
        pipe(guidance_scale=2)


def test_data_without_images_are_refused():
    empty = ImageData("none", torch.zeros(0, 1, 8, 8, dtype=torch.uint8), None, ())
    with pytest.raises(InvalidArgument, match="data none must hold at least one image"):
        train(TrainConfig(steps=1), empty)


# --- how a step is taken ---------------------------------------------------------------------


def weights(config, **options):
    unet = train(config, load("digits"), **options).unet
    return torch.cat([parameter.flatten() for parameter in unet.parameters()])


def test_a_batch_in_parts_is_the_batch():
    """Equal to rounding by plain gradient descent; Adam divides a small gradient by its size."""
    whole, parts = (
        weights(TrainConfig(steps=3, accumulate=n, **TINY), optimizer=descent) for n in (1, 3)
    )
    assert torch.allclose(whole, parts, atol=1e-6)


@pytest.mark.slow  # minutes of a compiler
def test_a_compiled_network_takes_the_same_steps():
    plain, compiled = (
        weights(TrainConfig(steps=3, compile=choice, **TINY), optimizer=descent)
        for choice in (False, True)
    )
    assert torch.allclose(plain, compiled, atol=1e-6)


@pytest.mark.slow  # starts a compiler
def test_a_machine_without_a_compiler_is_named_before_the_first_step(tmp_path):
    command = (
        "-m minidiff train --data digits --steps 1 --channels 8,8 --device cpu --compile --out"
    )
    run = subprocess.run(
        [sys.executable, *command.split(), tmp_path / "run"],
        env=os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.returncode == 2
    assert "minidiff: compile must be False on this machine" in run.stderr.splitlines()[-1]


def descent(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def test_a_custom_optimizer_keeps_its_peak_rates_and_follows_the_schedule():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    def make(parameters):
        first, *others = parameters
        return Watched([{"params": [first], "lr": 0.3}, {"params": others}], lr=0.1)

    train(TrainConfig(steps=4, warmup=0, **TINY), load("digits"), optimizer=make)
    assert seen == [pytest.approx([0.3 * factor, 0.1 * factor]) for factor in (1, 0.75, 0.5, 0.25)]


def test_the_gradient_is_clipped_to_the_given_norm():
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.cat(grads).norm()))

    for clip, fits in ((0.01, lambda norm: norm == pytest.approx(0.01, rel=1e-3)),
                       (0, lambda norm: norm > 0.1)):  # fmt: skip
        config = TrainConfig(steps=2, clip=clip, **TINY)
        train(config, load("digits"), optimizer=lambda p: Watched(p, lr=0.1))
        assert all(map(fits, norms))
        norms.clear()


class Readings(TorchDispatchMode):
    """Counts the operations that make the host wait for a number of the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal"):
            self.found.append(function)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"prediction_type": "edm", "sigma_data": 0.6, "accumulate": 2, "shift": 1},
     {"prediction_type": "flow", "dtype": "bfloat16"}, {"learn_variance": True},
     {"stable_target": 32}],
)  # fmt: skip
def test_a_step_reads_no_number_back_from_the_device(monkeypatch, options):
    monkeypatch.setattr("minidiff.runtime.shapes.readable", lambda x: False)  # as on a GPU
    config = TrainConfig(steps=10, **TINY | options)
    training = DiffusionTraining(config, load("digits"), torch.device("cpu"))
    training.guard.checks_every_step = (
        False  # as on a GPU; the CPU may look, it has nothing to wait for
    )
    training.step()
    with Readings() as readings:
        training.step()
    assert readings.found == []
    training.guard.checks_every_step = True
    with Readings() as readings:
        training.step()
    assert len(readings.found) == 2  # loss and norm: the counter counts


def test_the_batch_grows_with_the_run():
    config = TrainConfig(steps=6, **TINY | {"batch_size": 4, "final_batch_size": 12})
    assert [batch_size(config, i / 6) for i in range(7)] == [4, 4, 8, 8, 12, 12, 12]
    rows = []
    train(config, load("digits"), on_log_row=rows.append)
    assert rows[-1].images == 48


@pytest.mark.filterwarnings("ignore:sample must be finite")
def test_a_few_steps_that_are_not_finite_are_skipped_and_logged():
    data = load("digits")

    class Broken(ImageData):
        calls = 0

        def to(self, device):
            return self

        def batch(self, index, position=0):
            images, labels = super().batch(index)
            Broken.calls += 1  # the first is that of the check of constant data
            return (images * float("nan") if Broken.calls in (3, 5) else images), labels

    broken = Broken(data.name, data.images, data.labels, data.class_names)
    rows = []
    pipe = train(TrainConfig(steps=6, skip_nonfinite=2, **TINY), broken, on_log_row=rows.append)
    assert [step for row in rows for step in row.skipped] == [1, 3]
    assert all(torch.isfinite(p).all() for p in pipe.unet.parameters())
    Broken.calls = 0
    with pytest.raises(TrainingError, match="not finite at step 3 after 1 steps were skipped"):
        train(TrainConfig(steps=6, skip_nonfinite=1, **TINY), broken)


@pytest.mark.parametrize("name", ["digits", "captions"])
def test_a_fresh_network_outputs_zero_and_soon_every_layer_is_trained(name):
    config = TrainConfig(steps=4, **TINY)
    training = DiffusionTraining(config, load(name), torch.device("cpu"))
    batch = training.batches.take(0, 8)
    with torch.no_grad():
        assert not training.learner(batch.z, torch.arange(8.0), batch.labels).any()
    before = {key: p.clone() for key, p in training.learner.named_parameters()}
    training.budget.start()
    for _ in range(4):
        training.step()
    for key, parameter in training.learner.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[key]), key


def test_dropout_repeats_and_leaves_the_callers_random_state():
    config = TrainConfig(steps=4, dropout=0.5, **TINY)  # at first all that it drops meets zeros
    state = torch.random.get_rng_state()
    first, second = weights(config), weights(config)
    assert torch.equal(first, second)
    assert not torch.equal(first, weights(TrainConfig(steps=4, **TINY)))
    assert torch.equal(state, torch.random.get_rng_state())


# --- options in layers -----------------------------------------------------------------------


def test_a_later_layer_wins_and_a_budget_replaces_the_other_kind(tmp_path):
    preset = options_of(PRESETS["mnist"].train)
    assert merged(preset) == PRESETS["mnist"].train
    (tmp_path / "mine.json").write_text('{"steps": 5, "channels": [8, 16], "seed": 3}')
    (tmp_path / "mine.toml").write_text("steps = 5\nchannels = [8, 16]\nseed = 3\n")
    for name in ("mine.json", "mine.toml"):
        config = merged(preset, read_options(tmp_path / name), {"seed": 4})
        assert (config.minutes, config.steps, config.seed, config.channels) == (None, 5, 4, (8, 16))
        assert config.learning_rate == PRESETS["mnist"].train.learning_rate


def test_a_runs_own_config_is_a_config(run_folder):
    config = merged(read_options(run_folder / "config.json"))
    assert config.steps == 120
    assert json.loads((run_folder / "config.json").read_text())["train"]["channels"] == [24, 32]


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.yaml", "", InvalidArgument, "must be a .json or .toml file"),
        ("a.json", "{", CheckpointError, "not valid JSON"),
        ("a.json", "[1]", CheckpointError, "expected a JSON object, got list"),
        ("a.toml", "steps", CheckpointError, "not valid TOML"),
        ("a.json", '{"stepz": 3}', InvalidArgument, "option must be one of minutes, steps"),
        ("a.json", '{"steps": "3"}', InvalidArgument, "steps must be a whole number"),
        ("a.json", '{"steps": 3, "channels": "8"}', InvalidArgument, "channels must be a list"),
        ("none.json", None, CheckpointError, "no such file"),
    ],
)
def test_a_bad_config_file_is_refused_in_one_line(tmp_path, name, text, error, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        merged(read_options(tmp_path / name))


def test_every_preset_gives_its_reasons_and_builds():
    for preset in PRESETS.values():
        assert len(preset.why) > 40
        config = merged(options_of(preset.train), {"sigma_data": 0.5} if
                        preset.train.measures_data else {})  # fmt: skip
        assert config.objective().scheduler.config.compat == "exact"
