"""Calls of one pipeline in several threads return what each of them returns alone."""

import threading

import numpy as np
import pytest

from minidiff import Pipeline, schedulers, shipped

CALLS = [
    {"class_labels": [3], "seed": 0, "num_inference_steps": 8, "output_type": "np"},
    {"class_labels": [5], "seed": 1, "num_inference_steps": 19, "output_type": "np"},
]


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler"],
)
def test_two_threads_draw_what_each_draws_alone(name: str) -> None:
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    pipe.scheduler = getattr(schedulers, name).from_config(pipe.scheduler.config)
    alone = [pipe(**call).images for call in CALLS]
    together: list[np.ndarray | None] = [None, None]
    meet = threading.Barrier(2)  # after every step of the first, so that the calls do overlap

    def draw(i: int) -> None:
        steps = iter(range(1000))

        def wait(step: object) -> None:
            if next(steps) < 7:
                meet.wait(timeout=60)

        together[i] = pipe(**CALLS[i], callback=wait).images

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for expected, got in zip(alone, together, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_call_inside_a_callback_changes_nothing() -> None:
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    alone = pipe(**CALLS[0]).images
    within = pipe(**CALLS[0], callback=lambda step: pipe(**CALLS[1] | {"num_inference_steps": 2}))
    np.testing.assert_array_equal(within.images, alone)


def test_the_scheduler_shows_the_grid_of_the_last_call() -> None:
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    scheduler = pipe.scheduler
    pipe(**CALLS[1])
    assert pipe.scheduler is scheduler
    assert len(scheduler.timesteps) == 19


def test_a_callback_ends_a_call_by_either_name_of_the_pipeline() -> None:
    pipe = Pipeline.from_pretrained(shipped.folder("mnist"))
    taken: list[int] = []

    def stop(step: object) -> None:
        taken.append(1)
        pipe._interrupt = len(taken) == 3

    pipe(**CALLS[0], callback=stop)
    assert len(taken) == 3
