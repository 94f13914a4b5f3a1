"""The command `python -m minidiff.teach`: lists of exercises, and the wall of broken digits."""

import argparse
import sys
import textwrap

from minidiff.errors import MinidiffError
from minidiff.teach import BUGS, EXERCISES


def listing() -> str:
    """Return the exercises by notebook, and the planted bugs without what is wrong in them."""
    lines = []
    for name, one in EXERCISES.items():
        task = textwrap.shorten(one.task, 68, placeholder=" …")
        lines.append(f"{one.notebook:02d}  {name:<15} {len(one.wrong)} slips  {task}")
    lines.append("")
    for name, bug in BUGS.items():
        task = textwrap.shorten(bug.exercise.task, 68, placeholder=" …")
        lines.append(f"{bug.exercise.notebook:02d}  {name:<15} bug      {task}")
    slips = sum(len(one.wrong) for one in EXERCISES.values())
    slips += sum(len(bug.exercise.wrong) for bug in BUGS.values())
    lines.append("")
    lines.append(
        f"{len(EXERCISES)} exercises, {len(BUGS)} planted bugs, {slips} wrong answers with a hint"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m minidiff.teach", description="Exercises and planted bugs of the notebooks."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="list the exercises and planted bugs")
    what.add_argument("--guide", action="store_true", help="print the table of the field guide")
    what.add_argument(
        "--wall", metavar="FILE", help="draw digits with each planted bug at its real strength"
    )
    options = parser.parse_args(arguments)
    try:
        if options.list:
            print(listing())
        elif options.guide:
            from minidiff.teach.guide import table

            print(table())
        else:
            from minidiff.teach.wall import draw

            draw(options.wall)
    except (MinidiffError, OSError) as error:
        print(f"minidiff.teach: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
