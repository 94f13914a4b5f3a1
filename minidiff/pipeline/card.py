"""The model card of a pipeline: the `README.md` of its folder, whose YAML head the Hub reads.

It states what the pipeline and its run know, and no license. The mark below its head says that
minidiff wrote it. A README.md without the mark belongs to someone else and is kept.

Source: https://huggingface.co/docs/hub/model-cards
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minidiff.text.prompts import WordPrompts

if TYPE_CHECKING:
    from minidiff.pipeline import Pipeline

FILE, PICTURE = "README.md", "card.png"
MARK = "<!-- Written by minidiff. Delete this line to keep your edits. -->"
HUB_DATA = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
OPTIONS = "train.json"  # the name of the options in the command


class Facts(NamedTuple):
    """What a model card says beyond the pipeline itself; what is empty is left out.

    Attributes:
        data: name and number of the images that the network was trained on.
        config: options of the training that differ from the defaults.
        command: command line that trained it, with the config in `train.json`.
        scores: lines of a table.
        picture: PNG file of samples, copied into the folder.
    """

    data: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}
    command: str = ""
    scores: str = ""
    picture: Path | None = None


NO_FACTS = Facts()


def write(folder: Path, before: Path, pipe: "Pipeline", facts: Facts) -> None:
    """Write the card of a pipeline, or keep that of someone else.

    Args:
        folder: folder to write into.
        before: folder that it replaces, which may hold a card.
        pipe, facts: what the card describes.
    """
    old = before / FILE
    if old.is_file() and MARK.encode() not in old.read_bytes():
        for kept in filter(Path.is_file, (old, before / PICTURE)):
            shutil.copy2(kept, folder / kept.name, follow_symlinks=False)
        return
    (folder / FILE).write_text(text(pipe, facts), encoding="utf-8")
    if facts.picture is not None:
        shutil.copyfile(facts.picture, folder / PICTURE)


def text(pipe: "Pipeline", facts: Facts) -> str:
    """Return the card of a pipeline as Markdown."""
    data = str(facts.data.get("name", ""))
    shape, names = pipe.image_shape, pipe.class_names
    head = ["library_name: minidiff"]
    if len(shape) == 3:  # the Hub has no task for points
        task = "text-to-image" if pipe.prompts else "unconditional-image-generation"
        head.append(f"pipeline_tag: {task}")
    head += ["tags:", "- diffusion", "- minidiff"]
    head += ["datasets:", f"- {HUB_DATA[data]}"] if data in HUB_DATA else []
    kind = "text-conditional" if pipe.prompts else "class-conditional" if names else "unconditional"
    drawn = "images of {} channels, {} × {} pixels" if len(shape) == 3 else "points of {} numbers"
    lines = [
        "---", *head, "---", MARK, "", "# Diffusion model", "",
        f"A {kind} diffusion model of {drawn.format(*shape)}, saved by minidiff.", "",
        "| part | class | parameters |", "|---|---|---|", *_parts(pipe), "",
        f"By default it samples in {pipe.num_inference_steps} steps at guidance scale "
        f"{pipe.guidance_scale:g}.",
    ]  # fmt: skip
    if names:
        lines += ["", f"Classes: {_code(', '.join(names))}"]
    if data:
        lines += ["", "## Training", "", f"Data: {facts.data['images']} images of {_code(data)}."]
    if facts.config:
        options = json.dumps(facts.config, indent=2, sort_keys=True)
        lines += ["", f"Options, other than the defaults (`{OPTIONS}`):", *_block("json", options)]
    if facts.command:
        lines += ["", "Command:", *_block("sh", facts.command)]
    if facts.scores:
        lines += ["", "## Scores", *_block("text", facts.scores)]
    if facts.picture is not None:
        lines += ["", "## Samples", "", f"![Samples of the model]({PICTURE})"]
    return "\n".join([*lines, "", "## Use", *_block("python", _usage(pipe))]) + "\n"


def _parts(pipe: "Pipeline") -> list[str]:
    """Return a row for every network, and one for the scheduler."""
    encoders = pipe.prompts.encoders if pipe.prompts else ()
    networks = (pipe.unet, pipe.guidance_network, pipe.vae, *encoders)
    names = ("network", "guidance network", "autoencoder", *("text encoder",) * len(encoders))
    rows = [
        f"| {name} | {type(part).__name__} | {sum(p.numel() for p in part.parameters()):,} |"
        for name, part in zip(names, networks, strict=True)
        if part is not None
    ]
    return [*rows, f"| scheduler | {type(pipe.scheduler).__name__} | |"]


def _usage(pipe: "Pipeline") -> str:
    """Return four lines that draw from the folder of the card."""
    prompts = pipe.prompts
    words = prompts.tokenizer.words[0] if isinstance(prompts, WordPrompts) else "a red flower"
    request = f"{words!r}, num_images=1, seed=0" if prompts else "num_images=1, seed=0"
    points = len(pipe.image_shape) != 3
    call = f'pipe({request}, output_type="np").images' if points else f"pipe({request}).images"
    return (
        "from minidiff import Pipeline\n"
        'pipe = Pipeline.from_pretrained(".")  # the folder of this file\n'
        f"images = {call}\n" + ("print(images)" if points else 'images[0].save("sample.png")')
    )


def _block(language: str, content: str) -> list[str]:
    return ["", f"```{language}", content, "```"]


def _code(words: str) -> str:
    """Return words of a user as code on one line."""
    return f"`{' '.join(words.replace('`', chr(39)).split())}`"
