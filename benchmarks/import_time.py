"""CPU time of `import minidiff`, relative to `import torch`.

    python benchmarks/import_time.py [--rounds N]

Every import runs in a fresh interpreter; the imports take turns, so that a busy machine slows all
of them alike. Printed are medians of the CPU time of the interpreter, and their ratio to torch's.
`import minidiff` alone loads no module; the other rows import public names, which load theirs.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

import minidiff

IMPORTS = (
    "import torch",
    "import minidiff",
    "from minidiff import Pipeline",
    "from minidiff import *",
)


def cpu_name() -> str:
    """Return the processor's model name, or its architecture where Linux does not give one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def conditions(threads: int, *libraries: str) -> str:
    """Return what a measurement depends on: machine, versions, threads, and how busy it is."""
    named = [f"Python {platform.python_version()}"]
    for name in ("torch", *libraries):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            named.append(f"{name} {importlib.metadata.version(name)}")
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    plural = "" if threads == 1 else "s"
    return f"{cpu_name()}; {', '.join(named)}; {threads} thread{plural}, {load}"


def cpu_seconds(statement: str) -> float:
    """Return the CPU time (user and system) of a fresh interpreter that runs a statement."""
    arguments = [sys.executable, "-c", statement]
    process = os.posix_spawn(sys.executable, arguments, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status != 0:
        raise SystemExit(f"{statement!r} failed in a fresh interpreter")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each import")
    rounds = parser.parse_args().rounds
    for statement in IMPORTS:
        cpu_seconds(statement)  # fills the disk cache and writes the .pyc files
    times = {statement: [] for statement in IMPORTS}
    for _ in range(rounds):
        for statement in IMPORTS:
            times[statement].append(cpu_seconds(statement))
    medians = {statement: statistics.median(values) for statement, values in times.items()}
    print(f"{cpu_name()}, Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"minidiff {minidiff.__version__}; CPU time, medians of {rounds} fresh interpreters")
    for statement, seconds in medians.items():
        print(f"{statement:32}{seconds:7.3f} s{seconds / medians['import torch']:8.3f}")


if __name__ == "__main__":
    main()
