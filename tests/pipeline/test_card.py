"""The model card of a pipeline: what the Hub reads in it, and whose file is kept."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_pipelines import digits, stable_diffusion

from minidiff import Pipeline, shipped
from minidiff.pipeline import card
from minidiff.pipeline.card import Facts


def read_stable_diffusion(folder: Path) -> Pipeline:
    stable_diffusion(folder).save_pretrained(folder / "theirs")
    return Pipeline.from_pretrained(folder / "theirs")


def saved(pipe: Pipeline, folder: Path, **facts: object) -> str:
    pipe.save_pretrained(folder, facts=Facts(**facts))
    return (folder / card.FILE).read_text(encoding="utf-8")


@pytest.fixture(params=["digits", "sd", "words"])
def pipe(request, tmp_path):
    if request.param == "sd":
        return read_stable_diffusion(tmp_path)
    if request.param == "words":
        return Pipeline.from_pretrained(shipped.folder("digits-text"))
    return digits()


def test_the_hub_reads_the_head_and_finds_no_license(pipe, tmp_path):
    saved(pipe, tmp_path / "model")
    task = "text-to-image" if pipe.prompts else "unconditional-image-generation"
    assert ModelCard.load(tmp_path / "model" / card.FILE).data.to_dict() == {
        "library_name": "minidiff",
        "pipeline_tag": task,
        "tags": ["diffusion", "minidiff"],
    }


@pytest.mark.parametrize(("name", "hub"), [("mnist", ["ylecun/mnist"]), ("my photos", None)])
def test_the_head_names_data_that_the_hub_has(name, hub, tmp_path):
    saved(digits(), tmp_path / "model", data={"name": name, "images": 7})
    head = ModelCard.load(tmp_path / "model" / card.FILE)
    assert head.data.datasets == hub
    assert f"Data: 7 images of `{name}`." in head.text


def test_the_four_lines_draw_what_the_pipeline_draws(pipe, tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", saved(pipe, tmp_path / "model"), re.S)[1]
    assert len(block.splitlines()) == 4
    monkeypatch.chdir(tmp_path / "model")
    names: dict = {}
    exec(compile(block, card.FILE, "exec"), names)
    assert Path("sample.png").is_file()
    height, width = pipe.image_shape[1:]
    assert names["images"][0].size == (width, height)


def test_the_table_has_the_parameters_of_every_network(pipe, tmp_path):
    text = saved(pipe, tmp_path / "model")
    networks = [pipe.unet, pipe.vae, *(pipe.prompts.encoders if pipe.prompts else ())]
    for network in (net for net in networks if net is not None):
        count = sum(weight.numel() for weight in network.parameters())
        assert f"| {type(network).__name__} | {count:,} |" in text


def test_a_card_without_facts_says_nothing_about_a_training(pipe, tmp_path):
    text = saved(pipe, tmp_path / "model")
    assert re.findall(r"^#+ .*", text, re.M) == ["# Diffusion model", "## Use"]


def test_saving_twice_gives_the_same_bytes(pipe, tmp_path):
    assert saved(pipe, tmp_path / "one") == saved(pipe, tmp_path / "other")
    assert saved(pipe, tmp_path / "one") == saved(pipe, tmp_path / "other")


def test_a_card_of_someone_else_and_its_picture_stay(tmp_path):
    pipe, folder = digits(), tmp_path / "model"
    saved(pipe, folder)
    mine = {card.FILE: b"my own words \xff", card.PICTURE: b"my picture"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    pipe.guidance_scale = 3.0
    pipe.save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in mine} == mine
    assert Pipeline.from_pretrained(folder).guidance_scale == 3.0


def test_a_card_of_minidiff_is_written_again(tmp_path):
    pipe = digits()
    saved(pipe, tmp_path / "model", scores="FD 3.0")
    pipe.num_inference_steps = 17
    text = saved(pipe, tmp_path / "model")
    assert "samples in 17 steps" in text
    assert "FD 3.0" not in text


def test_names_cannot_leave_their_place_in_the_card(tmp_path):
    pipe = digits()
    names = ["a`b", "two\n# lines", *"23456789"]
    text = card.text(
        Pipeline(pipe.unet, pipe.scheduler, class_names=names),
        Facts(data={"name": "x\n---\n# y`", "images": 1}),
    )
    assert "Classes: `a'b, two # lines, 2, 3, 4, 5, 6, 7, 8, 9`" in text
    assert "images of `x --- # y'`." in text


def test_diffusers_reads_a_folder_with_a_card(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pipe = read_stable_diffusion(tmp_path)
    saved(pipe, tmp_path / "model")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert torch.equal(theirs.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_facts_appear_as_they_are(tmp_path):
    config = {"steps": 3, "channels": (4, 4)}
    text = saved(digits(), tmp_path / "m", config=config, command="minidiff train", scores="a  b")
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])["channels"] == [4, 4]
    assert "```sh\nminidiff train\n```" in text
    assert "## Scores\n\n```text\na  b\n```" in text
