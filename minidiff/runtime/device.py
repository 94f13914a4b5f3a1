"""Defaults for the device, its precision, its threads and the C library's memory."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minidiff.errors import InvalidArgument, one_of, whole_number
from minidiff.names import DEVICES, DTYPE_NAMES

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make float32 the dtype of new tensors and networks; also a decorator of functions.

    Programs may set another one for other models (`torch.set_default_dtype`).
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device of a name such as "cuda:1"; "auto" is the first of cuda, mps and cpu.

    Raises:
        InvalidArgument: an unknown name, or a device that this machine does not have.
    """
    kind, _, number = str(name).partition(":")
    one_of("device", name if kind not in DEVICES else kind, DEVICES)
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, available in there.items() if available))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there[kind] or (number and not (number.isdecimal() and int(number) < count)):
        known = ", ".join(device for device, available in there.items() if available)
        raise InvalidArgument(f"device {name} is not available here; available: {known}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the network's matrix products; "auto" is bfloat16 if it is fast.

    Raises:
        InvalidArgument: an unknown name.
    """
    one_of("dtype", name, ("auto", *DTYPES))
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Without these instructions bfloat16 is emulated, many times slower than float32. Those of
        # AVX-512 alone have 1.4 times the speed of float32 on AMD and 0.6 times on Intel.
        features = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
        intel = "Intel" in str(features.get("cpu_name", ""))
        fast = features.get("amx_bf16") or (features.get("avx512_bf16") and not intel)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Describe the device, its name and the precision in one line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads, cores = torch.get_num_threads(), available_cores()
        count = f"{threads} of {cores}" if threads < cores else f"{threads}"
        name = f"{count} threads" if device.type == "cpu" else "Apple GPU"
    return f"{device.type} ({name}), {str(dtype).removeprefix('torch.')}"


THREADS_VARIABLE = "MINIDIFF_THREADS"
_TRIALS, _OPERATIONS = 3, 10  # of `choose_threads`: some 20 ms on an idle machine


def available_cores() -> int:
    """Return how many processor cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def choose_threads(number: int | str | None = None) -> int:
    """Set the number of threads of the CPU: as given, or one if all of them are slower.

    Threads that wait for each other spin. Where another program uses a core, all threads of a
    small network are tens of times slower than one, and no setting tells so in advance. So a few
    convolutions are timed with one thread and with all. A number that torch has already been
    limited to is never exceeded.

    Args:
        number: number of threads; None for the environment variable MINIDIFF_THREADS, or else the
            faster of one and all.
    Returns:
        The number of threads.
    Raises:
        InvalidArgument: not a whole number from 1.
    """
    given = os.environ.get(THREADS_VARIABLE) if number is None else number
    if given not in (None, ""):
        text = str(given)
        chosen = whole_number("threads", int(text) if text.isdecimal() else given, 1)
    else:
        most = torch.get_num_threads()
        chosen = 1 if most == 1 or _is_faster(1, most) else most
    torch.set_num_threads(chosen)
    return chosen


def _is_faster(few: int, many: int) -> bool:
    """Return True if few threads are faster than many, in alternating trials."""
    x = torch.ones(32, 48, 8, 8).to(memory_format=torch.channels_last)
    weight = torch.full((48, 48, 3, 3), 1e-3)
    seconds: dict[int, list[float]] = {few: [], many: []}
    for _ in range(_TRIALS + 1):  # the first trial starts the threads
        for threads, found in seconds.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            for _ in range(_OPERATIONS):
                torch.relu(torch.nn.functional.conv2d(x, weight, padding=1))
            found.append(time.perf_counter() - started)
    # Medians, without the first trial; the module statistics would cost every import 10 ms.
    few_median, many_median = (sorted(found[1:])[_TRIALS // 2] for found in seconds.values())
    return few_median < many_median


# Options of glibc's <malloc.h> and their values in bytes.
_MALLOPT = {
    -3: 1 << 30,  # M_MMAP_THRESHOLD: smaller blocks come from the heap, not from new pages
    -1: (1 << 31) - 1,  # M_TRIM_THRESHOLD: free memory that stays at the end of the heap
    -2: 64 << 20,  # M_TOP_PAD: steps in which the heap grows
}


def keep_freed_memory() -> bool:
    """Let this process keep up to 2 GiB of freed memory instead of returning it to the system.

    Activations of some MiB are allocated and freed hundreds of times per second. By default glibc
    returns such blocks at once, and the system clears every page of the next one: that takes as
    long as the arithmetic. This is a choice for programs, not for libraries, so the command line
    and the benchmarks call it.

    Returns:
        True if the C library accepted the setting; only glibc (Linux) has it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(
        mallopt(option, value) == 1 for option, value in _MALLOPT.items()
    )
