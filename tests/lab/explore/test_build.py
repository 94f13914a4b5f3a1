"""The page: one file without addresses, with every sampler, and with a model's network."""

import json
import re
from pathlib import Path

import pytest
import torch

from minidiff import DDIMScheduler, Pipeline, shipped
from minidiff.cli import main
from minidiff.errors import InvalidArgument
from minidiff.lab.explore import model as module
from minidiff.lab.explore import page
from minidiff.lab.explore.tables import STEPS
from minidiff.nn import UNet
from minidiff.schedulers.core.names import SAMPLERS

OPTIONS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "num_class_embeds": 3,
}
MINE = """
from minidiff.schedulers import Scheduler

class Mine(Scheduler):
    def update(self, x, x0, eps, now, nxt, noise):
        return nxt.alpha * x0 + nxt.sigma * eps
"""


def tiny(**options: object) -> Pipeline:
    """Return a small pipeline of two classes with random weights."""
    torch.manual_seed(0)
    scheduler = DDIMScheduler(clip_sample=False, compat="exact", **options)
    return Pipeline(UNet(**OPTIONS).eval(), scheduler, class_names=("dog", "cat</script>"))


def data_of(html: str) -> dict:
    """Return the data that the scripts of a page read."""
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def plain() -> str:
    made = page()
    assert made.notes == []
    return made.html


def test_the_page_has_no_address_and_is_small(plain: str) -> None:
    assert len(plain.encode()) <= 700_000
    for word in ("http:", "https:", "://", "@import", "import(", "fetch(", "XMLHttpRequest"):
        assert word not in plain
    assert set(re.findall(r'(?:src|href)="([^"]*)"', plain)) == {"data:,"}
    assert not re.search(r"\{\{[\w.]+\}\}", plain)


def test_the_page_has_every_sampler_and_names_none_in_its_scripts(plain: str) -> None:
    data = data_of(plain)
    assert set(data["tables"]["cosine"]) == set(SAMPLERS)
    assert data["steps"] == list(STEPS)
    engine = re.search(r'<script id="engine">(.*?)</script>', plain, re.S)[1]
    code = re.sub(r"//.*", "", engine)
    assert not [name for name in SAMPLERS if re.search(rf"\b{re.escape(name)}\b", code)]


def test_a_plugin_is_in_the_page_and_first_in_its_list(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    out = tmp_path / "page.html"
    assert main(["explore", "--plugin", f"{tmp_path / 'mine.py'}:Mine", "-o", str(out)]) == 0
    data = data_of(out.read_text(encoding="utf-8"))
    assert data["plugins"] == ["Mine"]
    assert next(iter(data["tables"]["linear"])) == "Mine"
    mine, ddim = (data["tables"]["cosine"][name]["10"] for name in ("Mine", "ddim"))
    assert mine["t"] == ddim["t"]
    assert "Mine" not in data["tables"]["flow"]  # its levels are those of a β schedule


def test_a_network_is_in_the_page_with_its_own_schedule() -> None:
    made = page(tiny(beta_schedule="scaled_linear"), "pets")
    data = data_of(made.html)
    model = data["model"]
    assert made.notes == []
    assert model["conditions"] == ["dog", "cat</script>"]
    assert model["inputs"] == [[[[0.0], [1]]], [[[1.0], [1]]]]
    assert model["nothing"] == [[[2.0], [1]]]
    assert model["schedule"] == "model"
    assert set(data["tables"]["model"]) == set(SAMPLERS)
    cosine = page(tiny(beta_schedule="squaredcos_cap_v2"), "pets")
    assert data_of(cosine.html)["model"]["schedule"] == "cosine"


def test_a_network_that_is_too_large_becomes_pictures_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_WEIGHTS", 100)
    pipe = tiny()
    made = page(pipe, "pets")
    model = data_of(made.html)["model"]
    assert re.search(r"pictures instead: its [\d,]+ weights are more than", made.notes[0])
    assert "weights are more" in model["reason"]
    assert (model["pictures"]["rows"], model["pictures"]["columns"]) == (20, 4)


def test_a_network_that_cannot_be_traced_becomes_pictures_and_names_the_operator() -> None:
    pipe = tiny()
    forward = pipe.unet.forward
    pipe.unet.forward = lambda x, t, **c: torch.cumsum(forward(x, t, **c), 0)
    made = page(pipe, "pets")
    assert "the page has no operator aten.cumsum" in made.notes[0]


def test_texts_are_offered_as_given_and_refused_where_a_model_has_none() -> None:
    pipe = Pipeline.from_pretrained(shipped.folder("digits-text"))
    names, inputs = module._conditions(pipe, ["a blue 4"])
    assert (names, inputs) == (["a blue 4"], [["a blue 4"]])
    assert module._conditions(pipe, ())[0] == list(module.PROMPTS)
    pipe.prompts.tokenizer.numbers.pop("green")
    assert module._conditions(pipe, ())[0] == list(module.PROMPTS[1:])
    with pytest.raises(InvalidArgument, match="--text is for models that were trained on captions"):
        module._conditions(tiny(), ["a dog"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "page.txt"], 2, "--out must be a .html file, got page.txt"),
        (["-o", "file/page.html"], 1, "file"),
        (["--text", "a 7"], 2, "--text is for a model: give a run or --model"),
        (["absent"], 1, "absent"),
        (["--model", "mnist", "absent"], 2, "give a run or --model, not both"),
        (["--plugin", "mine.py"], 2, "plugin must be FILE:CLASS"),
        (["--plugin", "file:Mine"], 2, "is not a Python file"),
        (["--plugin", "place.py:Mine"], 2, "conformance test 'inputs unchanged' failed"),
        (["--plugin", "bent.py:Mine"], 2, "plugin Mine: its steps are not linear"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch, capsys, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "place.py").write_text(MINE.replace("return ", "x *= 2; return "))
    (tmp_path / "bent.py").write_text(MINE.replace("* x0 +", "* x0.tanh() +"))
    assert main(["explore", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))
