"""Snapshots of a run under way, from which it is resumed as if never interrupted.

RUN/checkpoints/step-N/
    weights.safetensors     the raw weights
    average.safetensors     their average
    NAME.safetensors        a network that the training keeps as well, see `TrainingState.extras`
    optimizer.safetensors   the tensors of the optimizer's state
    state.json              its numbers; step, seconds, position in the data and in the log, and
                            the losses of the next row
    manifest.json           size and SHA-256 of each of these, written last

A snapshot is written under a temporary name, synced and renamed, so a folder with a snapshot's name
is complete unless the disk damaged it, which the manifest detects. It holds no random state: the
random numbers of a step depend on (seed, step) alone (`training.batches`), and nothing reads
torch's, numpy's or Python's global state. bfloat16 needs no gradient scaler.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.errors import CheckpointError
from minidiff.runtime import files
from minidiff.runtime.distributed import laid_out
from minidiff.runtime.tensors import SUFFIX, check_fit, read_headers, read_tensor, write_tensors
from minidiff.training.loop import TrainingState

FOLDER = "checkpoints"
STATE, MANIFEST = "state.json", "manifest.json"
WEIGHTS, AVERAGE, OPTIMIZER = (f"{s}{SUFFIX}" for s in ("weights", "average", "optimizer"))
FILES = (WEIGHTS, AVERAGE, OPTIMIZER, STATE)
MAX_STATE_BYTES = 1 << 26  # the numbers of an optimizer, a few for every parameter
VERSION = 1
_NAME = re.compile(r"step-([0-9]{6,12})")


# ------------------------------------------------------------------------------------ writing


class Content(NamedTuple):
    """The content of a snapshot: tensors by file, and the numbers of `state.json`."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def content(training: TrainingState) -> Content:
    """Return the content of a snapshot; the live weights are only read.

    Where the weights are sharded, all processes call this.

    Raises:
        CheckpointError: the optimizer's state holds more than tensors, numbers and texts.
        TrainingError: the loss or a gradient was not finite.
    """
    training.guard.check()
    optimizer, moments = _optimizer_state(training.optimizer)
    found = {
        WEIGHTS: training.learner.state_dict(),
        AVERAGE: training.average.model.state_dict(),
        OPTIMIZER: moments,
    }
    found |= {f"{name}{SUFFIX}": extra.state_dict() for name, extra in training.extras.items()}
    state = {
        "version": VERSION,
        "step": training.budget.step,
        "seconds": training.budget.elapsed,
        "images": training.stream.position,
        "averaged": training.average.updates,
        "meter": training.meter.state(),
        "optimizer": optimizer,
    }
    return Content({name: training.world.whole(part) for name, part in found.items()}, state)


def write(run: Path, content: Content, log_bytes: int) -> Path:
    """Write a snapshot.

    Args:
        run: folder of the run.
        content: content of the snapshot.
        log_bytes: length of the log that belongs to it.
    Raises:
        CheckpointError: it cannot be written; earlier snapshots stay intact.
    """
    folder = run / FOLDER / f"step-{content.state['step']:06d}"
    with files.atomic_folder(folder) as temporary:
        for name, tensors in content.tensors.items():
            write_tensors(temporary / name, tensors)
        files.write_json(temporary / STATE, content.state | {"log_bytes": log_bytes})
        files.write_json(temporary / MANIFEST, _manifest(temporary))
    return folder


def _manifest(folder: Path) -> dict[str, Any]:
    return {path.name: _seal(path) for path in sorted(folder.iterdir())}


def _seal(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict, dict[str, Tensor]]:
    """Return the state of an optimizer: its numbers, and its tensors by their place.

    Raises:
        CheckpointError: an entry is neither tensor nor number nor text.
    """
    content = optimizer.state_dict()
    places = {
        f"{owner}.{name}": value
        for owner, entries in content["state"].items()
        for name, value in entries.items()
    }
    tensors = {place: value for place, value in places.items() if isinstance(value, Tensor)}
    numbers = {place: value for place, value in places.items() if place not in tensors}
    groups = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
        for group in content["param_groups"]
    ]
    for name, value in (*numbers.items(), *(pair for group in groups for pair in group.items())):
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(part is None or isinstance(part, bool | int | float | str) for part in parts):
            raise CheckpointError(
                f"the optimizer's {name} cannot be saved: {value!r} is neither tensor nor number"
            )
    return {"state": numbers, "groups": groups}, tensors


def prune(run: Path, keep_last: int) -> None:
    """Delete all snapshots but the last ones and the best, that of the lowest running loss."""
    found = snapshots(run)
    best = min(found, key=_running_loss, default=None)
    for folder in found[:-keep_last]:
        if folder != best:
            # Renamed first: a half-deleted folder must not have a snapshot's name.
            aside = folder.with_name(f".{folder.name}.old{files.TEMPORARY}")
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _running_loss(folder: Path) -> float:
    try:
        loss = files.read_json(folder / STATE, MAX_STATE_BYTES)["meter"]["running"]
    except (CheckpointError, KeyError, TypeError):
        return math.inf
    return loss if isinstance(loss, float) else math.inf


# ------------------------------------------------------------------------------------ reading


def snapshots(run: Path) -> list[Path]:
    """Return the folders with a snapshot's name, oldest first."""
    root = run / FOLDER
    entries = root.iterdir() if root.is_dir() else ()
    named = [entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(named, key=lambda entry: int(_NAME.fullmatch(entry.name)[1]))


def clear_leftovers(run: Path) -> None:
    """Delete the temporary files of a run that was killed while it wrote a snapshot."""
    if (run / FOLDER).is_dir():
        files.clear_temporaries(run / FOLDER)


def newest(run: Path, print_line: Callable[[str], None]) -> Path | None:
    """Return the newest snapshot that verifies; None where there are none at all.

    Args:
        run: folder of the run.
        print_line: called with those that are skipped, and why.
    Raises:
        CheckpointError: there are some, and none verifies.
    """
    found = snapshots(run)
    for folder in reversed(found):
        try:
            verify(folder)
        except CheckpointError as error:
            print_line(f"skipped {folder.name}: {error}")
        else:
            return folder
    if found:
        raise CheckpointError(
            f"{run / FOLDER}: none of {len(found)} snapshots is intact; the run cannot continue, "
            "begin it again with another --out"
        )
    return None


def verify(folder: Path) -> None:
    """Check every file against the manifest. Raises CheckpointError."""
    manifest = files.read_json(folder / MANIFEST)
    for name in dict.fromkeys((*FILES, *manifest)):
        if name not in manifest:
            raise CheckpointError(f"{folder / MANIFEST}: names no {name}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file")
        if manifest[name] != _seal(folder / name):
            raise CheckpointError(f"{folder / name}: is not what was written (size or SHA-256)")


def spent(folder: Path) -> tuple[int, float]:
    """Return the steps and the seconds of a run until a snapshot. Raises CheckpointError."""
    state = files.read_json(folder / STATE, MAX_STATE_BYTES)
    try:
        return int(state["step"]), float(state["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: names no step and seconds") from error


def restore(folder: Path, training: TrainingState) -> int:
    """Restore the state of a training and return the length of the log that belongs to it.

    Args:
        folder: folder of the snapshot.
        training: training with the same config and data.
    Raises:
        CheckpointError: a part is missing, damaged, or of another run. The training must then not
            be used.
    """
    state = files.read_json(folder / STATE, MAX_STATE_BYTES)
    try:
        if state["version"] != VERSION:
            raise CheckpointError(
                f"{folder / STATE}: version {state['version']}, this minidiff reads {VERSION}"
            )
        _load(training.learner, folder / WEIGHTS)
        _load(training.average.model, folder / AVERAGE)
        stored = read_headers([folder / OPTIMIZER])
        tensors = {name: read_tensor(entry) for name, entry in stored.items()}
        _load_optimizer(training.optimizer, state["optimizer"], tensors)
        training.average.updates = state["averaged"]
        training.budget.step, training.budget.elapsed = state["step"], state["seconds"]
        training.stream.position = state["images"]
        for extra in training.planned:
            if (file := folder / f"{extra.name}{SUFFIX}").is_file():
                _load(network := extra.make(), file)
                training.keep(extra, network)
        for extra in training.missing_extras():  # a later network instead would be another run
            raise CheckpointError(f"{folder / extra.name}{SUFFIX}: no such file")
        training.meter.load(state["meter"])
        return state["log_bytes"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not the snapshot of this run ({error!r})") from error


def _load(module: nn.Module, file: Path) -> None:
    """Load weights, which are whole in the file and may be sharded in the module."""
    wanted = module.state_dict()
    stored = read_headers([file])
    check_fit(wanted, stored)
    module.load_state_dict(
        {name: laid_out(read_tensor(entry), wanted[name]) for name, entry in stored.items()}
    )


def _load_optimizer(
    optimizer: torch.optim.Optimizer, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `_optimizer_state` returned."""
    state: dict[int, dict[str, Any]] = {}
    for place, value in {**numbers["state"], **tensors}.items():
        owner, _, name = place.partition(".")
        state.setdefault(int(owner), {})[name] = value
    groups = [
        {name: _like(now.get(name), value) for name, value in group.items()}
        for now, group in zip(optimizer.param_groups, numbers["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, entries in optimizer.state.items():
        for name, value in _of_the_shape_of(parameter, entries.items()):
            # A file holds no strides, but fused kernels need those of the parameter.
            entries[name] = laid_out(value, parameter.detach())


def _like(now: Any, value: Any) -> Any:
    """Return a value of JSON, which has neither tuples nor tensors, in the type of `now`."""
    if isinstance(now, Tensor):
        return torch.full_like(now, value)
    return tuple(value) if isinstance(now, tuple) else value


def _of_the_shape_of(parameter: nn.Parameter, entries: Iterable) -> list[tuple[str, Tensor]]:
    return [(k, v) for k, v in entries if isinstance(v, Tensor) and v.shape == parameter.shape]
