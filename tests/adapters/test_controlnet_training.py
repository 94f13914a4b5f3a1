"""Training of ControlNets: the base stays, runs resume bit for bit, and controls fit images."""

import pytest
import torch

from minidiff import Pipeline, TrainConfig, shipped, train
from minidiff.adapters import ControlNetTraining
from minidiff.adapters.controls import PICTURES, WithControl, edges, mask, scribble, split_labels
from minidiff.cli import main
from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.nn import ControlNet
from minidiff.runs import diffusion, snapshot

CONFIG = TrainConfig(steps=2, batch_size=2, pictures=0, learning_rate=1e-2)


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return shipped.load("digits-text")


def square() -> torch.Tensor:
    """Return an image (1, 3, 16, 16) of a yellow square on blue."""
    image = torch.full((1, 3, 16, 16), -1.0)
    image[:, 2] = 1
    image[:, :2, 4:12, 4:12] = 1
    image[:, 2, 4:12, 4:12] = -1
    return image


def test_edges_of_a_square_are_two_pixels_around_its_border_and_scribbles_cover_them() -> None:
    found = edges(square())
    ring = torch.zeros(1, 1, 16, 16)
    ring[..., 3:13, 3:13] = 1
    ring[..., 5:11, 5:11] = 0
    outside = found * (1 - ring)
    assert not outside.any()
    assert found[..., 3:5, 6].all()
    assert (scribble(square()) >= found).all()
    assert not edges(torch.full((1, 3, 8, 8), 0.3)).any()


def test_a_mask_is_what_differs_from_the_colour_of_the_border() -> None:
    wanted = torch.zeros(1, 1, 16, 16)
    wanted[..., 4:12, 4:12] = 1
    assert torch.equal(mask(square()), wanted)


def test_data_carry_the_control_of_every_image_behind_its_caption() -> None:
    data = load("captions")
    controlled = WithControl(data, "edges", edges)
    index = torch.tensor([5, 2])
    (x, labels), (same, captions) = controlled.batch(index, 7), data.batch(index, 7)
    own, images = split_labels(labels, (1, 32, 32))
    assert torch.equal(x, same)
    assert torch.equal(own, captions)
    assert torch.equal(images, edges(x))
    assert controlled.digests()["control"] == "edges"


@pytest.mark.parametrize("control", PICTURES)
def test_training_changes_the_controlnet_alone(base: Pipeline, control: str) -> None:
    before = {n: p.clone() for n, p in base.unet.state_dict().items()}
    learner = ControlNetTraining(control=control)
    tuned = train(CONFIG, load("captions"), start=base, learner=learner, progress=False)
    after = tuned.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    (net,) = tuned.controlnets
    fresh = ControlNet.from_unet(base.unet, 1, (16,))
    assert net.controlnet_mid_block.weight.any()
    assert not fresh.controlnet_mid_block.weight.any()
    image = edges(load("captions").batch(torch.tensor([0]))[0])
    call = {"seed": 0, "num_inference_steps": 2, "output_type": "pt"}
    plain = tuned.with_controls([])("a red 7", **call).images
    assert torch.equal(tuned("a red 7", control_image=image, control_scale=0, **call).images, plain)
    assert not torch.equal(tuned("a red 7", control_image=image, **call).images, plain)


def test_classes_without_texts_are_not_copied_and_say_so() -> None:
    with pytest.raises(InvalidArgument, match="class of the U-Net must be one of UNet2DCondition"):
        train(
            TrainConfig(steps=1), load("digits"), start=shipped.load("mnist"),
            learner=ControlNetTraining(),
        )  # fmt: skip


def test_a_shift_that_would_move_the_image_without_its_control_is_refused(base: Pipeline) -> None:
    config = TrainConfig(steps=1, shift=1)
    with pytest.raises(InvalidArgument, match="shift must be 0 for captions"):
        train(config, load("captions"), start=base, learner=ControlNetTraining())


def test_an_unknown_control_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="control must be one of edges, scribble, mask"):
        ControlNetTraining(control="depth")


def test_a_killed_run_resumes_bit_for_bit_and_saves_a_folder_of_diffusers(base, tmp_path) -> None:
    diffusers = pytest.importorskip("diffusers")
    data, learner = load("captions"), ControlNetTraining()
    whole = diffusion.train_into(tmp_path / "whole", CONFIG, data, start=base, learner=learner)
    saving = diffusion.Saving(save_every=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        written = snapshot.write

        def dying(run, content, log_bytes):
            written(run, content, log_bytes)
            raise KeyboardInterrupt

        patch.setattr(snapshot, "write", dying)
        diffusion.train_into(
            tmp_path / "run", CONFIG, data, start=base, learner=learner, saving=saving
        )
    again = diffusion.resume(tmp_path / "run", data, start=base, learner=learner)
    pairs = zip(whole.controlnets[0].parameters(), again.controlnets[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert diffusers.ControlNetModel.from_pretrained(tmp_path / "run" / "adapter") is not None
    read = ControlNet.from_pretrained(tmp_path / "run" / "adapter")
    assert torch.equal(
        read.controlnet_mid_block.weight, again.controlnets[0].controlnet_mid_block.weight
    )


def test_the_command_line_trains_a_controlnet_and_samples_with_it(tmp_path, capsys) -> None:
    run, png = str(tmp_path / "edges"), str(tmp_path / "shape.png")
    train_it = ["train", "--init", "digits-text", "--learn", "controlnet", "--control", "edges",
                "--data", "captions", "--steps", "1", "--batch-size", "2",
                "--sampling-steps", "1", "--pictures", "1", "--out", run]  # fmt: skip
    assert main(train_it) == 0
    assert (tmp_path / "edges" / "samples.png").is_file()
    assert f"--controlnet {run}" in capsys.readouterr().out
    from PIL import Image

    Image.new("L", (32, 32)).save(png)
    draw = ["sample", "digits-text", "a red 7 on yellow", "--num", "1", "--steps", "1",
            "--png", str(tmp_path / "out.png")]  # fmt: skip
    assert main([*draw, "--control", png, "--controlnet", run, "--control-scale", "0.5"]) == 0
    capsys.readouterr()
    for more, message in (
        (["--control", png], "--control must be given once for each --controlnet, got 1 and 0"),
        (["--controlnet", run], "got 0 and 1"),
        (
            ["--controlnet", run, "--control", png, "--control-scale", "nan"],
            "control_scale must be",
        ),
    ):
        assert main([*draw, *more]) == 2
        assert message in capsys.readouterr().err
    Image.new("L", (16, 16)).save(png)
    assert main([*draw, "--control", png, "--controlnet", run]) == 2
    assert "control_image must have the size of the images, (32, 32)" in capsys.readouterr().err
