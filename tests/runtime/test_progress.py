"""Progress bars: who sees one, where, and how many at a time."""

import io
import sys

import pytest

from minidiff import train
from minidiff.data import load
from minidiff.errors import InvalidArgument
from minidiff.runtime import progress
from minidiff.runtime.progress import progress_bar
from minidiff.training.config import TrainConfig


class Terminal(io.StringIO):
    """A terminal that remembers what was written."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch) -> Terminal:
    """Make a terminal the standard error; a fixture cannot, as pytest replaces it afterwards."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that tqdm reads, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_bar_appears_by_itself_only_where_someone_watches(clock, monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress_bar(10) as bar:
        clock[0] += 2
        bar.update(5)
    assert "5/10" in terminal.getvalue()
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress_bar(10) as bar:
        clock[0] += 2
        bar.update(5)
    assert not pipe.getvalue()


def test_a_notebook_counts_as_watched(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.delitem(sys.modules, "ipykernel.iostream", raising=False)
    assert not progress.is_watched()
    monkeypatch.setitem(sys.modules, "ipykernel.iostream", progress)
    assert progress.is_watched()


def test_false_silences_a_bar_and_true_shows_one_without_a_terminal(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress_bar(10, False) as bar:
        bar.update(10)
    assert not terminal.getvalue()
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress_bar(10, True) as bar:
        bar.update(10)
    assert "10/10" in pipe.getvalue()


def test_what_takes_less_than_a_second_shows_no_bar_by_itself(clock, monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress_bar(10) as bar:
        clock[0] += 0.5
        bar.update(10)
    assert not terminal.getvalue()


def test_one_bar_at_a_time(clock, monkeypatch):
    terminal = on_terminal(monkeypatch)
    with progress_bar(10, desc="outer") as outer:
        with progress_bar(10, desc="inner") as inner:
            clock[0] += 2
            inner.update(10)
        outer.update(10)
    assert "outer" in terminal.getvalue()
    assert "inner" not in terminal.getvalue()
    with pytest.raises(ValueError, match="of the block"), progress_bar(1):
        raise ValueError("of the block")
    with progress_bar(1, desc="next") as bar:
        clock[0] += 2
        bar.update()
    assert "next" in terminal.getvalue()


def test_without_a_terminal_there_is_a_line_a_minute(monkeypatch, clock):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress_bar(600, True, desc="training") as bar:
        for _ in range(600):
            clock[0] += 1
            bar.update()
    lines = pipe.getvalue().splitlines()
    assert 9 <= len(lines) <= 13  # the first, the last, and one a minute for ten minutes
    assert all(line.startswith("training:") for line in lines)
    assert "\r" not in pipe.getvalue()
    assert "600/600" in lines[-1]


def test_training_and_sampling_show_no_bar_in_a_pipe_and_one_when_given_true(capsys):
    config = TrainConfig(steps=2, batch_size=4, channels=(8, 8), pictures=0)
    pipe = train(config, load("digits"))
    pipe(num_images=1, num_inference_steps=2)
    assert not capsys.readouterr().err
    train(config, load("digits"), progress=True)
    assert "training 100%" in capsys.readouterr().err
    pipe(num_images=1, num_inference_steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    with pytest.raises(InvalidArgument, match="progress must be True or False, got 1"):
        pipe(num_images=1, progress=1)


def test_pictures_along_the_way_open_no_second_bar(monkeypatch):
    terminal = on_terminal(monkeypatch)
    config = TrainConfig(steps=4, batch_size=4, channels=(8, 8), pictures=2)
    train(
        config,
        load("digits"),
        picture=lambda pipe, step: pipe(num_images=1, num_inference_steps=2),
        progress=True,
    )
    shown = terminal.getvalue()
    assert "training 100%" in shown
    assert "step/s" not in shown
    assert "it/s" not in shown
