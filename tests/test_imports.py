"""The floors of the house: imports go down, networks and samplers never meet."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minidiff

ROOT = Path(minidiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A file imports from lower floors, or within its folder. The errors lie below everything.
FLOORS = {
    "errors": -1,
    "recorded": -1,
    "schedule": 0,
    "checkpoint": 0,
    "weights": 0.5,
    "noise": 0,
    "device": 0,
    "prediction": 1,
    "tokenizer": 0.5,
    "words": 0.7,
    "nn": 1,
    "guidance": 1.5,
    "exact": 0.5,  # data draws toys from it
    "data": 1,
    "schedulers": 2,
    "metrics": 2,
    "likelihood": 3,
    "report": 3,
    "plot": 2,
    "sample": 2.5,
    "order": 3,
    "ledger": 4,
    "samplers": 3,
    "train_classifier": 3,
    "prompt": 3,
    "objective": 3,
    "objective_options": 3.3,
    "average": 4.5,
    "muon": 4.5,
    "stable_target": 1,
    "train_config": 3.6,
    "presets": 4,
    "pipeline_folder": 3.5,
    "pictures": 3,
    "shipped": 3,
    "space": 3,
    "inpaint": 3.2,
    "start": 3.3,
    "pipeline_input": 3.5,
    "pipeline": 4,
    "latents": 2,
    "learner": 4.5,  # it builds a Pipeline
    "distributed": 4,
    "batches": 4.7,
    "progress": 4.7,
    "loop": 4.8,
    "train": 5,
    "snapshot": 5.3,
    "keeper": 5.6,
    "edit": 5,
    "windows": 5,
    "evaluation": 5,
    "run_folder": 5.8,
    "run": 6,
    "check": 6.5,
    "demo": 7,
    "train_vae": 5,
    "run_vae": 6,
    "cli": 8,
    "__main__": 9,
    "__init__": 9,  # the public names
}


def house_name(path: Path) -> str:
    """The file or folder of the table that a path belongs to."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """What a file imports of minidiff, wherever in the file, as names of the table."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            modules = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        else:
            continue
        for parts in (module.split(".") for module in modules):
            if parts[0] == "minidiff" and len(parts) > 1 and not parts[1].startswith("__"):
                names.add(parts[1])
    return names


def test_every_file_has_a_floor_and_every_floor_a_file() -> None:
    assert {house_name(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_to_a_lower_floor_or_stay_in_their_folder(path: Path) -> None:
    mine = house_name(path)
    for name in imported(path) - {mine}:
        assert FLOORS[name] < FLOORS[mine], f"{mine} imports {name}"


def reached(name: str) -> set[str]:
    """All that a file or folder of the table needs, directly or not."""
    seen, todo = set(), {name}
    while todo:
        seen |= todo
        todo = set().union(*(imported(p) for p in FILES if house_name(p) in todo)) - seen
    return seen - {name}


def test_networks_know_no_diffusion_and_diffusion_no_networks() -> None:
    assert reached("nn") <= {"errors", "checkpoint", "weights"}
    assert "nn" not in reached("schedulers") | reached("sample") | reached("guidance")


def test_cumulative_products_occur_only_where_the_schedule_is() -> None:
    users = {p.name for p in FILES if re.search(r"\bcumprod\b", p.read_text(encoding="utf-8"))}
    assert users == {"schedule.py"}


IMPORT = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import minidiff
print(*sorted({name.split(".")[0] for name in sys.modules}))
print(*(p for p in opened if p.startswith(sys.argv[1])), sep="|")
"""


def test_importing_loads_no_drawing_library_and_reads_no_data() -> None:
    out = subprocess.run(
        [sys.executable, "-c", IMPORT, str(ROOT)], capture_output=True, text=True, check=True
    )
    modules, opened = out.stdout.split("\n")[:2]
    assert not {"matplotlib", "PIL", "diffusers", "scipy", "transformers"} & set(modules.split())
    assert not [p for p in opened.split("|") if p and not p.endswith((".py", ".pyc"))]


BEYOND_TORCH = """
import sys
import torch
before = set(sys.modules)
import minidiff
print(*sorted({".".join(name.split(".")[:2]) for name in set(sys.modules) - before}))
"""


def test_importing_brings_nothing_beyond_torch_but_safetensors() -> None:
    out = subprocess.run(
        [sys.executable, "-c", BEYOND_TORCH], capture_output=True, text=True, check=True
    )
    others = {name for name in out.stdout.split() if name.split(".")[0] != "minidiff"}
    # torch._dynamo, torch.distributed.fsdp or sympy would cost every command a second.
    assert others <= {"safetensors", "safetensors._safetensors_rust", "safetensors.torch"}


def test_the_public_names_are_there() -> None:
    assert all(hasattr(minidiff, name) for name in minidiff.__all__)
    kinds = {name: (not name.isupper(), name[0].islower()) for name in minidiff.__all__}
    ordered = sorted(kinds, key=lambda name: (kinds[name], name))  # constants, classes, functions
    assert minidiff.__all__ == ordered
