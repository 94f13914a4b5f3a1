"""How much `import minidiff` costs beside `import torch`, in fresh interpreters run in turn.

python benchmarks/import_time.py [--rounds N]
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import minidiff

MODULES = ("torch", "minidiff")


def cpu_name() -> str:
    """The processor's model name; what `platform` knows where there is no /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(module: str) -> float:
    """Wall-clock time of a fresh interpreter that imports one module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    for module in MODULES:
        seconds(module)  # fills the disk cache and writes the .pyc files
    times = {module: [] for module in MODULES}
    for _ in range(rounds):
        for module in MODULES:
            times[module].append(seconds(module))
    base, ours = (statistics.median(times[module]) for module in MODULES)
    print(f"{cpu_name()}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}: {base:.3f} s")
    print(f"minidiff {minidiff.__version__}: {ours:.3f} s")
    print(f"ratio {ours / base:.3f} (medians of {rounds} alternating runs)")


if __name__ == "__main__":
    main()
