"""Peak memory of one evaluation of a U-Net and of a decoder, in several forms.

    python benchmarks/memory.py [--device cuda] [--images N] [--rounds N] [--threads N]

Every figure is from a fresh process. On the CPU (Linux only) it is how far the resident memory
rises during the call, so weights do not count; on a GPU it is `torch.cuda.max_memory_allocated`
with the weights. Beside it stand the median CPU time of a call, and the error relative to the first
form of its table. The U-Net has a quarter of the channels of Stable Diffusion 1, at 64×64.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from import_time import conditions
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff.engines.backends import is_installed
from minidiff.nn import AutoencoderKL, UNet
from minidiff.pipeline import Pipeline
from minidiff.schedulers import DDIMScheduler
from minidiff.text.prompts import WordPrompts
from minidiff.text.words import WordTokenizer

TEXT = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (80, 160, 320, 320),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 192,
    "attention_head_dim": 8,
    "norm_num_groups": 16,
}
VAE = {
    "block_out_channels": (64, 128, 128),
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "sample_size": 256,
}
TABLES = {
    "unet": ("torch", "low", "offload", "offload low", "onnxruntime", "openvino", "diffusers"),
    "decoder": ("torch", "slicing", "tiling"),
}


class Words(WordPrompts):
    """Tokens alone, as Stable Diffusion has them."""

    labels_are_pooled = False

    def encode(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the conditioning on token numbers (B, L)."""
        return {"encoder_hidden_states": self.text_encoder(ids).last_hidden_state}


def unet(kind: str, device: str) -> Callable[[Tensor], Tensor]:
    """Return a U-Net in one form, given a text."""
    words = torch.randn(8, 77, 192, generator=torch.Generator().manual_seed(1))
    ours = UNet(**TEXT).eval().to(memory_format=torch.channels_last)
    if kind == "diffusers":
        import diffusers

        theirs = diffusers.UNet2DConditionModel(**TEXT).eval().to(device)
        theirs.load_state_dict(ours.state_dict())
        return lambda x: theirs(x.to(device), 500, words[: len(x)].to(device)).sample.cpu()
    words_of = Words.fresh(WordTokenizer(["a"], 77), 192, 1)
    pipe = Pipeline(ours, DDIMScheduler(), prompts=words_of)
    pipe = pipe.offload(device) if "offload" in kind else pipe.to(device)
    if kind in ("onnxruntime", "openvino"):
        pipe.optimize(kind, "float32")
    elif "low" in kind:
        pipe.optimize("torch", "float32", memory="low")
    network = pipe.engines[ours](ours) if ours in pipe.engines else ours
    return lambda x: network(
        x.to(device), 500, encoder_hidden_states=words[: len(x)].to(device)
    ).cpu()


def decoder(kind: str, device: str) -> Callable[[Tensor], Tensor]:
    """Return a decoder in one form."""
    vae = AutoencoderKL(**VAE).eval().to(device)
    vae.use_slicing, vae.use_tiling = kind == "slicing", kind == "tiling"
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 32
    return lambda x: vae.decode(x.to(device)).cpu()


def resident(which: str) -> float:
    """Return VmRSS, or the largest one, VmHWM, of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(which))) / 1024


@torch.no_grad()
def measure(table: str, kind: str, options: argparse.Namespace) -> None:
    """Print peak memory, CPU time and the output's file of one form, in this process."""
    torch.manual_seed(0)
    call = {"unet": unet, "decoder": decoder}[table](kind, options.device)
    x = torch.randn(options.images, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    call(x[:1])  # starts threads, reads libraries, compiles
    if options.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = resident("VmRSS")
        out = call(x)
        peak = resident("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        out = call(x)
        peak = torch.cuda.max_memory_allocated() / 2**20
    spent = []
    for _ in range(options.rounds):
        start = time.process_time()
        call(x)
        spent.append(time.process_time() - start)
    save_file({"out": out.contiguous()}, options.output)
    print(peak, statistics.median(spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=4, help="images in a call, at most 8")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each form")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--form", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.form:
        measure(*options.form, options)
        return
    libraries = ("diffusers", "openvino", "onnxruntime")
    print(f"{conditions(options.threads, *libraries)}; {options.images} images")
    for table, kinds in TABLES.items():
        print(f"{table:16}{'MiB':>8}{'CPU ms':>9}{'error':>9}")
        exact = None
        for kind in kinds:
            if kind in ("openvino", "onnxruntime", "diffusers") and not is_installed(kind):
                continue
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder, "out.safetensors")
                command = [sys.executable, *sys.argv, "--form", table, kind, "--output", output]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                out = load_file(output)["out"]
            peak, seconds = map(float, done.stdout.splitlines()[-1].split())
            exact = out if exact is None else exact
            error = ((out - exact).norm() / exact.norm()).item()
            print(f"  {kind:14}{peak:8.0f}{1e3 * seconds:9.0f}{error:9.0e}", flush=True)


if __name__ == "__main__":
    main()
