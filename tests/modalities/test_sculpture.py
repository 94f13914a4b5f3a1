"""Score distillation: its views, its gradient, and whether a volume is read from both sides."""

import pytest
import torch

from minidiff import shipped
from minidiff.cli import main
from minidiff.errors import InvalidArgument
from minidiff.images.pixels import to_uint8
from minidiff.metrics.classifier import features, load_classifier
from minidiff.modalities.sculpture import Likeness, Sculpture, sculpt
from minidiff.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return shipped.load("mnist")


def test_a_turn_by_a_quarter_leads_from_the_front_to_the_side() -> None:
    opacity = torch.rand((9, 9, 9), generator=torch.Generator().manual_seed(0)) * 0.3
    made = Sculpture(opacity)
    front, side = made.views()
    torch.testing.assert_close(made.turned(0)[0], front, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.turned(90)[0], side, rtol=0, atol=1e-5)
    torch.testing.assert_close(made.turned(180)[0], front.flip(-1), rtol=0, atol=1e-5)


def test_a_ray_is_as_bright_as_the_light_that_its_voxels_stop() -> None:
    opacity = torch.zeros(4, 4, 4)
    opacity[1, 2] = torch.tensor([0.5, 0.0, 0.25, 0.0])
    front, side = Sculpture(opacity).views()
    assert front[0, 1, 2].item() == pytest.approx(1 - 2 * 0.5 * 0.75)
    torch.testing.assert_close(side[0, 1], 1 - 2 * (1 - opacity[1, 2]))
    assert (front[0, 0] == -1).all()


def test_the_gradient_is_the_distance_to_what_the_model_makes_of_the_view(pipe: Pipeline) -> None:
    like = Likeness(pipe, torch.tensor([3]), 1.0)
    level = like.scheduler.schedule[500]
    kind, wanted = like.scheduler.config.prediction_type, torch.full((1, 1, 28, 28), 0.25)

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The output of a network whose x̂0 is always `wanted`."""
        from minidiff.prediction import target

        x0 = pipe.space.mode(wanted)
        return target(x0, (x - level.alpha * x0) / level.sigma, level, kind)

    like.denoise = perfect
    view = torch.zeros(1, 1, 28, 28, requires_grad=True)
    like.pull(view, 500 / 999, torch.Generator().manual_seed(0)).backward()
    expected = level.alpha * level.sigma * (0 - wanted)
    torch.testing.assert_close(view.grad, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_seed_gives_the_same_volume_again(pipe: Pipeline) -> None:
    one, same = (sculpt(pipe, 3, "7", steps=2, seed=5, progress=False) for _ in range(2))
    assert torch.equal(one.opacity, same.opacity)
    other = sculpt(pipe, 3, "7", steps=2, seed=6, progress=False)
    assert not torch.equal(one.opacity, other.opacity)


@pytest.mark.slow
def test_a_classifier_of_real_digits_reads_both_sides(pipe: Pipeline) -> None:
    made = sculpt(pipe, 3, 7, progress=False)
    assert features(load_classifier("mnist"), to_uint8(made.views()))[0].tolist() == [3, 7]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"front": "x"}, "class_labels must be one of"),
        ({"side": 10}, "class_labels must be in 0..9"),
        ({"steps": 0}, "steps must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"learning_rate": 0}, "learning_rate must be"),
        ({"opacity_cost": -1}, "opacity_cost must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_input_is_refused_by_name(pipe: Pipeline, options: dict, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        sculpt(pipe, **{"front": 3, "side": 7, "progress": False} | options)


def test_a_model_of_coloured_pictures_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="square grey images with classes"):
        sculpt(shipped.load("digits-text"), 3, 7)


def test_the_command_writes_views_and_an_animation(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sculpt", "--model", "mnist", "--front", "3", "--side", "7", "--steps", "2"]
    assert main([*words, "--gif", "turn.gif"]) == 0
    assert (tmp_path / "views.png").is_file()
    assert (tmp_path / "turn.gif").is_file()
    assert main([*words, "--gif", "turn.png"]) == 2
    assert "--gif must be a .gif file" in capsys.readouterr().err
