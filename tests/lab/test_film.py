"""A sampling as a GIF and as a filmstrip."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import DDIMScheduler, Pipeline, UNet
from minidiff.cli import main
from minidiff.lab.film import Film

OPTIONS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(clip_sample=False, compat="exact")
    return Pipeline(UNet(**OPTIONS).eval(), scheduler)


def test_the_last_frames_are_the_images_of_the_call(pipe: Pipeline, tmp_path: Path) -> None:
    film = Film(pipe.decode)
    call = {"num_images": 6, "num_inference_steps": 20, "seed": 0, "output_type": "np"}
    images = pipe(**call, batch_size=3, callback=film).images
    assert len(film.samples) == 21  # the noise, and 20 steps of the first batch alone
    assert np.array_equal(film.samples[-1], images[:3])
    film.write_strip(tmp_path / "strip.png", scale=1)
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (6 * 9 - 1, 12 * 9 - 1)  # two rows an image, 12 of 20 steps
    assert np.array_equal(strip[:8, -8:], images[0].squeeze(-1))
    film.write_gif(tmp_path / "film.gif", columns=3)
    assert Image.open(tmp_path / "film.gif").n_frames > 10


def test_sample_writes_both_beside_the_picture(pipe: Pipeline, tmp_path: Path, capsys) -> None:
    pipe.save_pretrained(tmp_path / "model")
    out = [str(tmp_path / name) for name in ("a.png", "a.gif", "strip.png")]
    call = ["sample", str(tmp_path / "model"), "--num", "2", "--steps", "3"]
    assert main([*call, "--png", out[0], "--gif", out[1], "--strip", out[2]]) == 0
    assert all(Path(path).is_file() for path in out)
    capsys.readouterr()
    for flag, path, message in (
        ("--gif", "x.png", "--gif must be a .gif file, got x.png"),
        ("--strip", "x.gif", "--strip must be a .png file, got x.gif"),
        ("--strip", out[0], "--png and --strip must be two files"),
    ):
        assert main([*call, "--png", out[0], flag, path]) == 2
        assert message in capsys.readouterr().err
