"""Plug-ins: what passes, and what is refused by which line."""

from pathlib import Path

import pytest

from minidiff.errors import InvalidArgument
from minidiff.lab.order import FINE, flow_error, order
from minidiff.lab.plugin import CONFORMANCE, build, conform, load_plugin
from minidiff.schedulers import (
    SCHEDULERS,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

HEAD = "import torch\nfrom minidiff.schedulers import Scheduler\nnumber = 3\nclass Other: pass\n"
MINE = """
class Mine(Scheduler):
    {attributes}
    def update(self, x, x0, eps, now, nxt, noise):
        {body}
"""
DDIM = "return nxt.alpha * x0 + nxt.sigma * eps"


def plugin(folder: Path, body: str = DDIM, attributes: str = "", more: str = "") -> str:
    """Write a plug-in and return its FILE:CLASS."""
    file = folder / "mine.py"
    file.write_text(HEAD + MINE.format(body=body, attributes=attributes) + more)
    return f"{file}:Mine"


def test_a_class_that_passes_is_returned_and_has_its_order(tmp_path: Path) -> None:
    cls = load_plugin(plugin(tmp_path))
    assert order(lambda n: flow_error(cls(**FINE), n), 240) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_the_package_conforms(name: str) -> None:
    conform(SCHEDULERS[name])


@pytest.mark.parametrize(
    ("test", "body", "attributes"),
    [
        ("inputs unchanged", "x += nxt.sigma * eps\n        return x.clone()", ""),
        ("finite", "return x0 / (nxt.sigma * 0)", ""),
        ("finite", "return x0[:, :1]", ""),
        ("finite", "return x0.half()[0]", ""),
        ("same again", f"self.n = getattr(self, 'n', 0) + 1\n        {DDIM} + 1e-3 * self.n", ""),
        ("one by one", "return nxt.alpha * (x0 - x0.mean()) + nxt.sigma * eps", ""),
        ("grid", DDIM, "def set_timesteps(self, n, device=None): self.grid, self.levels = [], []"),
        ("finite", "return x + undefined", ""),
    ],
)
def test_a_broken_one_fails_by_the_name_of_the_test(
    tmp_path: Path, test: str, body: str, attributes: str
) -> None:
    assert test in CONFORMANCE
    with pytest.raises(InvalidArgument, match=f"Mine: conformance test '{test}'") as error:
        load_plugin(plugin(tmp_path, body, attributes))
    assert "\n" not in str(error.value)


def test_what_ignores_the_prediction_type_fails_by_name(tmp_path: Path) -> None:
    wrong = "def _split(self, out, x, level): return out, (x - level.alpha * out) / level.sigma"
    with pytest.raises(InvalidArgument, match="'prediction types' failed: samples differ"):
        load_plugin(plugin(tmp_path, DDIM, wrong))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "must be FILE:CLASS"),
        ("mine.py:", "must be FILE:CLASS"),
        (":Mine", "must be FILE:CLASS"),
        (3, "must be FILE:CLASS"),
        ("absent.py:Mine", "there is no file absent.py"),
        ("mine.py:Yours", "there is no class 'Yours' in the file; it has Other, Mine"),
        (
            "mine.py:Other",
            "must be a subclass of minidiff.schedulers.Scheduler, got a subclass of object",
        ),
        ("mine.py:number", "must be a subclass of minidiff.schedulers.Scheduler, got int"),
        ("note.txt:Mine", "is not a Python file"),
        ("empty.py:Mine", "it has no class"),
        ("raises.py:Mine", "running raises.py raised ZeroDivisionError: division by zero"),
        ("leaves.py:Mine", "running leaves.py raised SystemExit: 3"),
        ("typo.py:Mine", "running typo.py raised SyntaxError"),
        ("needs.py:Mine", r"building Mine\(\) raised"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin(tmp_path)
    needs = "class Mine(Scheduler):\n    def __init__(self, power): self._configure(locals())\n"
    for name, text in {
        "note.txt": "", "empty.py": "", "raises.py": "1 / 0", "leaves.py": "raise SystemExit(3)",
        "typo.py": "class Mine(:", "needs.py": HEAD + needs,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidArgument, match=message) as error:
        load_plugin(spec)
    assert "\n" not in str(error.value)


def test_it_takes_the_levels_of_another_scheduler_and_refuses_what_it_lacks(tmp_path: Path) -> None:
    cls = load_plugin(plugin(tmp_path))
    like = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         timestep_spacing="trailing", compat="exact")  # fmt: skip
    mine = build(cls, like)
    mine.set_timesteps(9)
    like.set_timesteps(9)
    assert mine.config.prediction_type == "v_prediction"
    assert mine.levels == like.levels
    assert build(cls, like, steps_offset=1, timestep_spacing="leading").config.steps_offset == 1
    for other, lacks in ((FlowMatchEulerDiscreteScheduler(), "flow"), (EDMEulerScheduler(), "EDM")):
        with pytest.raises(InvalidArgument, match=f"Mine does not have the noise levels.*{lacks}"):
            build(cls, other)
    learned = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    with pytest.raises(InvalidArgument, match="Mine has no variance_type, but"):
        build(cls, learned)
    for other in (EDMEulerScheduler, FlowMatchEulerDiscreteScheduler):
        with pytest.raises(InvalidArgument, match="does not have the noise levels of DDIMS"):
            build(other, like)
    edm = build(EDMDPMSolverMultistepScheduler, EDMEulerScheduler(sigma_max=30.0))
    assert edm.config.sigma_max == 30.0
    with pytest.raises(InvalidArgument, match="Mine has no option 'eta'; it has num_train"):
        build(cls, like, eta=1.0)
    flow = build(DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert (flow.config.use_flow_sigmas, flow.config.flow_shift) == (True, 3.0)
