"""A run goes on only with its own data and with a config.json that orders nothing else."""

import contextlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from minidiff.cli import main
from minidiff.data import ImageData, load
from minidiff.data.captioned.captions import CaptionedDigits
from minidiff.data.dataset import from_dataset
from minidiff.data.latents import LatentData
from minidiff.errors import CheckpointError, MinidiffError
from minidiff.lab.demo import demo
from minidiff.nn import AutoencoderKL
from minidiff.runs import autoencoder, diffusion
from minidiff.runs.folder import CONFIG, LOG, about, changes
from minidiff.runtime import files
from minidiff.runtime.distributed import VARIABLES
from minidiff.training.config import TrainConfig, VAEConfig

CONFIG_OF_ALL = TrainConfig(steps=2, channels=(4, 4), batch_size=4, pictures=0)


def small() -> ImageData:
    digits = load("digits")
    return ImageData("small", digits.images[:20], digits.labels[:20] % 2, ("even", "odd"))


def edit(out: Path, **parts) -> None:
    files.write_json(out / CONFIG, files.read_json(out / CONFIG) | parts)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("begun") / "run"
    diffusion.train_into(out, CONFIG_OF_ALL, small(), load={"name": "digits"})
    return out


@pytest.fixture
def run(begun, tmp_path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def resumed(out: Path, data, **budget) -> list[str]:
    printed = []
    diffusion.resume(out, data, print_line=printed.append, **budget)
    return printed


# --- the data --------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_renamed_classes(run):
    other = replace(small(), class_names=("odd", "even"))
    with pytest.raises(CheckpointError, match=r"\['even', 'odd'\].* are .*\['odd', 'even'\]"):
        resumed(run, other)


def test_a_run_does_not_go_on_with_other_labels(run):
    other = replace(small(), labels=1 - small().labels)
    with pytest.raises(CheckpointError, match="the labels of its data have changed"):
        resumed(run, other)


def test_a_run_does_not_go_on_with_one_other_pixel(run):
    images = small().images.clone()
    images[7, 0, 3, 3] ^= 1
    with pytest.raises(CheckpointError, match="the pixels of its data have changed"):
        resumed(run, replace(small(), images=images))


def test_an_older_run_without_classes_and_digests_goes_on(run):
    known = files.read_json(run / CONFIG)["data"]
    edit(run, data={n: v for n, v in known.items() if n not in ("class_names", "digests")})
    assert "going on from step 2" in resumed(run, small(), steps="+1")


def autoencoder_of(seed: int, **options) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), **options,
    )  # fmt: skip


def test_latents_of_another_autoencoder_are_other_data():
    before = about(LatentData(autoencoder_of(0), small()))
    assert not changes(before, about(LatentData(autoencoder_of(0), small())))
    for vae, changed in (
        (autoencoder_of(1), "autoencoder's weights"),
        (autoencoder_of(0, scaling_factor=0.5), "autoencoder's scale"),
    ):
        assert f"the {changed} of" in changes(before, about(LatentData(vae, small())))


def test_drawn_images_are_known_again_by_their_parameters():
    before = about(CaptionedDigits())
    assert not changes(before, about(CaptionedDigits()))
    assert "the seed of" in changes(before, about(CaptionedDigits(seed=1)))
    assert "the pairs of" in changes(before, about(CaptionedDigits(pairs="all")))


def test_a_data_set_is_known_again_by_its_parameters():
    items = [torch.full((1, 4, 4), 0.5)] * 3
    before = about(from_dataset(items, value_range=(0, 1)))
    assert not changes(before, about(from_dataset(items, value_range=(0, 1))))
    changed = about(from_dataset(items, value_range=(0, 1), seed=1))
    assert "the seed of" in changes(before, changed)


def test_digests_do_not_depend_on_the_layout_in_memory():
    images = small().images.contiguous(memory_format=torch.channels_last)
    assert replace(small(), images=images).digests() == small().digests()


# --- config.json -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "train --resume"])
def test_a_config_never_orders_a_download_or_a_folder(command, run, tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr("minidiff.data.download.download", refuse)
    place = tmp_path / "new" / "place"
    edit(run, load={"name": "mnist", "data_dir": str(place), "download": True})
    assert main([*command.split(), str(run)]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not place.parent.exists()


LOAD = ("name", "split", "data_dir", "image_size", "vae", "download")
FIELDS = ["command", "data", "train", "load", "device", "saving", "shard"]
FIELDS += [f"load.{name}" for name in LOAD]
WRONG = (5, 1.5, True, None, "x", [], [1], {}, {"x": 1})


@pytest.mark.parametrize("command", ["train", "train-vae"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_wrong_type_is_refused_or_harmless(field, command, run, capsys):
    content = files.read_json(run / CONFIG)
    part, _, name = field.partition(".")
    if command == "train-vae":
        content |= {"command": command, "train": asdict(VAEConfig(steps=1))}
    for value in WRONG:
        changed = {**content[part], name: value} if name else value
        edit(run, **content | {part: changed})
        assert main([command, "--resume", str(run)]) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1


def test_a_key_that_comes_twice_is_refused(run, capsys):
    text = (run / CONFIG).read_text()
    (run / CONFIG).write_text(text.replace('"device"', '"shard": true, "device"'))
    assert main(["check", str(run)]) == 1
    assert "a key comes twice among command" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"_carried": [1]}, {"_use_default_values": 5}])
def test_a_scheduler_config_with_bad_notes_is_refused(options, run):
    path = run / "model" / "scheduler" / "scheduler_config.json"
    files.write_json(path, files.read_json(path) | options)
    with pytest.raises(CheckpointError, match="must be a list and _carried a dict"):
        diffusion.Pipeline.from_pretrained(run / "model")


def test_a_scheduler_option_of_a_wrong_type_is_refused_or_harmless(run):
    path = run / "model" / "scheduler" / "scheduler_config.json"
    content = files.read_json(path)
    for name in (*content, "algorithm_type", "solver_type"):
        for value in WRONG:
            files.write_json(path, content | {name: value})
            with contextlib.suppress(MinidiffError):
                diffusion.Pipeline.from_pretrained(run / "model")


# --- folders and logs ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["emptied", "lost"])
def test_a_lost_log_is_reported_in_one_line(how, run):
    (run / LOG).write_text("") if how == "emptied" else (run / LOG).unlink()
    printed = resumed(run, small(), steps="+1")
    (lost,) = (line for line in printed if str(run / LOG) in line)
    assert lost.startswith(f"{run / LOG}: ")
    assert lost.endswith("bytes are lost")
    assert "going on from step 2" in printed


def test_a_foreign_file_in_the_model_is_found_before_the_training(run, monkeypatch):
    (run / "model" / "notes.txt").write_text("mine")
    monkeypatch.setattr(diffusion, "train", None)
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, and saving replaces"):
        resumed(run, small())


def test_a_foreign_file_in_the_autoencoder_is_found_before_the_training(tmp_path, monkeypatch):
    out, data = tmp_path / "run", small()
    config = VAEConfig(steps=1, channels=(4,), discriminator_channels=(4,), batch_size=4)
    autoencoder.train_vae_into(out, config, data, data)
    (out / "vae" / "notes.txt").write_text("mine")
    monkeypatch.setattr(autoencoder, "train_vae", None)
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, and saving replaces"):
        autoencoder.resume(out, data, data)


def test_a_foreign_file_in_the_model_of_a_demo_is_found_before_the_training(run):
    edit(run, command="demo")
    (run / "model" / "notes.txt").write_text("mine")
    before = (run / CONFIG).read_bytes()
    with pytest.raises(CheckpointError, match=r"holds notes\.txt, and saving replaces"):
        demo(run, CONFIG_OF_ALL, torch.device("cpu"))
    assert (run / CONFIG).read_bytes() == before


def test_a_poor_autoencoder_is_reported_in_one_line(tmp_path):
    config = VAEConfig(steps=1, channels=(4,), discriminator_channels=(4,), batch_size=4)
    _, quality = autoencoder.train_vae_into(
        tmp_path / "run", config, load("digits"), load("digits", "test")
    )
    assert str(quality).splitlines()[-1].startswith("warning: poor reconstructions")
    perfect = quality._replace(made=quality.real)
    assert "warning" not in str(perfect)
    assert "warning" in str(perfect._replace(made=None, psnr=9.0))


# --- launchers -------------------------------------------------------------------------------


def test_several_processes_without_torchrun_are_refused_before_a_folder_is_made(
    tmp_path, monkeypatch, capsys
):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "run"
    assert main(["train", "--data", "digits", "--steps", "1", "--out", str(out)]) == 2
    assert "WORLD_SIZE is set without RANK, LOCAL_RANK, MASTER_ADDR" in capsys.readouterr().err
    assert not out.exists()


def test_an_empty_world_size_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    diffusion.train_into(tmp_path / "run", CONFIG_OF_ALL, small())


def test_a_world_size_that_is_not_a_number_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["sample", "/nonexistent", "--png", "x.png"]) == 2
    assert "WORLD_SIZE must be a whole number" in capsys.readouterr().err


def test_an_error_of_another_rank_is_printed_with_its_rank(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["sample", "/nonexistent", "--png", "x.png"]) == 1
    assert capsys.readouterr().err.startswith("minidiff (rank 1): /nonexistent: neither a run")
