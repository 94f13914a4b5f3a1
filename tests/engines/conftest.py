"""A tiny pipeline with classes and attention, and a cache folder of the tests."""

import pytest
import torch

from minidiff.engines import cache
from minidiff.nn import UNet
from minidiff.pipeline import Pipeline
from minidiff.schedulers import DDIMScheduler


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory):
    """Keep the graphs of all tests in one folder, so that each is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny() -> Pipeline:
    """A pipeline of three classes, 8×8 pixels, with random weights."""
    torch.manual_seed(0)
    unet = UNet(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, norm_num_groups=4, attention_head_dim=4, num_class_embeds=4,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", compat="exact")
    return Pipeline(unet, scheduler, class_names=list("abc"), guidance_scale=2.0)
