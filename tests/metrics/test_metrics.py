"""Metrics: closed forms, brute force, the shipped classifiers, and what each figure notices."""

import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
from PIL import Image

from minidiff import data, metrics
from minidiff.cli import main
from minidiff.errors import CheckpointError, InvalidArgument
from minidiff.metrics import (
    Evaluator,
    Moments,
    copying,
    coverage,
    density_and_coverage,
    frechet_distance,
    kernel_distance,
    moments,
    neighbours,
    train_classifier,
)
from minidiff.nn.classifier import FeatureNet
from minidiff.runtime.tensors import write_tensors
from minidiff.training.presets import RECIPES


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rotation(d, seed=0):
    return torch.linalg.qr(_normal(d, d, seed=seed)).Q


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    mean, a, b = (
        torch.tensor([3.0, 0.0, -4.0]),
        torch.tensor([1.0, 4, 9]),
        torch.tensor([4.0, 4, 1]),
    )
    real = Moments(torch.zeros(3).double(), a.diag().double())
    fake = Moments(mean.double(), b.diag().double())
    exact = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()  # 25 + 1 + 0 + 4
    assert frechet_distance(real, fake) == pytest.approx(1000 * exact.item() / 14, rel=1e-12)


def test_frechet_distance_of_equal_samples_is_zero_and_of_a_shift_its_square():
    x = _normal(500, 8) @ _normal(8, 8, seed=1)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    expected = 1000 * 8 * 0.25 / moments(x).covariance.trace().item()
    assert frechet_distance(x, x + 0.5) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_does_not_change_under_a_rotation_and_a_common_scale():
    x, y = _normal(400, 6), _normal(300, 6, seed=1) * torch.arange(1, 7) + 1
    turned = _rotation(6)
    assert frechet_distance(7 * x @ turned, 7 * y @ turned) == pytest.approx(frechet_distance(x, y))


def test_frechet_distance_of_covariances_that_do_not_commute_equals_a_general_square_root():
    one, two = (_normal(5, 5, seed=s) for s in (1, 2))
    a, b = one @ one.T, two @ two.T
    values = torch.linalg.eigvals(a @ b)  # of a product of the two: real and ≥ 0, not symmetric
    exact = (a.trace() + b.trace() - 2 * values.sqrt().real.sum()) / a.trace()
    zero = torch.zeros(5).double()
    found = frechet_distance(Moments(zero, a), Moments(zero, b))
    assert found == pytest.approx(1000 * exact.item(), rel=1e-9)


def test_frechet_distance_refuses_too_few_samples_and_other_features():
    with pytest.raises(InvalidArgument, match=r"2·D"):
        frechet_distance(_normal(11, 6), _normal(100, 6))
    with pytest.raises(InvalidArgument, match="the same number of features"):
        frechet_distance(_normal(100, 6), _normal(100, 5))


def test_coverage_of_points_on_a_line_equals_a_count_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])  # radii for k = 1: 1, 1, 2, 7
    assert coverage(real, torch.tensor([[0.5]]), k=1) == 0.5  # 0 and 1 see it
    assert coverage(real, torch.tensor([[1.5]]), k=1) == 0.5  # 1 and 3 see it
    assert coverage(real, torch.tensor([[20.0]]), k=1) == 0
    assert coverage(real, torch.tensor([[3.0]]), k=1) == 0.5  # on the edge of the ball of 10
    assert coverage(real, torch.tensor([[16.0], [0.0]]), k=1) == 0.75
    assert coverage(real, real, k=1) == 1


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_in_chunks_equal_brute_force(k, monkeypatch):
    monkeypatch.setattr(neighbours, "_MAX_DISTANCES", 130 * 50)  # chunks of 50, 50 and 30 rows
    real, fake = _normal(130, 4), _normal(70, 4, seed=1) + 0.5
    inside, covered = 0, 0
    for i in range(len(real)):
        others = sorted((real[i] - real[j]).norm().item() for j in range(len(real)) if j != i)
        hits = sum((real[i] - y).norm().item() <= others[k - 1] for y in fake)
        inside, covered = inside + hits, covered + (hits > 0)
    expected = (inside / (k * len(fake)), covered / len(real))
    assert density_and_coverage(real, fake, k) == pytest.approx(expected, rel=1e-12)
    assert coverage(real, fake, k) == covered / len(real)


def test_coverage_of_equal_distributions_is_the_expected_value():
    shares = [coverage(_normal(1000, 3, seed=s), _normal(1000, 3, seed=s + 50)) for s in range(4)]
    assert sum(shares) / 4 == pytest.approx(1 - 2**-5, abs=0.01)


def test_density_is_about_one_and_falls_by_the_fraction_of_samples_far_from_the_data():
    real = _normal(1000, 3)
    densities = [density_and_coverage(real, _normal(1000, 3, seed=s))[0] for s in range(1, 5)]
    assert sum(densities) / 4 == pytest.approx(1, abs=0.03)
    fake = _normal(1000, 3, seed=1)
    fake[:400] += 100
    assert density_and_coverage(real, fake)[0] == pytest.approx(0.6, abs=0.05)


def test_kernel_distance_equals_the_double_sum_over_pairs():
    x, y = _normal(40, 3), 1.2 * _normal(40, 3, seed=1) + 0.4
    found, error = kernel_distance(x, y, block=20)
    scale = (x - x.mean(0)).square().sum().div(39 * 3).sqrt()
    x, y = (x - x.mean(0)) / scale, (y - x.mean(0)) / scale

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    squared, spread = [], []
    for part in (slice(0, 20), slice(20, 40)):
        a, b = x[part], y[part]
        pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
        inside = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs) / 380
        across = sum(k(u, v) for u in a for v in b) / 400
        squared.append((inside - 2 * across).item())
        spread.append(
            (sum(k(u, u) for u in a) / 20 - sum(k(a[i], a[j]) for i, j in pairs) / 380).item()
        )
    both = [1000 * s / (sum(spread) / 2) for s in squared]
    assert found == pytest.approx(sum(both) / 2, rel=1e-9)
    assert error == pytest.approx(abs(both[0] - both[1]) / 2, rel=1e-9)  # s/√2 of two values


def test_kernel_distance_of_equal_distributions_is_zero_within_its_error():
    found, error = kernel_distance(_normal(20_000, 4), _normal(20_000, 4, seed=1), block=500)
    assert abs(found) < 3 * error
    assert error < 1
    shifted, _ = kernel_distance(_normal(20_000, 4), _normal(20_000, 4, seed=1) + 0.2, block=500)
    assert shifted > 10 * error


def test_kernel_distance_does_not_change_under_a_rotation_a_shift_and_a_common_scale():
    x, y = _normal(300, 5), _normal(300, 5, seed=1) * 1.5
    turned = _rotation(5)
    found, _ = kernel_distance(7 * x @ turned + 3, 7 * y @ turned + 3)
    assert found == pytest.approx(kernel_distance(x, y)[0], rel=1e-9)


def test_kernel_distance_differs_where_mean_and_covariance_are_equal():
    skewed = _normal(20_000, 2, seed=1).square() - 1  # mean 0, variance 2, as the Gaussian below
    gaussian = math.sqrt(2) * _normal(20_000, 2)
    assert frechet_distance(gaussian, skewed) < 1
    found, error = kernel_distance(gaussian, skewed)
    assert found > 10 * error


def test_nearest_distance_equals_brute_force_and_is_exactly_zero_for_a_copy(monkeypatch):
    monkeypatch.setattr(neighbours, "_IMAGES", 16)
    monkeypatch.setattr(neighbours, "_MAX_DISTANCES", 16 * 7)  # several chunks on either side
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 1, 6, 6), generator=generator, dtype=torch.uint8)
    samples = torch.randint(256, (20, 1, 6, 6), generator=generator, dtype=torch.uint8)
    samples[3] = images[41]
    found = neighbours.nearest_distance(samples, images)
    expected = torch.cdist(samples.flatten(1).double(), images.flatten(1).double()).amin(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-4)  # cdist is no 0 at a copy
    assert found[3] == 0


def test_copying_is_zero_for_copies_and_as_for_real_images_otherwise():
    train, test = data.load("digits").images, data.load("digits", "test").images
    held_out, others = test[:1000], test[1000:]
    real = copying(others, train, held_out)
    assert 0.5 < real < 1  # there are ten times as many training images
    assert copying(train[:500], train, held_out) == 0
    noisy = (train[:500].int() + torch.randint(-4, 5, train[:500].shape)).clamp(0, 255)
    assert copying(noisy.to(torch.uint8), train, held_out) < 0.5 * real


def test_copying_refuses_images_that_cannot_be_compared():
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for wrong in (images.float(), images[:, :, 1:], images[:0]):
        with pytest.raises(InvalidArgument, match="held_out must be at least one uint8 image"):
            copying(images, images, wrong)


@pytest.mark.parametrize("k", [0, 3])
def test_coverage_refuses_a_neighbour_that_does_not_exist(k):
    with pytest.raises(InvalidArgument, match=r"k must be in 1\.\.2"):
        coverage(_normal(3, 2), _normal(3, 2), k)


def test_accuracy_is_the_fraction_of_equal_labels():
    assert metrics.accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    with pytest.raises(InvalidArgument):
        metrics.accuracy(torch.tensor([1]), torch.tensor([1, 2]))


def test_features_do_not_depend_on_the_batch_size():
    net, images = metrics.load_classifier("digits"), data.load("digits", "test").images[:50]
    labels, rows = metrics.features(net, images)
    other_labels, other_rows = metrics.features(net, images, batch_size=7)
    assert torch.equal(labels, other_labels)
    assert torch.allclose(rows, other_rows, atol=1e-5)
    assert rows.dtype == torch.float64


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_shipped_weights_are_small(name):
    path = metrics.WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size < 1_000_000
    assert sum(p.numel() for p in metrics.load_classifier(name).parameters()) <= 240_000


def _stated_and_measured_accuracy(name, data_dir=None):
    test = data.load(name, "test", data_dir)
    predicted, _ = metrics.features(metrics.load_classifier(name), test.images)
    stated = metrics.read_metadata(metrics.WEIGHTS / f"{name}.safetensors")["test_accuracy"]
    return float(stated), metrics.accuracy(predicted, test.labels)


def test_the_digits_classifier_reaches_its_stated_accuracy():
    stated, measured = _stated_and_measured_accuracy("digits")
    assert measured == pytest.approx(stated, abs=6e-4)  # one image may tip over elsewhere
    assert measured >= 0.995


@pytest.mark.skipif("MINIDIFF_DATA" not in os.environ, reason="MINIDIFF_DATA names no MNIST folder")
def test_the_mnist_classifier_reaches_its_stated_accuracy():
    stated, measured = _stated_and_measured_accuracy("mnist")
    assert measured == pytest.approx(stated, abs=3e-4)
    assert measured >= 0.994


def test_modified_weights_are_refused(tmp_path):
    folder = shutil.copytree(metrics.WEIGHTS, tmp_path / "weights")
    assert isinstance(metrics.load_classifier("digits", folder), FeatureNet)
    path = folder / "digits.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"digits\.safetensors: SHA-256"):
        metrics.load_classifier("digits", folder)
    (folder / metrics.SUMS).write_text("")
    with pytest.raises(CheckpointError, match="no entry"):
        metrics.load_classifier("digits", folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        metrics.load_classifier("digits", folder)


def test_data_without_a_classifier_are_refused_with_the_command_that_trains_one(tmp_path):
    with pytest.raises(InvalidArgument, match=r"digits and mnist.*train-classifier"):
        Evaluator(str(tmp_path))


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator("digits")


@pytest.fixture(scope="module")
def real(evaluator):
    held_out = data.load("digits", "test")
    return held_out.images, held_out.labels


def test_real_digits_score_like_real_digits(evaluator):
    for scores in (evaluator.ceiling(2000), evaluator.floor(2000)):
        assert scores.accuracy >= 0.995
        assert scores.fd < 0.5
        assert scores.coverage == pytest.approx(1 - 2**-5, abs=0.02)
        assert scores.density == pytest.approx(1, abs=0.1)
        assert abs(scores.kd) < 1.5


def test_the_floor_scores_training_images_drawn_with_replacement_in_class_proportions(evaluator):
    drawn = evaluator._drawn_again(1000, seed=3)
    images = evaluator.train.images[evaluator.order[drawn]]
    labels = evaluator.train.labels[evaluator.order[drawn]]
    assert labels.bincount().tolist() == [100] * 10
    assert drawn.min() >= 1000  # apart from those that coverage compares with
    floor, scores = evaluator.floor(1000, seed=3), evaluator.score(images, labels)
    assert floor == pytest.approx(scores, rel=1e-4, abs=1e-4)
    assert evaluator.floor(1000, seed=4).fd != floor.fd


def test_more_noise_gives_a_larger_distance(evaluator, real):
    images, labels = real
    noise = _normal(*images[:1000].shape).float()
    scores = []
    for level in (0.0, 0.1, 0.3):
        noisy = data.to_float(images[:1000]) + level * noise
        scores.append(evaluator.score(data.to_uint8(noisy), labels[:1000]))
    assert scores[0].fd < scores[1].fd < scores[2].fd
    assert scores[0].coverage > scores[1].coverage > scores[2].coverage


def test_a_missing_class_lowers_coverage_by_its_fraction(evaluator, real):
    images, labels = real
    kept = images[labels != 7]
    scores = evaluator.score(kept)
    assert scores.accuracy is None
    assert scores.coverage == pytest.approx(0.9 * evaluator.ceiling(2000).coverage, abs=0.02)
    assert scores.fd > 10


def test_copies_of_a_few_images_are_legible_but_cover_little(evaluator, real):
    images, labels = real
    scores = evaluator.score(images[:10].repeat(100, 1, 1, 1), labels[:10].repeat(100))
    assert scores.accuracy == 1
    assert scores.coverage < 0.2
    assert scores.fd > 10


def test_wrong_labels_lower_accuracy_alone(evaluator, real):
    images, labels = real
    right, wrong = evaluator.score(images, labels), evaluator.score(images, (labels + 1) % 10)
    assert wrong.accuracy <= 0.005
    assert wrong[1:] == right[1:]


def test_samples_of_another_dtype_shape_or_number_are_refused(evaluator, real):
    images, labels = real
    for wrong in (images.float(), images[:, :, 1:], images.repeat(1, 3, 1, 1)):
        with pytest.raises(InvalidArgument, match="uint8"):
            evaluator.score(wrong)
    with pytest.raises(InvalidArgument, match="at least 192"):
        evaluator.score(images[:191])
    with pytest.raises(InvalidArgument, match="labels"):
        evaluator.score(images, labels[:5])


@pytest.mark.parametrize("name", ["train", "test", "net"])
def test_an_evaluator_of_something_else_is_refused_by_name(evaluator, name):
    parts = {
        "train": evaluator.train,
        "test": evaluator.test,
        "net": metrics.load_classifier("digits"),
    }
    for wrong in (5, "digits", None):
        with pytest.raises(InvalidArgument, match=f"{name} must be of type .*, got {wrong!r}"):
            Evaluator.of(**parts | {name: wrong})


def test_warped_images_keep_black_outside_and_are_not_flipped():
    x = torch.full((64, 1, 16, 16), -1.0)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(train_classifier.warp(x, generator), x)
    x[:, :, 4:12, 2:7] = 1  # the left of the middle is white
    warped = train_classifier.warp(x, generator)
    assert warped.amin() == -1
    assert warped[..., 2:14, :8].mean() > warped[..., 2:14, 8:].mean() + 0.5
    assert (warped[..., :8].mean(dim=(1, 2, 3)) > warped[..., 8:].mean(dim=(1, 2, 3))).all()


def test_photographs_are_mirrored_and_shifted_by_at_most_an_eighth():
    column = torch.arange(16.0).expand(200, 1, 16, 16)  # every pixel holds the number of its column
    row = column.transpose(2, 3)
    moved = train_classifier.flip_and_shift(
        torch.cat([column, row], dim=1), torch.Generator().manual_seed(0)
    )
    assert moved.shape == (200, 2, 16, 16)
    assert torch.equal(moved[:, 1, :, 0], moved[:, 1, :, 15])  # no rotation
    slope = moved[:, 0, 8, 9] - moved[:, 0, 8, 8]
    assert set(slope.tolist()) == {-1.0, 1.0}
    assert 60 < (slope < 0).sum() < 140
    shifts = moved[:, 1, 8, 0] - 8
    assert set(shifts.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    unmirrored = moved[slope > 0][:, 0, 8, 8] - 8
    assert set(unmirrored.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_the_classifier_of_photographs_learns_and_is_stored_in_less_than_a_megabyte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [160, 160, 30]])
    noise = torch.randint(-30, 31, (80, 3, 16, 16), generator=generator)
    images = (colours[labels][:, :, None, None] + noise).to(torch.uint8)
    photos = data.ImageData("photos", images, labels, tuple("abcd"))
    recipe = dataclasses.replace(RECIPES["cifar10"], epochs=6, batch_size=20, learning_rate=0.05)
    losses = []
    net = train_classifier.train(photos, recipe, lambda epoch, loss, _: losses.append(loss))
    assert losses[-1] < 0.5 * losses[0]
    path = tmp_path / "photos.safetensors"
    architecture = json.dumps(train_classifier.architecture(photos, recipe.network))
    train_classifier.write_classifier(path, net, recipe.stored, {"architecture": architecture})
    assert path.stat().st_size < 1_000_000
    again = metrics.read_classifier(path)
    assert metrics.read_digests(tmp_path / metrics.SUMS) == {path.name: metrics.sha256(path)}
    for name, tensor in net.state_dict().items():  # it was rounded before, so nothing is lost
        assert torch.equal(again.state_dict()[name], tensor), name
    x = data.to_float(images[:4])
    torch.testing.assert_close(again(x), net(x))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (None, "no valid architecture"),
        ("[]", "must be a mapping"),
        ("{", "no valid architecture"),
        ('{"network": "transformer"}', "one of plain, residual"),
        ('{"channels": 1, "depth": 3}', "takes no such arguments"),
        ('{"channels": 1, "num_classes": 10, "widths": [32, 64, 1e9]}', "widths must be a whole"),
        ('{"channels": 1, "num_classes": 10, "widths": [32, 64, 4096]}', "has shape"),
        ('{"network": "residual", "channels": 1, "num_classes": 10}', "missing"),
    ],
)
def test_a_file_without_a_classifier_is_refused(tmp_path, architecture, message):
    path = tmp_path / "net.safetensors"
    metadata = {} if architecture is None else {"architecture": architecture}
    write_tensors(path, metrics.load_classifier("digits").state_dict(), metadata)
    with pytest.raises(CheckpointError, match=message):
        metrics.read_classifier(path)


def test_training_learns_and_writes_weights_that_load(tmp_path):
    embedded = data.load("digits")
    for i in range(600):
        folder = tmp_path / "images" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(embedded.images[i, 0].numpy()).save(folder / f"{i}.png")
    out = tmp_path / "digits.safetensors"
    recipe = ["--epochs", "4", "--batch-size", "20"]
    command = ["train-classifier", "--data", str(tmp_path / "images"), "--out", str(out)]
    assert main([*command, "--device", "cpu", *recipe]) == 0
    metadata = metrics.read_metadata(out)
    assert metadata["data"] == "folder images"
    assert float(metadata["test_accuracy"]) > 0.5
    net, test = metrics.read_classifier(out), data.load("digits", "test")
    predicted, _ = metrics.features(net, test.images[:500])
    assert metrics.accuracy(predicted, test.labels[:500]) > 0.5


@pytest.mark.parametrize("option", [("--epochs", "0"), ("--dtype", "float16"), ("--seed", "-1")])
def test_a_recipe_out_of_range_is_refused_in_one_line(tmp_path, option, capsys):
    out = tmp_path / "x.safetensors"
    assert main(["train-classifier", "--data", "digits", "--out", str(out), *option]) == 2
    assert capsys.readouterr().err.startswith(f"minidiff: {option[0][2:]} must be")
    assert not out.exists()


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda r, f: frechet_distance(r * math.nan, f), "finite"),
        (lambda r, f: frechet_distance(r * 0, f), "copies of one"),
        (lambda r, f: kernel_distance(r * 0, f), "copies of one"),
        (lambda r, f: kernel_distance(r, f[:1]), "number of samples must be at least 2"),
        (lambda r, f: kernel_distance(r, f, block=1), "block must be at least 2"),
        (lambda r, f: coverage(r, f[:, :3]), r"\(M, D\)"),
        (lambda r, f: coverage(r, f * math.inf), "fake must be finite"),
    ],
)
def test_features_without_a_finite_figure_are_refused(measure, message):
    with pytest.raises(InvalidArgument, match=message):
        measure(*_normal(2, 50, 4))
