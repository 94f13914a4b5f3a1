"""Minutes of training until unconditional MNIST samples are good, for minidiff and its peers.

    export OMP_NUM_THREADS=2 MINIDIFF_DATA=DIR
    python benchmarks/time_to_quality.py train minidiff --form autoguided \\
        --minutes 10 --out runs/minidiff
    python benchmarks/time_to_quality.py train azula --form tuned --learning-rate 1e-3 \\
        --minutes 10 --out runs/azula-tuned-1e-3
    python benchmarks/time_to_quality.py score runs --device cuda

"Good" is a Fréchet distance of at most 15 ‰ (minidiff/EVALUATION.md). Contenders are minidiff's
preset mnist without classes, by itself and with autoguidance; and denoising-diffusion-pytorch,
smalldiffusion, azula and diffusers' recipe for unconditional images, each "shipped" (as its README
says) and "tuned" (without a flip, a network of about minidiff's size, the best of three learning
rates; AdamW, and average and precision as in minidiff's own runs). benchmarks/peers/ has what that
means for each.

`train` trains one of them by the clock, with all images in memory, and saves the averaged weights
at evenly spaced times; saving is not counted. `score` draws samples from what was saved by the
contender's own sampler, in float32 and on any device, since that is not timed, and prints the
table. The learning rate falls to zero at the end of the budget for minidiff and everything tuned,
so the same minute of a shorter run is better than of a longer one: where runs of several budgets
are given, the best counts for each contender.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from import_time import cpu_name
from peers.contender import Contender
from torch import Tensor, nn

import minidiff
from minidiff import data
from minidiff.data import ImageData
from minidiff.errors import CheckpointError, InvalidArgument, MinidiffError, whole_number
from minidiff.images.pixels import to_uint8
from minidiff.metrics import Evaluator, sha256
from minidiff.metrics.protocol import counted
from minidiff.noise import MAX_SEED
from minidiff.runtime.device import DTYPES, keep_freed_memory, pick_device, pick_dtype
from minidiff.runtime.files import read_json, write_json
from minidiff.runtime.tensors import headers, load_weights, write_tensors
from minidiff.training.config import LoopConfig
from minidiff.training.progress import Budget

GOOD = 15.0  # FD‰
LEARNING_RATES = (5e-4, 1e-3, 2e-3)  # to try for every tuned peer
RUN, LOG = "run.json", "log.jsonl"
BATCHES = {"cuda": 1000, "cpu": 100, "mps": 250}  # images in a network at once


# ------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Job:
    """One run: who trains, in which form, and how."""

    contender: str
    form: str
    minutes: float
    learning_rate: float
    seed: int
    dtype: str

    def loop(self) -> LoopConfig:
        """What the loops read. Raises InvalidArgument for a number out of range."""
        return LoopConfig(
            minutes=self.minutes,
            seed=self.seed,
            learning_rate=self.learning_rate,
            dtype=self.dtype,
        )


def plan(options: argparse.Namespace, device: torch.device) -> Job:
    """The run that the options ask for. Raises InvalidArgument."""
    form = options.form or ("preset" if options.contender == "minidiff" else None)
    who = peers.contender(options.contender, form)
    rate = options.learning_rate
    if rate is not None and who.fixed_rate:
        raise InvalidArgument(
            f"learning-rate is {who.learning_rate:g} in {options.contender} as {form}, "
            f"it cannot be {rate:g}; try rates with --form tuned"
        )
    dtype = pick_dtype(who.dtype if options.dtype is None else options.dtype, device)
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    rate = who.learning_rate if rate is None else rate
    return Job(options.contender, form, options.minutes, rate, options.seed, name)


def without_labels(images: ImageData) -> ImageData:
    """The same images for a network without classes."""
    return ImageData(images.name, images.images, None, ())


class Snapshots:
    """Saves the averaged network at evenly spaced times, while the budget's clock stands still.

    Args:
        out: the folder of the run.
        count: how many, the last of them at the end.
        about: what every row of the log says.
    """

    def __init__(self, out: Path, count: int, about: Mapping[str, Any]) -> None:
        self.out, self.count, self.about, self.saved = out, count, about, 0

    def __call__(self, budget: Budget, images: int, network: Callable[[], nn.Module]) -> None:
        """Save one if it is due; see `peers.contender.Keep`."""
        due = min(int(budget.fraction_done * self.count), self.count)
        if due <= self.saved:
            return
        self.saved = due  # after a slow step several are due at once: one stands for all
        averaged = network()
        path = self.out / f"snapshot-{due:03d}.safetensors"
        write_tensors(path, averaged.state_dict())
        row = {
            **self.about,
            "file": path.name,
            "steps": budget.step,
            "images": images,
            "seconds": round(budget.elapsed, 3),
            "parameters": sum(p.numel() for p in averaged.parameters()),
        }
        append(self.out / LOG, row)
        print(f"{budget.elapsed:8.1f} s, {budget.step} steps, {images} images: {path}", flush=True)
        budget.start()


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none if there is no such file.

    A line that a kill cut off at the end is passed over. Raises CheckpointError for other damage.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(f"{path}: line {number} is not JSON ({error})") from error
    return rows


def train(job: Job, images: ImageData, device: torch.device, out: Path, snapshots: int) -> None:
    """Train one contender and save it along the way, with a row a snapshot in `log.jsonl`.

    Raises:
        CheckpointError: `out` is not an empty folder, or cannot be written.
        InvalidArgument, TrainingError: see `minidiff.training.diffusion.train`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not an empty folder; choose another --out")
    loop, who = job.loop(), peers.contender(job.contender, job.form)
    write_json(out / RUN, asdict(job))
    about = {
        **asdict(job),
        "version": _version(peers.package(job.contender)),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "machine": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    who.train(loop, without_labels(images), device, Snapshots(out, snapshots, about))


def _version(package: str) -> str:
    if package == minidiff.__name__:  # which may run from its sources
        return minidiff.__version__
    return importlib.metadata.version(package)


# ------------------------------------------------------------------------------------- scoring


def runs_in(folders: Iterable[Path]) -> list[Path]:
    """The runs among these folders and within them. Raises CheckpointError if there is none."""
    found = sorted({path.parent for folder in folders for path in folder.rglob(RUN)})
    if not found:
        raise CheckpointError(f"no run (no {RUN}) in {', '.join(map(str, folders))}")
    return found


@torch.no_grad()
def draw(who: Contender, network: nn.Module, n: int, steps: int, seed: int) -> tuple[Tensor, float]:
    """n samples, uint8 (n, C, H, W), and how many evaluations of the network each has taken."""
    batch = BATCHES[next(network.parameters()).device.type]
    with counted(*map(network.get_submodule, who.counted)) as count:
        parts = [
            to_uint8(who.sample(network, min(batch, n - first), steps, seed + first)).cpu()
            for first in range(0, n, batch)
        ]
    return torch.cat(parts), count[0] / n


def score(
    runs: Sequence[Path],
    evaluator: Evaluator,
    device: torch.device,
    table: Path,
    *,
    num: int,
    seed: int = 0,
    steps: int | None = None,
    last: bool = False,
) -> list[dict[str, Any]]:
    """Score the snapshots of runs that are not in the table yet; returns the rows of all.

    Args:
        table: a file of JSON lines, to which a row is added for each.
        num, seed: of the samples.
        steps: of the sampler; by default the contender's own number.
        last: only the last snapshot of every run.
    Raises:
        CheckpointError: a run's own files cannot be read. A snapshot that is damaged, or not of the
            contender that it says, is passed over and named.
    """
    known = {_key(row): row for row in rows_of(table)}
    images, scored = without_labels(evaluator.train), []
    for run in runs:
        job = Job(**read_json(run / RUN))
        who = peers.contender(job.contender, job.form)
        network = who.network(job.loop(), images)
        rows = rows_of(run / LOG)
        for row in rows[-1:] if last else rows:
            file = run / row["file"]
            try:
                load_weights(network, headers([file]))
            except CheckpointError as error:  # the others are worth their scores
                print(f"passed over: {error}", file=sys.stderr, flush=True)
                continue
            wanted = {
                "sha256": sha256(file),
                "sampler_steps": who.steps if steps is None else steps,
                "num": num,
                "sample_seed": seed,
            }
            if _key(wanted) not in known:
                start = time.monotonic()
                network = network.to(device)
                found = _measured(who, network, evaluator, num, wanted["sampler_steps"], seed)
                known[_key(wanted)] = {**row, "run": run.name, **wanted, **found}
                append(table, known[_key(wanted)])
                print(
                    f"{run.name}, {row['seconds'] / 60:.2f} min: FD {found['fd']:.2f} ‰, coverage "
                    f"{found['coverage']:.3f}, {found['evaluations']:.0f} evaluations an image "
                    f"({time.monotonic() - start:.0f} s)",
                    flush=True,
                )
            scored.append(known[_key(wanted)])
    return scored


def _measured(
    who: Contender, network: nn.Module, evaluator: Evaluator, n: int, steps: int, seed: int
) -> dict[str, float]:
    samples, evaluations = draw(who, network, n, steps, seed)
    found = evaluator.score(samples)
    return {"evaluations": evaluations, "fd": found.fd, "coverage": found.coverage}


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in ("sha256", "sampler_steps", "num", "sample_seed"))


@dataclass(frozen=True)
class Result:
    """What a form of a contender has reached in the best of its runs.

    Attributes:
        minutes: of training until the first good snapshot; None if none is.
        budget, fd: minutes and FD‰ of the last snapshot of that run.
    """

    contender: str
    form: str
    learning_rate: float
    minutes: float | None
    budget: float
    fd: float


def results(rows: Iterable[Mapping[str, Any]], good: float = GOOD) -> list[Result]:
    """One result a form of a contender: of the run that is good first, else that ends best."""
    by_run: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        names = ("contender", "form", "learning_rate", "minutes", "seed", "dtype", "machine")
        by_run.setdefault(tuple(row[name] for name in names), []).append(row)
    best: dict[tuple[str, str], Result] = {}
    for (name, form, rate, *_), points in by_run.items():
        points.sort(key=lambda row: row["seconds"])
        reached = next((row["seconds"] / 60 for row in points if row["fd"] <= good), None)
        end = points[-1]
        result = Result(name, form, rate, reached, end["seconds"] / 60, end["fd"])
        other = best.setdefault((name, form), result)
        best[name, form] = min(other, result, key=_rank)
    return list(best.values())


def _rank(result: Result) -> tuple[bool, float]:
    reached = result.minutes is not None
    return not reached, result.minutes if reached else result.fd


def lines(found: Sequence[Result]) -> Iterator[str]:
    """The table, with how many times longer than minidiff's best form each peer has taken."""
    reached = [r.minutes for r in found if r.contender == "minidiff" and r.minutes is not None]
    ours = min(reached, default=None)
    yield f"{'contender':30}{'form':10}{'best rate':>10}  {f'minutes until FD ≤ {GOOD:g} ‰':34}"
    for result in found:
        if result.minutes is None:
            reached, times = f"not in {result.budget:.1f}, then FD {result.fd:.1f} ‰", result.budget
        else:
            reached, times = f"{result.minutes:.2f}", result.minutes
        ratio = ""
        if ours and result.contender != "minidiff":
            ratio = f"{'' if result.minutes else 'more than '}{times / ours:.1f} × minidiff"
        name = f"{result.contender:30}{result.form:10}{result.learning_rate:10.1e}"
        yield f"{name}  {reached:34}{ratio}".rstrip()


# ------------------------------------------------------------------------------------ commands


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="where MNIST is; default: MINIDIFF_DATA")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train one contender")
    one.add_argument("contender", help=", ".join(peers.NAMES))
    one.add_argument(
        "--form",
        help="of a peer: shipped or tuned; of minidiff: preset, the default, or autoguided",
    )
    tried = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    one.add_argument("--learning-rate", type=float, help=f"of a tuned peer, to try: {tried}")
    one.add_argument("--minutes", type=float, required=True)
    one.add_argument("--snapshots", type=int, default=12)
    one.add_argument("--out", type=Path, required=True, help="the folder of the run")
    one.add_argument("--device", default="cpu")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument(
        "--dtype",
        help="auto, float32 or bfloat16; default: what the README says, tuned and minidiff auto",
    )
    one.add_argument("--seed", type=int, default=0)
    all_of = commands.add_parser("score", help="score what was saved, and print the table")
    all_of.add_argument("folders", type=Path, nargs="+", help="runs, or folders with runs")
    all_of.add_argument("--num", type=int, default=10_000, help="samples of a snapshot")
    all_of.add_argument("--device", default="auto")
    all_of.add_argument("--seed", type=int, default=0)
    all_of.add_argument("--steps", type=int, help="of the sampler; default: the contender's own")
    all_of.add_argument("--last", action="store_true", help="only the last snapshot of every run")
    all_of.add_argument("--scores", type=Path, default="scores.jsonl", help="what to add to")
    for command in (one, all_of):
        command.add_argument("--data-dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _train(options: argparse.Namespace) -> None:
    device = pick_device(options.device)
    torch.set_num_threads(whole_number("threads", options.threads, 1))
    whole_number("snapshots", options.snapshots, 1, 999)
    job = plan(options, device)
    job.loop()
    images = data.load("mnist", "train", options.data_dir)
    train(job, images, device, options.out, options.snapshots)


def _score(options: argparse.Namespace) -> None:
    device, runs = pick_device(options.device), runs_in(options.folders)
    whole_number("seed", options.seed, 0, MAX_SEED)
    if options.steps is not None:
        whole_number("steps", options.steps, 1, 1000)
    evaluator = Evaluator("mnist", options.data_dir, device)
    whole_number("num", options.num, evaluator.min_images)
    rows = score(
        runs, evaluator, device, options.scores,
        num=options.num, seed=options.seed, steps=options.steps, last=options.last,
    )  # fmt: skip
    for line in lines(results(rows)):
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    keep_freed_memory()  # for all of them
    try:
        {"train": _train, "score": _score}[options.command](options)
    except MinidiffError as error:
        print(f"time_to_quality: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
