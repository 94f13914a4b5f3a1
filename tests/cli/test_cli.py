"""The command line: files that it writes, one line for every kind of bad input, and its help."""

import argparse
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minidiff import __version__, cli, names, shipped
from minidiff.cli import main, parser
from minidiff.cli.commands.make.train import caution
from minidiff.pipeline import Pipeline
from minidiff.training.config import OPTIONS, TrainConfig
from minidiff.training.presets import PRESETS

TINY = ["--steps", "2", "--channels", "8,8", "--batch-size", "4", "--pictures", "0"]


def test_sample_writes_a_grid_and_arrays_with_every_class_equally_often(run_folder, tmp_path):
    png, npz = tmp_path / "new" / "grid.png", tmp_path / "x.npz"
    call = ["sample", str(run_folder), "--num", "20", "--steps", "2", "--seed", "5"]
    assert main([*call, "--png", str(png), "--npz", str(npz)]) == 0
    with np.load(npz, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (20, 16, 16, 1)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2] * 10
    picture = np.asarray(Image.open(png))
    assert np.array_equal(picture[:32:2, :32:2], images[0, :, :, 0])  # each pixel is 2 × 2

    assert main([*call, "--class", "7", "--npz", str(npz), "--sampler", "ddim"]) == 0
    with np.load(npz, allow_pickle=False) as file:
        assert (file["labels"] == 7).all()


def test_the_same_seed_gives_the_same_file_whatever_the_batch_size(run_folder, tmp_path):
    arrays = []
    for batch_size in ("3", "250"):
        call = ["sample", str(run_folder / "model"), "--num", "8", "--steps", "3", "--seed", "1"]
        npz = tmp_path / f"{batch_size}.npz"
        assert main([*call, "--batch-size", batch_size, "--npz", str(npz)]) == 0
        with np.load(npz, allow_pickle=False) as file:
            arrays.append(file["images"].astype(int))
    assert np.abs(arrays[0] - arrays[1]).max() <= 1


def test_sample_changes_an_image_and_keeps_it_outside_the_mask(run_folder, tmp_path):
    """Check it with files in colour for a model of grey images."""
    shades = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    white = np.zeros((16, 16), np.uint8)
    white[:8] = 255
    for name, array in (("image", shades), ("mask", white)):
        Image.fromarray(array).convert("RGB").save(tmp_path / f"{name}.png")
    given = ["--image", str(tmp_path / "image.png"), "--class", "7"]

    def made(*more: str) -> np.ndarray:
        npz = tmp_path / "x.npz"
        call = ["sample", str(run_folder), "--num", "2", "--steps", "4", "--npz", str(npz)]
        assert main([*call, *given, *more]) == 0
        with np.load(npz, allow_pickle=False) as file:
            return file["images"][..., 0]

    assert np.array_equal(made("--strength", "0"), np.stack([shades] * 2))
    changed = made("--strength", "0.5")
    assert (changed != shades).mean() > 0.5
    filled = made("--mask", str(tmp_path / "mask.png"))
    assert np.array_equal(filled[:, 8:], np.stack([shades[8:]] * 2))
    assert (filled[:, :8] != shades[:8]).mean() > 0.5
    for more in (
        ("--guidance-rescale", "0.5", "--guidance-interval", "0.5", "3"),
        ("--reconstruction-guidance", "5"),
    ):
        again = made("--mask", str(tmp_path / "mask.png"), *more)
        assert np.array_equal(again[:, 8:], filled[:, 8:])
        assert not np.array_equal(again, filled)


def test_train_writes_a_run_with_its_data_options_log_and_samples(run_folder, tmp_path):
    config = json.loads((run_folder / "config.json").read_text())
    about = config["data"]
    assert about.pop("digests").keys() == {"pixels", "labels"}
    assert about == {
        "name": "digits", "images": 10000, "channels": 1, "height": 16, "width": 16,
        "class_names": list("0123456789"),
    }  # fmt: skip
    assert config["train"]["steps"] == 120
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 120
    assert rows[-1]["images"] == 120 * 64
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (run_folder / "samples.png").is_file()


def test_train_reads_a_folder_of_images(tmp_path):
    for name, shade in (("dark", 30), ("light", 220)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.full((12, 12, 3), shade + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    run = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "photos"), "--out", str(run), *TINY]) == 0
    npz = tmp_path / "x.npz"
    assert main(["sample", str(run), "--num", "4", "--steps", "1", "--npz", str(npz)]) == 0
    with np.load(npz, allow_pickle=False) as file:
        assert file["images"].shape == (4, 12, 12, 3)
        assert file["labels"].tolist() == [0, 1, 0, 1]


def bad_mnist(folder, damage):
    """Write the four IDX files for two images, then damage one."""

    def idx(magic, *shape):
        body = b"".join(n.to_bytes(4, "big") for n in (magic, *shape))
        return gzip.compress(body + bytes(int(np.prod(shape))))

    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(2051, 2, 28, 28))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(2049, 2))
    path = folder / "train-images-idx3-ubyte.gz"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(idx(2049, 2))


@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("", 2, "COMMAND"),
        ("sampel", 2, "; did you mean sample? (see minidiff --help)"),
        ("train --lr 1e-3", 2, "--lr 1e-3; did you mean --learning-rate? (see minidiff train --he"),
        ("train --learning_rate=1", 2, "did you mean --learning-rate? (see minidiff train --help)"),
        ("sample RUN --numm 3", 2, "did you mean --num? (see minidiff sample --help)"),
        ("train --preset mnits --out OUT", 2, "got 'mnits'; did you mean mnist? (see minidiff tr"),
        ("sample --model minst --png OUT/x.png", 2, "got 'minst'; did you mean mnist?"),
        ("sample RUN --sampler dpmm++ --png OUT/x.png", 2, "; did you mean dpm++"),
        ("sample RUN --sampler dpmpp --png OUT/x.png", 2, "; did you mean dpm++?"),
        ("sample RUN --sampler sde-dpmpp --png OUT/x.png", 2, "; did you mean sde-dpm++?"),
        ("train --data digit --out OUT --steps 1", 2, "got 'digit'; did you mean digits?"),
        ("paint", 2, "'paint' is not a command; begin with one of demo, train, "),
        ("--nonsense", 2, "'--nonsense' is not a command; begin with one of demo, train, "),
        ("--seed 3 train", 2, "'--seed' is not a command; begin with one of demo, train, "),
        ("sample EMPTY", 2, "run must be the path of a file or folder, got ''"),
        ("evaluate EMPTY", 2, "run must be the path of a file or folder, got ''"),
        ("sample RUN --png EMPTY", 2, "--png must be the path of a file or folder, got ''"),
        ("train --data EMPTY --out OUT --steps 1", 2, "--data must be the path of a file or"),
        ("train --data digits --out EMPTY --steps 1", 2, "--out must be the path of a file or"),
        ("train --data digits", 2, "--out"),
        ("train", 2, "give --data NAME or FOLDER (digits, mnist, cifar10, captions), --out FOLD"),
        (
            "train --preset mnist",
            2,
            "give --data-dir FOLDER with its IDX files (--download fetches",
        ),
        ("train --preset mnist", 2, ", --out FOLDER (or --resume RUN)"),
        (
            "train-vae --data cifar10",
            2,
            "give --minutes or --steps, --data-dir FOLDER with its bin",
        ),
        ("list nosuch", 2, "must be one of models, data, presets, samplers, objectives, metrics"),
        ("list sampler", 2, "got 'sampler'; did you mean samplers?"),
        ("train --data digits --out OUT --minutes 1 --steps 5", 2, "either minutes or steps"),
        ("train --data digits --out OUT --minutes nan", 2, "minutes must be"),
        ("train --data digits --out OUT --minutes -1", 2, "minutes must be"),
        ("train --data digits --out OUT --minutes 0", 2, "minutes must be above 0"),
        ("train --data digits --out OUT --steps 0", 2, "steps must be in 1..1000000000000, got 0"),
        ("train --data digits --out OUT --steps 1.5", 2, "--steps"),
        ("train --data nosuch --out OUT --steps 1", 2, "digits, mnist"),
        ("train --data digits --out OUT --steps 1 --channels x", 2, "--channels"),
        ("train --data digits --out OUT --steps 1 --channels 8,0", 2, "channels must be at"),
        ("train --data digits --out OUT --steps 1 --channels 1", 2, "block_out_channels"),
        ("train --data digits --out OUT --steps 1 --layers 99", 2, "layers_per_block"),
        ("train --data digits --out OUT --steps 1 --sampling-steps 2000", 2, "in 1..1000"),
        ("train --data digits --out OUT --steps 1 --block 3", 2, "block must divide"),
        ("train --out OUT --steps 1", 2, "give --data NAME"),
        ("train --preset nosuch --out OUT", 2, "digits"),
        ("train --preset digits --config NONE.json --out OUT", 1, "no such file"),
        ("train --preset digits --config NONE.ini --out OUT", 2, ".json or .toml"),
        ("train --preset digits --minutes 1 --steps 5 --out OUT", 2, "either minutes or steps"),
        (
            "train --data digits --out OUT --steps 1 --prediction-type edm --noise-levels "
            "logit_normal",
            2,
            "'edm' must be one of log_normal, uniform",
        ),
        ("train --data digits --out OUT --steps 1 --beta-schedule x", 2, "linear, scaled_linear"),
        ("train --data digits --out OUT --steps 1 --device tpu", 2, "auto, cpu, cuda, mps"),
        ("train --data digits --out OUT --steps 1 --dtype int8", 2, "float32, bfloat16"),
        (
            "train --data digits --out OUT --steps 1 --device cpu --cuda-graph",
            2,
            "the device is cpu",
        ),
        ("train --data digits --out OUT --steps 1 --seed -1", 2, "seed must be in"),
        ("train --data digits --out FILE/x --steps 1", 1, "cannot be written"),
        ("train --data digits --out FULL --steps 1", 1, "not an empty folder"),
        ("train --data mnist --out OUT --steps 1", 2, "--data-dir"),
        ("train --data digits --download --out OUT --steps 1", 2, "download is for mnist"),
        ("train --data mnist --data-dir NONE --out OUT --steps 1", 1, "no such folder"),
        ("train --data mnist --data-dir missing --out OUT --steps 1", 1, "train-images-idx3"),
        ("train --data mnist --data-dir truncated --out OUT --steps 1", 1, "train-images-idx3"),
        ("train --data mnist --data-dir wrong --out OUT --steps 1", 1, "train-images-idx3"),
        ("sample NONE --png x.png", 1, "none: no such folder"),
        ("sample OUTSIDE --png x.png", 1, "outside: no such folder; did you mean outsides?"),
        ("check OUTSIDE", 1, "outside: no such folder; did you mean outsides?"),
        (
            "check mnist",
            2,
            "mnist is a model that ships with minidiff: see minidiff evaluate mnist",
        ),
        ("check RUN/model", 1, "no such file"),
        ("sample RUN --png OUT/x --npz OUT/x", 2, "two files"),
        ("sample RUN --pn OUT/x", 2, "--pn"),
        ("sample RUN --png FILE/x.png", 1, "cannot be written"),
        ("sample RUN --png OUT/x.png --steps 0", 2, "num_inference_steps must be in 1..1000"),
        ("sample RUN --png OUT/x.png --steps 2000", 2, "num_inference_steps must be in 1..1000"),
        ("sample RUN --png OUT/x.png --steps two", 2, "--steps"),
        ("sample RUN --png OUT/x.png --guidance nan", 2, "guidance_scale must be finite"),
        (
            "sample RUN --png OUT/x.png --class 10",
            2,
            "--class must be one of 0, 1,",
        ),
        ("sample RUN --png OUT/x.png --num 0", 2, "num_images"),
        ("sample RUN --png OUT/x.png --sampler euler2", 2, "ddpm, ddim, euler"),
        ("sample RUN --png OUT/x.png --eta 0.5", 2, "eta must be None for"),
        ("sample RUN --png OUT/x.png --sampler ddim --eta 2", 2, "eta must be in"),
        ("sample RUN cat --png OUT/x.png", 2, "a text is for models with captions"),
        ("sample RUN --negative cat --png OUT/x.png", 2, "negative_prompt must be None"),
        ("sample RUN --strength 0.5 --png OUT/x.png", 2, "strength needs an image"),
        ("sample RUN --image NONE --png OUT/x.png", 1, "no such file"),
        ("sample RUN --image FILE --png OUT/x.png", 1, "not a readable image"),
        (
            "sample RUN --image PICTURE --strength 2 --png OUT/x.png",
            2,
            "strength must be in [0, 1]",
        ),
        ("sample RUN --image PICTURE --mask WIDE --png OUT/x.png", 2, "mask_image must have the"),
        ("sample RUN --mask PICTURE --png OUT/x.png", 2, "mask_image needs an image"),
        ("sample RUN --reconstruction-guidance 5 --png OUT/x.png", 2, "reconstruction_guidance"),
        ("sample RUN --guidance-rescale 2 --png OUT/x.png", 2, "guidance_rescale must be in"),
        ("sample RUN --guidance-interval 2 1 --png OUT/x.png", 2, "guidance_interval must rise"),
        ("evaluate RUN --num 5", 2, "192"),
        ("evaluate RUN/model --num 192", 1, "--data"),
        ("sample RUN --png OUT/x.png --device cuda:99", 2, "device cuda:99 is not available"),
        ("evaluate RUN --data cats", 2, "data must be one of digits, mnist"),
        ("evaluate RUN --parts fid", 2, "samples, classifier, copying, likelihood"),
        ("evaluate RUN --seeds 0", 2, "seeds must be in 1..100"),
        ("evaluate RUN --png OUT/x --json OUT/x", 2, "two files"),
        ("evaluate RUN --png OUT/x.jpg", 2, "--png must be a .png file"),
        ("compare RUN --png OUT/x.jpg", 2, "--png must be a .png file"),
        ("compare RUN --json OUT/x.txt", 2, "--json must be a .json file"),
        ("train-classifier --data digits --out OUT/c.pt", 2, "--out must be a .safetensors file"),
        ("train-classifier --data moons --out OUT/c.safetensors", 2, "data must be of type Image"),
        ("evaluate RUN --classifier NONE", 1, "no such file"),
        ("demo --minutes nan --out OUT", 2, "minutes must be"),
        ("demo --out FILE/x", 1, "cannot be written"),
    ],
)
def test_bad_input_ends_in_one_line(run_folder, tmp_path, capsys, monkeypatch, call, code, message):
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "outsides").mkdir()
    (tmp_path / "full" / "something").write_text("")
    for damage in ("missing", "truncated", "wrong"):
        (tmp_path / damage).mkdir()
        bad_mnist(tmp_path / damage, damage)
    places = {
        "RUN": run_folder, "OUT": tmp_path / "out", "NONE": tmp_path / "none",
        "FILE": tmp_path / "file", "FULL": tmp_path / "full",
        "missing": tmp_path / "missing", "truncated": tmp_path / "truncated",
        "wrong": tmp_path / "wrong", "EMPTY": "", "OUTSIDE": tmp_path / "outside",
        "PICTURE": tmp_path / "picture.png", "WIDE": tmp_path / "wide.png",
    }  # fmt: skip
    Image.new("RGB", (16, 16)).save(places["PICTURE"])
    Image.new("L", (32, 16)).save(places["WIDE"])
    words = []
    for word in call.split():
        head, slash, tail = word.partition("/")
        words.append(str(places.get(head, head)) + slash + tail)
    try:
        returned = main(words)
    except SystemExit as exit_:  # argparse
        returned = exit_.code
    error = capsys.readouterr().err
    assert returned == code
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_word_that_is_not_a_command_is_refused_without_importing_torch():
    code = (
        "import sys\nfrom minidiff.cli import main\ntry:\n    main(['--nonsense'])\n"
        "except SystemExit as exit_:\n    print(exit_.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.count("\n") == 1


def test_the_commands_are_those_of_the_grammar():
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert tuple(action.choices) == cli.COMMANDS


def test_a_class_that_is_misspelt_gets_a_suggestion(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red" if name == "cat" else "green").save(
            tmp_path / "photos" / name / "0.png"
        )
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "photos" / name / "1.png")
    run = str(tmp_path / "run")
    assert main(["train", "--data", str(tmp_path / "photos"), "--out", run, *TINY]) == 0
    capsys.readouterr()
    assert main(["sample", run, "--class", "Dgo", "--png", str(tmp_path / "x.png")]) == 2
    assert (
        "--class must be one of cat, dog; got 'Dgo'; did you mean dog?" in capsys.readouterr().err
    )


def test_unknown_words_of_a_prompt_are_one_line_of_the_program(tmp_path, capsys):
    png = str(tmp_path / "x.png")
    call = ["sample", "--model", "digits-text", "a purple zebra 5", "--num", "1", "--steps", "1"]
    assert main([*call, "--png", png]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "zebra" in line]
    assert lines == ["minidiff: warning: words outside the vocabulary are left out: zebra"]


def test_list_names_everything_that_flags_take(capsys, monkeypatch):
    assert main(["list", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert set(tables["models"]) == set(shipped.MODELS)
    assert set(tables["data"]) == {*names.DATA_NAMES, *names.TOYS, "FOLDER"}
    assert set(tables["presets"]) == set(PRESETS)
    assert set(tables["samplers"]) == set(names.SAMPLERS)
    assert set(tables["objectives"]) == set(names.PREDICTION_TYPES)
    assert set(tables["metrics"]) == set(names.PARTS)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(tables) + sum(map(len, tables.values()))
    assert max(map(len, lines)) > 100
    assert not any("…" in line for line in lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["list"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) == 100
    assert main(["list", "samplers"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["ddpm", "DDPM", "(DDPMScheduler)"]


def test_list_does_not_import_torch():
    code = "import sys; from minidiff import cli; cli.main(['list']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.splitlines()[-1].split()


def test_train_chooses_the_preset_that_fits_and_flags_override_it(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--data", "digits", "--out", str(run), *TINY]) == 0
    assert capsys.readouterr().out.startswith("preset: digits, which fits these data")
    config = json.loads((run / "config.json").read_text())["train"]
    assert (config["optimizer"], config["block"]) == ("muon", 1)  # of the preset
    assert (config["steps"], config["minutes"], config["channels"]) == (2, None, [8, 8])


def test_the_preset_for_large_photographs_has_blocks_and_takes_large_batches(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (128, 128), (60 * i, 0, 9)).save(tmp_path / "photos" / f"{i}.png")
    run, call = tmp_path / "run", ["train", "--data", str(tmp_path / "photos"), *TINY]
    assert main([*call, "--batch-size", "65", "--out", str(run), "--steps", "1"]) == 0
    first, *_, caution, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("preset: mnist, which fits these data of 128×128 pixels (other flags")
    assert caution == (
        "trained 1 step only, so the samples are noise; longer: minidiff train --resume "
        f"{run} --steps +1000"
    )
    config = json.loads((run / "config.json").read_text())["train"]
    assert (config["block"], config["batch_size"], config["flip"]) == (2, 65, False)


@pytest.mark.parametrize(
    ("steps", "losses", "said"),
    [
        ((50, 99), (1, 0.1), "trained 99 steps only"),
        ((50, 100), (1, 0.1), ""),
        ((50, 100, 150, 200), (0.8, 1, 0.9, 0.8), "the loss has not fallen; see minidiff check "),
        ((50, 100, 150, 200), (0.8, 1, 0.9, 0.7), ""),
        ((500,), (0.9,), ""),
    ],
)
def test_a_training_that_taught_nothing_says_so(steps, losses, said, tmp_path):
    rows = [{"step": n, "loss": loss} for n, loss in zip(steps, losses, strict=True)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = caution(str(tmp_path), TrainConfig(minutes=1))
    assert line.startswith(said)
    assert bool(line) == bool(said)


@pytest.mark.parametrize("more", [["--learn-variance"], ["--config", "FILE"]])
def test_options_that_decide_the_recipe_keep_presets_out(more, tmp_path, capsys):
    (tmp_path / "options.json").write_text('{"dropout": 0.1}')
    more = [str(tmp_path / "options.json") if word == "FILE" else word for word in more]
    call = ["train", "--data", "digits", "--out", str(tmp_path / "run"), *TINY]
    assert main([*call, *more]) == 0
    assert "preset" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["block"] == 2


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--data", "digits", "--out", str(run), *TINY]) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    printed = capsys.readouterr()
    assert "already finished at step 2; --steps +2 lengthens it" in printed.out
    assert "wrote" not in printed.out
    assert "%" not in printed.err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_debug_shows_the_traceback(tmp_path):
    from minidiff.errors import CheckpointError

    with pytest.raises(CheckpointError):
        main(["sample", str(tmp_path), "--png", str(tmp_path / "x.png"), "--debug"])


def test_help_of_every_command_names_its_options(capsys):
    for command in ("demo", "train", "train-vae", "sample", "evaluate"):
        with pytest.raises(SystemExit) as exit_:
            parser().parse_args([command, "--help"])
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        assert {"--seed", "--device", "--dtype"} <= set(text.replace(",", " ").split())


def test_python_m_minidiff_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "minidiff", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"minidiff {__version__}"


def test_a_terminal_without_unicode_gets_question_marks_not_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "minidiff", "evaluate", "--help"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert "? of the real spread" in " ".join(done.stdout.split())


def test_running_out_of_memory_is_one_line(run_folder, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Pipeline, "__call__", fail)
    assert main(["sample", str(run_folder), "--png", str(tmp_path / "x.png")]) == 1
    assert capsys.readouterr().err.startswith("minidiff: out of memory; use a smaller --batch-si")


def test_an_interrupt_is_one_line_and_exit_code_130(run_folder, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "__call__", interrupt)
    assert main(["sample", str(run_folder), "--png", str(tmp_path / "x.png")]) == 130
    assert capsys.readouterr().err.strip() == "minidiff: interrupted"
    assert not list(tmp_path.iterdir())


def test_help_of_train_shows_the_presets_and_every_option(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"\n  {name} " in text
        assert " ".join(preset.why.split()) in " ".join(text.split())
    for name, option in OPTIONS.items():
        assert f"--{option.metadata['flag'] or name.replace('_', '-')} " in text


def test_flags_override_the_file_and_the_file_the_preset(tmp_path):
    file, out = tmp_path / "mine.json", tmp_path / "run"
    file.write_text('{"batch_size": 6, "learning_rate": 0.001, "pictures": 0, "channels": [8, 8]}')
    call = ["train", "--preset", "digits", "--config", str(file), "--out", str(out)]
    assert main([*call, "--steps", "2", "--batch-size", "4", "--seed", "9"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["name"] == "digits"
    given = {name: config["train"][name] for name in ("minutes", "steps", "batch_size", "seed",
            "learning_rate", "guidance_scale")}  # fmt: skip
    assert given == {"minutes": None, "steps": 2, "batch_size": 4, "seed": 9,
                    "learning_rate": 0.001, "guidance_scale": 2.0}  # fmt: skip


def test_a_prompt_for_a_model_of_classes_is_refused(run_folder, tmp_path, capsys):
    arguments = ["sample", str(run_folder), "a red 7", "--png", str(tmp_path / "x.png")]
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


COMMANDS = ("demo", "train", "train-vae", "train-classifier", "sample", "evaluate", "check")
GROUPS_OF_TRAIN = ("data", "run", "budget", "optimisation", "objective", "network", "sampling")


def command_named(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_a_default_at_most_once_per_option_and_never_none(name):
    command = command_named(name)
    formatter = command._get_formatter()
    for action in command._actions:
        text = formatter._expand_help(action)
        assert text, action
        assert text.count("default") <= 1, text
        assert "default: None" not in text
    assert "(default: None)" not in command.format_help()


@pytest.mark.parametrize("name", COMMANDS)
def test_metavars_match_flags_and_no_flag_stands_outside_a_group(name):
    command = command_named(name)
    loose = [a.option_strings for a in command._optionals._group_actions]
    assert loose == [["-h", "--help"]]
    text = " ".join(command.format_help().split())
    for action in command._actions:
        if action.option_strings and action.nargs is None and not action.choices:
            flag = action.option_strings[0]
            metavar = action.metavar or flag.lstrip("-").replace("-", "_").upper()
            assert f" {flag} {metavar} " in text


def test_help_of_train_stands_in_groups():
    lines = command_named("train").format_help().splitlines()
    titles = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert [title for title in titles if title in GROUPS_OF_TRAIN] == list(GROUPS_OF_TRAIN)
    assert titles[-1] == "presets"
