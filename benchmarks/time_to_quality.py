"""Minutes of training until unconditional MNIST samples are good, for minidiff and its peers.

    export OMP_NUM_THREADS=2 MINIDIFF_DATA=DIR
    python benchmarks/time_to_quality.py train minidiff --form autoguided \\
        --minutes 10 --out runs/minidiff
    python benchmarks/time_to_quality.py train azula --form tuned --learning-rate 1e-3 \\
        --minutes 10 --out runs/azula-tuned-1e-3
    python benchmarks/time_to_quality.py score runs --device cuda

"Good" is a Fréchet distance of at most 15 ‰ (minidiff/EVALUATION.md). Contenders are minidiff's
preset mnist without classes, plain and with autoguidance; and denoising-diffusion-pytorch,
smalldiffusion, azula and diffusers' recipe for unconditional images. Each peer is "shipped" (as in
its README) and "tuned": no flip, a network of about minidiff's size, the best of three learning
rates, AdamW, and averaged weights and precision as in minidiff's runs. See benchmarks/peers/.

`train` trains one contender by the clock, with all images in memory, and saves the averaged weights
at evenly spaced times; the time of saving is not counted. `score` draws samples from the saved
weights by the contender's sampler and prints the table. It is not timed, so it runs in float32 on
any device. For minidiff and tuned peers, the learning rate falls to zero at the end of the budget,
so a minute of a shorter run is better than that of a longer one: of runs with several budgets, the
best counts for each contender.
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
from minidiff.metrics import Evaluator
from minidiff.metrics.protocol import counted
from minidiff.noise import MAX_SEED
from minidiff.runtime.device import DTYPES, keep_freed_memory, pick_device, pick_dtype
from minidiff.runtime.files import read_json, sha256, write_json
from minidiff.runtime.tensors import load_weights, read_headers, write_tensors
from minidiff.training.config import LoopConfig
from minidiff.training.progress import Budget

GOOD = 15.0  # FD‰
LEARNING_RATES = (5e-4, 1e-3, 2e-3)  # of every tuned peer, where the best counts
RUN, LOG = "run.json", "log.jsonl"
BATCHES = {"cuda": 1000, "cpu": 100, "mps": 250}  # images in a network at once


# ------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Job:
    """A run: the contender, its form, and options of its training."""

    contender: str
    form: str
    minutes: float
    learning_rate: float
    seed: int
    dtype: str

    def loop(self) -> LoopConfig:
        """Return the config of the training loop. Raises InvalidArgument."""
        return LoopConfig(
            minutes=self.minutes,
            seed=self.seed,
            learning_rate=self.learning_rate,
            dtype=self.dtype,
        )


def plan(options: argparse.Namespace, device: torch.device) -> Job:
    """Return the run of the parsed options. Raises InvalidArgument."""
    form = options.form or ("preset" if options.contender == "minidiff" else None)
    who = peers.contender(options.contender, form)
    rate = options.learning_rate
    if rate is not None and who.fixed_rate:
        raise InvalidArgument(
            f"learning-rate must be {who.learning_rate:g} for {options.contender} as {form}, "
            f"got {rate:g}; other rates need --form tuned"
        )
    dtype = pick_dtype(who.dtype if options.dtype is None else options.dtype, device)
    name = next(name for name, kind in DTYPES.items() if kind == dtype)
    rate = who.learning_rate if rate is None else rate
    return Job(options.contender, form, options.minutes, rate, options.seed, name)


def without_labels(images: ImageData) -> ImageData:
    """Return the images without labels, for an unconditional network."""
    return ImageData(images.name, images.images, None, ())


class Snapshots:
    """Snapshots of the averaged network at evenly spaced times, with the clock stopped meanwhile.

    Args:
        out: folder of the run.
        count: number of snapshots, the last at the end.
        about: entries of every row of the log.
    """

    def __init__(self, out: Path, count: int, about: Mapping[str, Any]) -> None:
        self.out, self.count, self.about, self.saved = out, count, about, 0

    def __call__(self, budget: Budget, images: int, network: Callable[[], nn.Module]) -> None:
        """Save a snapshot if it is due; see `peers.contender.Keep`."""
        due = min(int(budget.fraction_done * self.count), self.count)
        if due <= self.saved:
            return
        self.saved = due  # after a slow step several may be due: one is saved for all
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
    """Return the rows of a file of JSON lines, none if there is no such file.

    An incomplete last line, as after a kill, is skipped. Raises CheckpointError for other damage.
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
    """Train one contender, with snapshots in a folder and a row for each in `log.jsonl`.

    Raises:
        CheckpointError: `out` is not an empty folder, or cannot be written.
        InvalidArgument, TrainingError: an option is out of range, or the loss is not finite.
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
    """Return the version of a package."""
    if package == minidiff.__name__:  # which may run uninstalled
        return minidiff.__version__
    return importlib.metadata.version(package)


# ------------------------------------------------------------------------------------- scoring


def runs_in(folders: Iterable[Path]) -> list[Path]:
    """Return the runs in folders and below them. Raises CheckpointError if there are none."""
    found = sorted({path.parent for folder in folders for path in folder.rglob(RUN)})
    if not found:
        raise CheckpointError(f"no run (no {RUN}) in {', '.join(map(str, folders))}")
    return found


@torch.no_grad()
def draw(who: Contender, network: nn.Module, n: int, steps: int, seed: int) -> tuple[Tensor, float]:
    """Return n samples, uint8 (n, C, H, W), and the evaluations of the network per sample."""
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
    """Return the scores of all snapshots of runs; those in the table are not measured again.

    A damaged snapshot, or one of another contender, is skipped with a warning.

    Args:
        runs: folders of runs.
        evaluator: evaluator of MNIST.
        device: device of the networks.
        table: file of JSON lines, which receives a row per new score.
        num: number of samples.
        seed: seed of the samples.
        steps: steps of the sampler; None for the contender's default.
        last: True for the last snapshot of every run only.
    Raises:
        CheckpointError: the config or the log of a run cannot be read.
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
                load_weights(network, read_headers([file]))
            except CheckpointError as error:  # other snapshots may be intact
                print(f"skipped: {error}", file=sys.stderr, flush=True)
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
                    f"{found['coverage']:.3f}, {found['evaluations']:.0f} evaluations per image "
                    f"({time.monotonic() - start:.0f} s)",
                    flush=True,
                )
            scored.append(known[_key(wanted)])
    return scored


def _measured(
    who: Contender, network: nn.Module, evaluator: Evaluator, n: int, steps: int, seed: int
) -> dict[str, float]:
    """Return the scores of one network."""
    samples, evaluations = draw(who, network, n, steps, seed)
    found = evaluator.score(samples)
    return {"evaluations": evaluations, "fd": found.fd, "coverage": found.coverage}


def _key(row: Mapping[str, Any]) -> tuple:
    """Return the entries that identify a score."""
    return tuple(row[name] for name in ("sha256", "sampler_steps", "num", "sample_seed"))


@dataclass(frozen=True)
class Result:
    """The best run of a contender in one form.

    Attributes:
        minutes: training time until the first good snapshot; None if there is none.
        budget, fd: minutes and FD‰ of the last snapshot of that run.
    """

    contender: str
    form: str
    learning_rate: float
    minutes: float | None
    budget: float
    fd: float


def results(rows: Iterable[Mapping[str, Any]], good: float = GOOD) -> list[Result]:
    """Return a result per form of a contender: the run that is good first, or else ends best."""
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
    """Return a key that sorts better results first."""
    reached = result.minutes is not None
    return not reached, result.minutes if reached else result.fd


def lines(found: Sequence[Result]) -> Iterator[str]:
    """Yield the lines of the table, with the time of peers relative to minidiff's best form."""
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
    parser.add_argument("--data-dir", help="folder of MNIST; default: MINIDIFF_DATA")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train one contender")
    one.add_argument("contender", help=", ".join(peers.NAMES))
    one.add_argument(
        "--form",
        help="shipped or tuned for a peer; preset (default) or autoguided for minidiff",
    )
    tried = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    one.add_argument(
        "--learning-rate", type=float, help=f"peak learning rate; for a tuned peer try {tried}"
    )
    one.add_argument("--minutes", type=float, required=True, help="budget in minutes")
    one.add_argument("--snapshots", type=int, default=12, help="number of snapshots")
    one.add_argument("--out", type=Path, required=True, help="folder of the run")
    one.add_argument("--device", default="cpu")
    one.add_argument("--threads", type=int, default=2)
    one.add_argument(
        "--dtype",
        help="auto, float32 or bfloat16; default: that of the form",
    )
    one.add_argument("--seed", type=int, default=0)
    all_of = commands.add_parser("score", help="score all snapshots, and print the table")
    all_of.add_argument("folders", type=Path, nargs="+", help="runs, or folders with runs")
    all_of.add_argument("--num", type=int, default=10_000, help="samples per snapshot")
    all_of.add_argument("--device", default="auto")
    all_of.add_argument("--seed", type=int, default=0)
    all_of.add_argument("--steps", type=int, help="steps of the sampler; default: the contender's")
    all_of.add_argument(
        "--last", action="store_true", help="score the last snapshot of every run only"
    )
    all_of.add_argument(
        "--scores", type=Path, default="scores.jsonl", help="file of scores, which is extended"
    )
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
    keep_freed_memory()  # for all contenders
    try:
        {"train": _train, "score": _score}[options.command](options)
    except MinidiffError as error:
        print(f"time_to_quality: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
