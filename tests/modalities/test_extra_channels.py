"""Networks with an image beside x: what they are given, their training, and their sampling."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from minidiff import TrainConfig, train
from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.images.pixels import to_float
from minidiff.modalities.extra_channels import TaskTraining, shrunk, task_of, upscale, with_task

CONFIG = TrainConfig(
    steps=2, batch_size=2, channels=(8, 8), block=1, pictures=0, num_inference_steps=2
)


def images(n: int = 4) -> torch.Tensor:
    return load("digits").batch(torch.arange(n))[0]


def test_a_hole_is_a_rectangle_that_depends_on_the_position_alone() -> None:
    task, x = task_of("inpaint"), images(6)
    made = task.make(x, 10)
    assert torch.equal(task.make(x[2:], 12), made[2:])
    hole, kept = made[:, :1], made[:, 1:]
    assert torch.equal(kept, (x / 2 + 0.5) * (1 - hole))
    for mask in hole[:, 0].bool():
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
        assert 4 <= rows.sum() <= 16
        assert 4 <= columns.sum() <= 16
    assert len({mask.numpy().tobytes() for mask in hole}) > 1


def test_a_small_image_is_the_mean_of_blocks_and_noise_below_a_tenth() -> None:
    task, x = task_of("upscale:4"), images()
    made = 2 * task.make(x, 3) - 1
    assert made.shape == (4, 1, 4, 4)
    assert torch.equal(2 * task.make(x[1:], 4) - 1, made[1:])
    error = made - shrunk(x, 4)
    assert 0 < error.abs().mean() < 0.1


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("name", "data"), [("inpaint", "digits"), ("upscale:2", "captions")])
def test_a_network_of_a_task_trains_and_draws(name: str, data: str, block: int) -> None:
    items = with_task(load(data), name)
    config = replace(CONFIG, block=block, text_layers=1, text_width=8)
    pipe = train(config, items, learner=TaskTraining(name), progress=False)
    x = load(data).batch(torch.arange(2))[0]
    call = {"seed": 0, "output_type": "pt", "progress": False}
    if name == "inpaint":
        hole = torch.zeros(1, 16, 16)
        hole[..., 8:] = 1
        drawn = pipe(image=x, mask_image=hole, **call).images
        assert torch.equal(drawn[..., :8], x[..., :8])
        return
    drawn = upscale(pipe, shrunk(x, 2), prompt=["a red 7", "a 3"], **call).images
    assert drawn.shape == x.shape
    alone = upscale(pipe, shrunk(x, 2), prompt=["a red 7", "a 3"], batch_size=1, **call).images
    assert (alone - drawn).abs().max() < 1e-5
    other = upscale(pipe, -shrunk(x, 2), prompt=["a red 7", "a 3"], **call).images
    assert (other - drawn).abs().max() > 1e-4


def test_data_carry_the_small_image_as_bytes() -> None:
    data = with_task(load("digits"), "upscale:2")
    x, labels = data.batch(torch.arange(3), 5)
    small = to_float(labels.unflatten(1, (1, 8, 8)))
    assert (small - shrunk(x, 2)).abs().mean() < 0.1


@pytest.mark.parametrize("name", ["upscale", "upscale:1", "upscale:x", "hole", "upscale:65"])
def test_an_unknown_task_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"task must be inpaint, or upscale:N with N"):
        with_task(load("digits"), name)


def test_sides_and_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"task must divide the images' sides \(16, 16\)"):
        with_task(load("digits"), "upscale:3")
    with pytest.raises(InvalidArgument, match="data must be images for task inpaint"):
        with_task(load("ring"), "inpaint")
    pipe = train(CONFIG, with_task(load("digits"), "upscale:4"), learner=TaskTraining("upscale:4"))
    for small, message in (
        (torch.zeros(1, 1, 5, 5), r"a whole number of times smaller than \(16, 16\)"),
        (torch.zeros(1, 1, 16, 16), "whole number of times smaller"),
        (torch.zeros(1, 3, 4, 4), "image must have 1 channels"),
        (torch.full((1, 1, 4, 4), 2.0), "image of floats"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            upscale(pipe, small)
    with pytest.raises(InvalidArgument, match="noise must be in"):
        upscale(pipe, torch.zeros(1, 1, 4, 4), noise=float("nan"))
    plain = train(CONFIG, load("digits"), progress=False)
    with pytest.raises(InvalidArgument, match="pipe must be of a network of the task upscale"):
        upscale(plain, torch.zeros(1, 1, 4, 4))


def test_the_command_line_trains_and_uses_both_tasks(tmp_path, capsys) -> None:
    size = ["--steps", "1", "--batch-size", "2", "--channels", "8,8", "--sampling-steps", "1"]
    picture = ["--num", "1", "--png", str(tmp_path / "out.png")]
    for name, side, more in (
        ("upscale:4", 4, []),
        ("inpaint", 16, ["--mask", str(tmp_path / "16.png")]),
    ):
        run, file = str(tmp_path / name.partition(":")[0]), str(tmp_path / f"{side}.png")
        Image.new("L", (side, side), 255).save(file)
        assert main(["train", "--data", "digits", "--task", name, "--out", run, *size]) == 0
        assert f"minidiff sample {run} --image" in capsys.readouterr().out
        assert main(["sample", run, "--image", file, *more, *picture]) == 0
        assert Image.open(tmp_path / "out.png").size == (16, 16)
        assert main(["sample", run, *picture]) == 2
        assert "must be given" in capsys.readouterr().err
        assert main(["train", "--resume", run, "--steps", "+1"]) == 0
    for flags, message in (
        (["--task", "upscale"], "task must be inpaint, or upscale:N"),
        (["--task", "upscale:3"], "task must divide the images' sides (16, 16)"),
        (["--task", "inpaint", "--init", "mnist"], "leave out --init beside --task"),
        (["--task", "inpaint", "--pictures", "2"], "pictures must be 0 for digits"),
    ):
        out = str(tmp_path / "no")
        assert main(["train", "--data", "digits", "--out", out, *size, *flags]) == 2
        assert message in capsys.readouterr().err
