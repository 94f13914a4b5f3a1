"""Folders of weights: shards, variants, number types, and damaged or malicious files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.nn import AutoencoderKL, TextEncoder, UNet
from minidiff.runtime.tensors import byte_count

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in a.state_dict().items()
    )


@pytest.fixture
def unet() -> UNet:
    return UNet(**SMALL)


# ------------------------------------------------------------------------ shards and variants


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_pass_between_the_libraries_bit_for_bit(tmp_path, unet, variant):
    unet.save_pretrained(tmp_path / "a", max_shard_size="20KB", variant=variant)
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_size < 40_000 for shard in shards)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "a", variant=variant)
    theirs.save_pretrained(tmp_path / "b", max_shard_size="20KB", variant=variant)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert same(unet, theirs)
    assert same(unet, UNet.from_pretrained(tmp_path / "b", variant=variant))
    index = f"{STEM}.safetensors.index{'' if variant is None else '.fp16'}.json"
    total = json.loads((tmp_path / "a" / index).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in unet.state_dict().values())


def test_a_variant_is_read_only_when_it_is_requested(tmp_path, unet):
    unet.half().save_pretrained(tmp_path / "u", variant="fp16")
    with pytest.raises(CheckpointError, match=rf"{STEM}.safetensors: no such file; there is"):
        UNet.from_pretrained(tmp_path / "u")
    again = UNet.from_pretrained(tmp_path / "u", variant="fp16", torch_dtype=torch.float16)
    assert same(unet, again)
    assert next(UNet.from_pretrained(tmp_path / "u", variant="fp16").parameters()).dtype == (
        torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_read_in_the_requested_number_type(tmp_path, unet, dtype):
    unet.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert same(unet.to(dtype), again)
    assert all(p.requires_grad for p in again.parameters())


def test_saving_another_variant_into_the_folder_is_refused(tmp_path, unet):
    unet.save_pretrained(tmp_path / "u")
    unet.save_pretrained(tmp_path / "u", max_shard_size="20KB")  # over itself, in more shards
    assert not (tmp_path / "u" / f"{STEM}.safetensors").exists()
    with pytest.raises(CheckpointError, match="choose a new or empty one"):
        unet.save_pretrained(tmp_path / "u", variant="fp16")
    assert same(unet, UNet.from_pretrained(tmp_path / "u"))


@pytest.mark.parametrize(
    ("text", "count"),
    [(7, 7), ("10GB", 10**10), ("5MB", 5 * 10**6), ("2GiB", 2 << 30), ("1KiB", 1024)],
)
def test_byte_counts_are_read_as_in_diffusers(text, count):
    assert byte_count("max_shard_size", text) == count


@pytest.mark.parametrize("value", [0, -1, "0GB", "10", "10 GB", "1.5GB", "tenGB", 2.5, True, None])
def test_an_invalid_shard_size_is_refused(tmp_path, unet, value):
    with pytest.raises(InvalidArgument, match="max_shard_size must be"):
        unet.save_pretrained(tmp_path / "u", max_shard_size=value)
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize("variant", ["", "a/b", "..", "fp 16", 16])
def test_a_variant_that_is_not_a_short_word_is_refused(tmp_path, unet, variant):
    with pytest.raises(InvalidArgument, match="variant must be a short word"):
        unet.save_pretrained(tmp_path / "u", variant=variant)
    with pytest.raises(InvalidArgument, match="variant must be a short word"):
        UNet.from_pretrained(tmp_path, variant=variant)


def test_an_unsupported_number_type_is_refused(tmp_path, unet):
    unet.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="torch_dtype must be one of"):
        UNet.from_pretrained(tmp_path, torch_dtype=torch.int8)


# ------------------------------------------------------------------------------ damaged folders


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_in_index(folder: Path, name: str) -> None:
    """Write another file name for the first shard into the index."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    first = next(iter(places.values()))
    edit(folder / INDEX, weight_map={k: name if v == first else v for k, v in places.items()})


def drop_from_index(folder: Path) -> None:
    """Delete a tensor from the index."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    places.pop("conv_in.weight")
    edit(folder / INDEX, weight_map=places)


def truncate(folder: Path) -> None:
    """Cut the end of the second shard off."""
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def duplicate(folder: Path) -> None:
    """Write a tensor of the first shard into the second as well."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "00002-of-.*: no such file"),
        (truncate, "00002-of-.*: not a readable safetensors file"),
        (
            lambda f: rename_in_index(f, "../../etc/passwd"),
            "must be the plain name of a .safetensors file",
        ),
        (lambda f: rename_in_index(f, "/etc/hosts.safetensors"), "must be the plain name"),
        (lambda f: rename_in_index(f, "sub\\file.safetensors"), "must be the plain name"),
        (lambda f: rename_in_index(f, "nul\0.safetensors"), "must be the plain name"),
        (lambda f: rename_in_index(f, 7), "must be the plain name"),
        (
            lambda f: rename_in_index(f, "model.bin"),
            "must be the plain name of a .safetensors file",
        ),
        (
            lambda f: rename_in_index(f, "elsewhere.safetensors"),
            "elsewhere.safetensors: no such file",
        ),
        (drop_from_index, "does not agree with .* on conv_in.weight"),
        (duplicate, "does not agree with"),
        (lambda f: edit(f / INDEX, weight_map=[]), "has no weight_map"),
        (lambda f: edit(f / INDEX, weight_map={}), "has no weight_map"),
        (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
        (lambda f: (f / INDEX).write_text(" " * ((1 << 24) + 1)), "a config has at most"),
    ],
)
def test_damaged_shards_are_refused_by_name(tmp_path, unet, damage, message):
    unet.save_pretrained(tmp_path / "u", max_shard_size="20KB")
    damage(tmp_path / "u")
    with pytest.raises(CheckpointError, match=message):
        UNet.from_pretrained(tmp_path / "u")


@pytest.mark.parametrize("ending", ["bin", "pt", "ckpt", "pth"])
def test_a_pickle_is_refused_and_not_opened(tmp_path, unet, ending):
    unet.save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").unlink()
    (tmp_path / f"{STEM}.{ending}").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match="a pickle can run code and is not read; convert it"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("network", [UNet, AutoencoderKL, TextEncoder])
def test_a_missing_folder_or_file_is_named(tmp_path, network):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        network.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"safetensors: no such file"):
        network.from_pretrained(tmp_path)


NETWORKS = {
    "unet": lambda: UNet(**SMALL),
    "vae": lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
    "text": lambda: TextEncoder(
        vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1
    ),
}
HUGE = {
    "unet": [
        {"layers_per_block": 10**9},
        {
            "block_out_channels": [16384] * 8,
            "down_block_types": ["AttnDownBlock2D"] * 8,
            "up_block_types": ["AttnUpBlock2D"] * 8,
            "layers_per_block": 16,
        },
        {"block_out_channels": [16384, 16384]},
        {"in_channels": 4096, "block_out_channels": [16384, 16384]},
        {"num_class_embeds": 1 << 20},
    ],
    "vae": [{"layers_per_block": 10**9}, {"block_out_channels": [16384]}],
    "text": [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 128},
        {"vocab_size": 1 << 22, "hidden_size": 1 << 14},
    ],
}
MEASURE = """
import resource, sys, time
from minidiff.errors import CheckpointError
from minidiff import nn
cls = {"unet": nn.UNet, "vae": nn.AutoencoderKL, "text": nn.TextEncoder}[sys.argv[1]]
cls.from_pretrained(sys.argv[2])
for folder in sys.argv[3:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        cls.from_pretrained(folder)
    except CheckpointError:
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(time.process_time() - start, (after - before) / 1024)
"""


@pytest.mark.parametrize("kind", HUGE)
def test_a_config_of_a_huge_network_is_refused_before_memory_is_allocated(tmp_path, kind):
    """Each takes under 1 s and 200 MB, in a process that has read a valid folder before."""
    folders = [tmp_path / str(i) for i in range(1 + len(HUGE[kind]))]
    for folder in folders:
        NETWORKS[kind]().save_pretrained(folder)
    for folder, change in zip(folders[1:], HUGE[kind], strict=True):
        edit(folder / "config.json", **change)
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, *map(str, folders)],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert len(measured) == 2 * len(HUGE[kind])
    assert max(map(float, measured[::2])) < 1  # seconds of CPU time
    assert max(map(float, measured[1::2])) < 200  # megabytes
