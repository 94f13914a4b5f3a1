"""A small trained pipeline, shared by the tests that need a trained model."""

import copy
import os
from pathlib import Path

import pytest
import torch

from minidiff.data import load
from minidiff.pipeline import Pipeline
from minidiff.runs import diffusion
from minidiff.runs.folder import open_pipeline
from minidiff.runtime.device import THREADS_VARIABLE
from minidiff.training.config import TrainConfig

if "PYTEST_XDIST_WORKER" in os.environ:  # workers and their processes share the cores
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The command line would time threads while other tests use the cores.
# Workers of xdist inherit the variable from a process that has more threads than they have.
os.environ[THREADS_VARIABLE] = str(torch.get_num_threads())

SMALL = {"channels": (24, 32), "batch_size": 64, "pictures": 1}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A run on the embedded digits: 120 steps of a small network."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    diffusion.train_into(out, TrainConfig(steps=120, **SMALL), load("digits"))
    return out


@pytest.fixture
def pipe(run_folder) -> Pipeline:
    """The pipeline of that run, opened again for every test."""
    return open_pipeline(run_folder)


@pytest.fixture(scope="session")
def latent_folder(tmp_path_factory) -> Path:
    """A folder in the form of Stable Diffusion, with random weights, written by diffusers."""
    from tiny_pipelines import DDIM, stable_diffusion

    path = tmp_path_factory.mktemp("sd")
    stable_diffusion(path, DDIM).save_pretrained(path / "sd")
    return path / "sd"


@pytest.fixture(scope="session")
def _latent_pipe(latent_folder) -> Pipeline:
    return Pipeline.from_pretrained(latent_folder)


@pytest.fixture
def latent_pipe(_latent_pipe) -> Pipeline:
    """The pipeline of that folder, a copy for every test."""
    pipe = copy.copy(_latent_pipe)
    pipe.unet, pipe.vae = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.vae)
    pipe.scheduler, pipe.prompts = copy.copy(pipe.scheduler), copy.copy(pipe.prompts)
    return pipe
