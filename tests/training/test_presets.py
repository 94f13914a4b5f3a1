"""The preset that fits the data, on the command line and in Python."""

import pytest
import torch

from minidiff import PRESETS, train
from minidiff.data import ImageData
from minidiff.errors import InvalidArgument
from minidiff.training import diffusion
from minidiff.training.presets import fitting, preset_for


@pytest.mark.parametrize("name", ["digits", "mnist", "captions"])
@pytest.mark.parametrize("gpu", [False, True])
def test_data_with_a_preset_of_their_name_take_it(name, gpu):
    assert fitting(name, gpu) == name


def test_the_preset_for_a_gpu_is_not_chosen_on_a_cpu():
    assert (fitting("cifar10", True), fitting("cifar10", False)) == ("cifar10", "mnist")
    assert (fitting("photos", True), fitting("photos", False)) == ("cifar10", "mnist")


def test_blocks_keep_the_network_of_large_images_small():
    blocks = {
        side: preset_for("photos", (3, side, side), False).block for side in (28, 64, 128, 256)
    }
    assert blocks == {28: 1, 64: 1, 128: 2, 256: 4}
    assert preset_for("photos", (3, 129, 129), False).block == 1  # no block divides it


def test_only_cifar10_is_mirrored():
    assert preset_for("cifar10", (3, 32, 32), True).flip
    assert not preset_for("letters", (3, 32, 32), True).flip


def test_train_without_a_config_takes_the_preset_of_the_data(monkeypatch):
    chosen = []

    def stop(config, *rest):
        chosen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(diffusion, "resolve", stop)
    data = ImageData("mnist", torch.zeros(4, 1, 28, 28, dtype=torch.uint8), None, ())
    with pytest.raises(KeyboardInterrupt):
        train(None, data)
    assert chosen == [PRESETS["mnist"].train]


@pytest.mark.parametrize("data", ["digits", [1, 2], {}])
def test_train_without_a_config_refuses_what_is_no_data(data):
    with pytest.raises(InvalidArgument, match="data must"):
        train(None, data)
