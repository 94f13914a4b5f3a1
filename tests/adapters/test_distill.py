"""Consistency distillation: the loss, the teacher inside it, and runs that are interrupted."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from programs import assert_same_training, finished, killed_and_resumed

from minidiff import Pipeline, train
from minidiff.adapters.consistency.config import DistillConfig
from minidiff.adapters.consistency.distill import (
    Consistency,
    Teacher,
    check_teacher,
    distill,
    resume,
)
from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.guidance import METHODS
from minidiff.lab.points import compared
from minidiff.pipeline.denoiser import Guidance
from minidiff.runs import snapshot
from minidiff.runs.folder import open_pipeline
from minidiff.runtime.tensors import read_headers, read_tensor
from minidiff.sample import meaning_of
from minidiff.schedulers import LCMScheduler
from minidiff.schedulers.core.names import sampler
from minidiff.schedulers.lcm import boundary
from minidiff.training.config import TrainConfig
from minidiff.training.learner import Learner

TINY = {"channels": (16, 16), "batch_size": 8, "pictures": 0}
STEPS = 8


@pytest.fixture(scope="module")
def teacher() -> Pipeline:
    return train(TrainConfig(steps=3, **TINY), load("digits"))


def test_way_and_interval_of_guidance_are_those_of_the_teacher(teacher, monkeypatch):
    pipe = Pipeline(
        teacher.unet, teacher.scheduler, teacher.vae, teacher.class_names, 3.0,
        guide="apg", guidance_interval=(0.4, 6.0),
    )  # fmt: skip
    kept = []
    monkeypatch.setattr(Teacher, "forward", lambda self, x, t, labels: kept.append(self) or x)
    fast = distill(DistillConfig(steps=1, batch_size=4, pictures=0), load("digits"), pipe)
    (inside,) = kept
    assert (inside.scale, inside.interval, inside.guide) == (3.0, (0.4, 6.0), METHODS["apg"])
    assert (fast.guidance_scale, fast.guidance_interval, fast.guide) == (1.0, None, "cfg")


@pytest.fixture(scope="module")
def teacher_folder(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    teacher.save_pretrained(folder)
    return folder


def begun(teacher: Pipeline, done: float = 0.0, **options: object) -> Consistency:
    """Return the objective of a run after a fraction of its budget."""
    config = replace(DistillConfig(steps=4), **options)
    objective = config.objective(Consistency, teacher.scheduler)
    budget = SimpleNamespace(fraction_done=done, step=0)
    kept = lambda extra, network: extra.attach(network)  # noqa: E731
    learner = Learner.of(teacher)
    training = SimpleNamespace(
        config=config, learner=learner, budget=budget, planned=(), keep=kept, device="cpu"
    )
    objective.begin(training, teacher)
    return objective


def inputs(objective: Consistency, n: int = 6) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, 4, 8, 8, generator=generator) for _ in range(2))
    levels = objective.levels((torch.arange(n).numpy() + 0.5) / n).on(x0)
    return x0, eps, levels, torch.arange(n) % 10


def recorded(objective: Consistency) -> tuple[torch.Tensor, list]:
    """Return the loss of a batch, and what each network received: (model, x, t)."""
    x0, eps, levels, labels = inputs(objective)
    calls = []

    def network(x, t, model=objective.training.learner):
        calls.append((model, x, t))
        return model(x, t, labels)

    return objective.loss(network, x0, eps, levels), calls


# --- the loss -----------------------------------------------------------------------------------


def test_at_the_clean_end_a_consistency_function_is_the_identity():
    assert boundary(0.0) == (1.0, 0.0)
    c_skip, c_out = boundary(torch.tensor([0.0, 1e4]))
    assert c_skip[0] == 1
    assert c_out[1] == pytest.approx(1)


@pytest.mark.parametrize("scale", [1.0, 1.75])
def test_the_neighbour_of_a_point_is_a_ddim_step_of_the_guided_teacher(teacher, scale):
    objective = begun(teacher, teacher_guidance=scale)
    _, calls = recorded(objective)
    (guide, x, t), (target, neighbour, before) = calls[:2]
    assert isinstance(guide, Teacher)
    assert target is objective.target_network
    labels, pipe = torch.arange(6) % 10, teacher
    for i in range(6):
        if t[i] < 250:
            continue  # its neighbour is clean
        scheduler = sampler("ddim", pipe.scheduler)
        scheduler.set_timesteps(timesteps=[int(t[i]), int(before[i])])
        denoise = pipe.denoiser(labels[i : i + 1], Guidance(scale))
        out = denoise(x[i : i + 1], float(t[i]))
        wanted, _ = scheduler.step(out, float(t[i]), x[i : i + 1], return_dict=False)
        torch.testing.assert_close(neighbour[i : i + 1], wanted, rtol=1e-4, atol=2e-5)


def test_without_a_teacher_the_neighbour_has_the_same_image_and_noise(teacher):
    objective = begun(teacher, method="training")
    x0, eps, levels, _ = inputs(objective)
    _, calls = recorded(objective)
    (target, neighbour, before), (_, x, _) = calls
    assert target is objective.target_network
    schedule = teacher.scheduler.schedule
    for i in range(6):
        level = schedule[int(before[i])]
        torch.testing.assert_close(neighbour[i], level.alpha * x0[i] + level.sigma * eps[i])
        torch.testing.assert_close(x[i], levels.alpha[i] * x0[i] + levels.sigma[i] * eps[i])


def test_with_one_interval_the_target_is_what_the_teacher_predicts(teacher):
    """So the teacher itself has no loss there, but for the distance c_skip·x from x̂0."""
    objective = begun(teacher, intervals=(1,), num_inference_steps=1, teacher_guidance=1.0)
    loss, _ = recorded(objective)
    assert loss.abs().max() < 1e-4
    guided, _ = recorded(
        begun(teacher, intervals=(1,), num_inference_steps=1, teacher_guidance=4.0)
    )
    assert guided.min() > 1e-4


def test_the_error_is_measured_in_the_pseudo_huber_metric(teacher):
    objective = begun(teacher, intervals=(1,), num_inference_steps=1, method="training")
    x0, eps, levels, _ = inputs(objective)
    level = teacher.scheduler.schedule[999]
    # v of an image that is wrong by `gap` everywhere
    for gap in (0.0, 1e-4, 0.3):
        wrong = x0 + gap
        rest = (level.alpha * x0 + level.sigma * eps - level.alpha * wrong) / level.sigma
        out = teacher.scheduler.target(wrong, rest, level)
        loss = objective.loss(lambda x, t, model=None, out=out: out, x0, eps, levels)
        d = 4 * 8 * 8
        c = 0.00054 * math.sqrt(d)
        wanted = math.sqrt(gap**2 * d + c**2) - c
        torch.testing.assert_close(loss, torch.full((6,), wanted), rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(("done", "n"), [(0.0, 4), (0.3, 8), (0.6, 16), (0.99, 32), (1.2, 32)])
def test_the_intervals_become_finer_in_equal_parts_of_the_run(teacher, done, n):
    objective = begun(teacher, done)
    assert objective.intervals == n
    _, t = objective._levels((torch.arange(n).numpy() + 0.5) / n)
    assert t.tolist() == [round((i + 1) * 1000 / n) - 1 for i in range(n)]
    _, calls = recorded(objective)
    (_, _, t), (_, _, before) = calls[:2]
    ends = {round(i * 1000 / n) - 1 for i in range(n + 1)} | {0}
    assert set(before.int().tolist()) <= ends
    assert bool((t - before <= 1000 / n + 1).all())


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_sampling_visits_steps_that_were_trained_last(n):
    trained = {round((i + 1) * 1000 / 32) - 1 for i in range(32)}
    scheduler = LCMScheduler(original_inference_steps=DistillConfig(steps=1).points)
    scheduler.set_timesteps(n)
    assert scheduler.grid[0] == 999
    assert set(scheduler.grid) <= trained


# --- the teacher --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("interval", [None, (0.4, 6.0)])
def test_the_teacher_inside_equals_the_guided_pipeline_step_by_step(teacher, way, interval):
    pipe = Pipeline(
        teacher.unet, teacher.scheduler, teacher.vae, teacher.class_names, 3.0,
        guide=way, guidance_interval=interval,
    )  # fmt: skip
    objective = begun(pipe, guide=way, guidance_interval=interval)
    x, labels = torch.randn(5, 4, 8, 8), torch.arange(5)
    t = torch.tensor([50.0, 249.0, 499.0, 749.0, 999.0])
    out = objective.teacher(x, t, labels)
    pipe.scheduler.set_timesteps(1000)
    meaning = meaning_of(pipe.scheduler)
    guidance = Guidance(3.0, lambda pair, w: METHODS[way](pair, w, meaning), interval)
    for i in range(5):
        denoise = pipe.denoiser(labels[i : i + 1], guidance)
        wanted = denoise(x[i : i + 1], float(t[i]))
        torch.testing.assert_close(out[i : i + 1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: LCMScheduler(prediction_type="v_prediction"), "it is distilled already"),
        (lambda p: sampler("euler", flow()), "it is a model of flow"),
        (lambda p: edm(), "it is a model of edm"),
        (lambda p: learned(), "must not learn variances"),
    ],
)
def test_a_teacher_that_cannot_be_distilled_is_refused_by_name(teacher, change, message):
    pipe = Pipeline(teacher.unet, change(teacher), teacher.vae, teacher.class_names)
    with pytest.raises(InvalidArgument, match=message):
        check_teacher(pipe)


def flow():
    return TrainConfig(steps=1, prediction_type="flow").objective().scheduler


def edm():
    config = TrainConfig(steps=1, prediction_type="edm", sigma_data=0.5)
    return config.objective().scheduler


def learned():
    return TrainConfig(steps=1, learn_variance=True).objective().scheduler


def test_an_autoguided_teacher_is_refused(teacher):
    pipe = Pipeline(
        teacher.unet, teacher.scheduler, teacher.vae, teacher.class_names,
        weaker=teacher.unet, autoguidance_scale=2.0,
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match=r"must have autoguidance_scale 1.*got 2"):
        check_teacher(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intervals": (0,)}, "intervals must be"),
        ({"intervals": ()}, "intervals"),
        ({"intervals": (8, 4)}, "intervals must be in rising order"),
        ({"intervals": (2000,)}, "intervals must be in 1..1000, got 2000"),
        ({"num_inference_steps": 41}, "num_inference_steps must be in 1..40, got 41"),
        ({"target_average": 1.0}, "target_average must be in"),
        ({"method": "magic"}, "method must be one of distillation, training"),
        ({"teacher_guidance": math.nan}, "teacher_guidance"),
        ({"sampler": "ddim"}, "sampler must be None for a distillation"),
        ({"stable_target": 8}, "stable_target must be 0 for a distillation"),
        ({"loss_weight": "min_snr"}, "loss_weight must be 'none' for a distillation"),
        ({"cuda_graph": True}, "cuda_graph must be False for a distillation"),
    ],
)
def test_an_option_that_is_not_allowed_is_refused(options, message):
    with pytest.raises(InvalidArgument, match=message):
        DistillConfig(steps=1, **options)


def test_guidance_of_a_teacher_without_its_use_is_refused(teacher):
    config = DistillConfig(steps=1, method="training", teacher_guidance=2.0)
    with pytest.raises(InvalidArgument, match="teacher_guidance is for method 'distillation'"):
        distill(config, load("digits"), teacher)
    points = train(TrainConfig(steps=1, channels=(8,), block=1, pictures=0,
                               guidance_scale=1.0, label_dropout=0.0), load("moons"))  # fmt: skip
    with pytest.raises(InvalidArgument, match="guidance_scale"):
        distill(DistillConfig(steps=1, teacher_guidance=2.0), load("moons"), points)


# --- runs ---------------------------------------------------------------------------------------


def call(teacher_folder: Path, out: Path) -> list[str]:
    return ["distill", str(teacher_folder), "--data", "digits", "--steps", str(STEPS),
            "--batch-size", "8", "--intervals", "2,4", "--pictures", "0", "--save-every", "1",
            "--keep-last", "9", "--target-average", "0.75", "--out", str(out)]  # fmt: skip


@pytest.fixture(scope="module")
def whole(teacher_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert finished(call(teacher_folder, folder / "run"), folder / "printed") == 0, (
        folder / "printed"
    ).read_text()
    return folder / "run"


def test_a_distillation_killed_at_random_moments_ends_bit_for_bit_as_one_never_killed(
    teacher_folder, whole, tmp_path
):
    out = tmp_path / "run"
    killed_and_resumed(2, 1, call(teacher_folder, out), out, tmp_path / "printed", STEPS)
    assert_same_training(whole, out)
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (out / weights).read_bytes()


def test_the_target_network_is_the_running_average_of_the_network(whole):
    def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
        return {
            k: read_tensor(e) for k, e in read_headers([folder / f"{name}.safetensors"]).items()
        }

    folders = snapshot.snapshots(whole)
    assert len(folders) == STEPS
    for before, now in pairwise(folders):
        network, average = weights(before, "weights"), weights(before, "target")
        for name, target in weights(now, "target").items():
            wanted = 0.75 * average[name] + 0.25 * network[name]
            torch.testing.assert_close(target, wanted, rtol=1e-6, atol=1e-7)


def test_the_folder_samples_in_few_steps_and_refuses_too_many(whole):
    pipe = open_pipeline(whole)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert (pipe.guidance_scale, pipe.num_inference_steps) == (1.0, 2)
    assert pipe.scheduler.config.original_inference_steps == 4
    evaluations = []
    pipe.wraps.append(lambda denoise: lambda x, t: evaluations.append(t) or denoise(x, t))
    pipe(class_labels=7, num_images=1, seed=0)
    assert evaluations == [999, 499]
    with pytest.raises(InvalidArgument, match="num_inference_steps must be at most 4"):
        pipe(class_labels=7, num_images=1, num_inference_steps=5)


def test_diffusers_reads_the_parts_and_draws_the_same(whole):
    ours, folder = open_pipeline(whole), whole / "model"
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    scheduler = diffusers.LCMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1)
    noise, labels = torch.randn(3, 4, 8, 8), torch.tensor([3, 7, 1])
    with torch.no_grad():
        out = unet(noise, scheduler.timesteps[0], labels).sample
    theirs = scheduler.step(out, scheduler.timesteps[0], noise).denoised
    drawn = ours(
        class_labels=labels, latents=noise, num_inference_steps=1, output_type="latent", seed=0
    ).images
    torch.testing.assert_close(drawn, theirs, rtol=1e-4, atol=1e-4)


def test_the_card_of_a_run_repeats_its_command(whole):
    card = (whole / "model" / "README.md").read_text()
    assert "minidiff distill --data digits INIT --config train.json --out RUN" in card
    assert '"intervals": [\n    2,\n    4\n  ]' in card


def test_a_run_cannot_be_resumed_with_another_teacher(whole, teacher):
    other = train(TrainConfig(steps=1, seed=1, **TINY), load("digits"))
    with pytest.raises(CheckpointError, match="the weights of its start have changed"):
        resume(whole, load("digits"), other)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("distill", "give a model to distill"),
        ("distill mnist --steps 1 --out OUT", "--data-dir FOLDER"),
        ("distill TEACHER --data digits --out OUT", "give --minutes or --steps"),
        ("distill TEACHER --data digits --steps 1", "--out FOLDER"),
        ("distill TEACHER --data digits --steps 1 --sampling-steps 50 --out OUT", "in 1..40"),
        ("distill RUN --data digits --steps 1 --out OUT", "it is distilled already"),
    ],
)
def test_a_wrong_call_is_one_line(
    line, message, teacher_folder, whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)
    places = {"TEACHER": teacher_folder, "RUN": whole, "OUT": tmp_path / "out"}
    assert main([str(places.get(word, word)) for word in line.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["distillation", "training"])
def test_a_distilled_model_of_points_draws_better_in_two_steps_than_its_teacher(method):
    data = load("ring")
    config = TrainConfig(steps=1500, batch_size=512, learning_rate=1e-2, channels=(64,), layers=2,
                         block=1, guidance_scale=1.0, pictures=0)  # fmt: skip
    teacher = train(config, data)
    config = DistillConfig(
        steps=1200, batch_size=512, learning_rate=1e-3, method=method, pictures=0
    )
    fast = distill(config, data, teacher)

    def distance(pipe: Pipeline) -> float:
        points = pipe(num_images=4000, num_inference_steps=2, seed=0, output_type="pt").images
        return compared(points, "ring")["samples"].energy_distance

    assert distance(fast) < 0.5 * distance(teacher)
