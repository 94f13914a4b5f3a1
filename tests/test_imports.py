"""The floors of the house: imports go down, networks and samplers never meet."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minidiff
from minidiff.cli import COMMANDS

ROOT = Path(minidiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Floors are folders, and the files beside them. A file imports from lower floors, or within its
# folder. Metrics lie above training, because a classifier is trained by the loop of all trainings.
FLOORS = [
    {"errors", "names"},
    {"schedule", "noise", "runtime"},
    {"prediction", "exact", "nn"},
    {"guidance", "schedulers", "images"},
    {"sample", "objective", "text"},
    {"data", "pipeline"},
    {"training", "shipped"},
    {"metrics"},
    {"runs", "engines"},
    {"adapters"},
    {"modalities"},
    {"lab"},
    {"teach"},
    {"cli"},
]
# Imports to a higher floor, inside a method that only starts what is there.
LATE = {"pipeline/late.py": {"engines", "adapters"}}
FRONT = {"__init__", "__main__"}  # the public names and the command: above every floor
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FLOOR |= dict.fromkeys(FRONT, len(FLOORS))


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
    assert {house_name(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_to_a_lower_floor_or_stay_in_their_folder(path: Path) -> None:
    mine = house_name(path)
    for name in imported(path) - {mine} - LATE.get(path.relative_to(ROOT).as_posix(), set()):
        assert FLOOR[name] < FLOOR[mine], f"{mine} imports {name}"


def reached(name: str) -> set[str]:
    """All that a file or folder of the table needs, directly or not."""
    seen, todo = set(), {name}
    while todo:
        seen |= todo
        todo = set().union(*(imported(p) for p in FILES if house_name(p) in todo)) - seen
    return seen - {name}


def test_networks_know_no_diffusion_and_diffusion_no_networks() -> None:
    assert reached("nn") <= {"errors", "names", "runtime"}
    assert "nn" not in reached("schedulers") | reached("sample") | reached("guidance")


def test_cumulative_products_occur_only_where_the_schedule_is() -> None:
    framework = [p for p in FILES if house_name(p) != "teach"]  # where it is an exercise
    users = {p.name for p in framework if re.search(r"\bcumprod\b", p.read_text(encoding="utf-8"))}
    assert users == {"schedule.py"}


IMPORT = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from minidiff import *
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
from minidiff import *
print(*sorted({".".join(name.split(".")[:2]) for name in set(sys.modules) - before}))
"""


def test_importing_brings_nothing_beyond_torch_but_safetensors() -> None:
    out = subprocess.run(
        [sys.executable, "-c", BEYOND_TORCH], capture_output=True, text=True, check=True
    )
    others = {name for name in out.stdout.split() if name.split(".")[0] != "minidiff"}
    # torch._dynamo, torch.distributed.fsdp or sympy would cost every command a second.
    assert others <= {"safetensors", "safetensors._safetensors_rust", "safetensors.torch"}


ALONE = """
import minidiff, sys
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("minidiff", "torch")))
"""


def test_importing_minidiff_alone_imports_neither_torch_nor_any_of_its_modules() -> None:
    out = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["minidiff"]


HELP = """
import sys
from minidiff.cli import main
try:
    main(sys.argv[1:])
except SystemExit as exit_:
    print(exit_.code)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
HEAVY = {"torch", "numpy", "PIL", "matplotlib", "safetensors", "diffusers", "transformers"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        *(([command, "--help"], 0) for command in COMMANDS),
        *(([command, "--no-such-flag"], 2) for command in COMMANDS),
        ([], 2),
        (["evaluat"], 2),
        (["check"], 2),
        (["train", "--preset", "nosuch"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_help_and_wrong_calls_need_neither_torch_nor_numpy(words: list[str], code: int) -> None:
    out = subprocess.run([sys.executable, "-c", HELP, *words], capture_output=True, text=True)
    *_, exit_code, modules = out.stdout.splitlines()
    assert int(exit_code) == code, out.stderr
    assert not HEAVY & set(modules.split())


def test_names_imports_nothing_of_the_package() -> None:
    assert not imported(ROOT / "names.py")


def test_public_names_are_imported_from_the_modules_that_type_checkers_see() -> None:
    (block,) = (
        node
        for node in ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    )
    seen = {a.name: line.module for line in block.body for a in line.names}
    assert seen == {name: f"minidiff.{home}" for name, home in minidiff._MODULES.items()}
    assert set(dir(minidiff)) >= set(minidiff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = minidiff.nothing


def test_the_public_names_are_there() -> None:
    assert minidiff.__all__ == list(minidiff._MODULES)
    assert all(hasattr(minidiff, name) for name in minidiff.__all__)
    kinds = {name: (not name.isupper(), name[0].islower()) for name in minidiff.__all__}
    ordered = sorted(kinds, key=lambda name: (kinds[name], name))  # constants, classes, functions
    assert minidiff.__all__ == ordered
