"""The evaluation table of a model, by the fixed protocol of EVALUATION.md.

    table = evaluate(pipe, load("mnist", "train"), load("mnist", "test"), net, Plan(10_000))
    print(table)

A row is a figure, a column the images that it is measured on: the model's samples, samples without
guidance, real held-out images (the ceiling), and real training images (the floor: scores of a
perfect model at this number of samples). The table gives a reason for each missing figure.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.data import ImageData
from minidiff.errors import InvalidArgument, one_of, whole_number
from minidiff.images.pixels import to_uint8
from minidiff.metrics import Evaluator, accuracy, copying, features, fixed_order, likelihood
from minidiff.metrics.evaluation_table import (
    HELD_OUT,
    MODEL,
    TRAINING,
    UNGUIDED,
    EvaluationTable,
)
from minidiff.metrics.train_classifier import train
from minidiff.names import MAX_SEED, PARTS
from minidiff.nn import AutoencoderKL
from minidiff.nn.classifier import Classifier
from minidiff.noise import image_generators
from minidiff.pipeline import Pipeline
from minidiff.pipeline.request import MAX_IMAGES
from minidiff.runtime.tensors import digest
from minidiff.training.presets import Recipe

PROTOCOL = 1  # version of EVALUATION.md; figures of different versions cannot be compared
SAMPLES, QUICK_SAMPLES = 50_000, 10_000
MIN_IMAGES = 10  # of a split or of samples, without a classifier, which needs more
NO_GUIDANCE = (1.0, 1.0)  # scales of guidance and of autoguidance
FLOW_STEPS = 16  # 0.002 bits from the value of 64 steps, less than the noise of the probes
BOUND_DRAWS = 64
LEARNT = Recipe(epochs=10, batch_size=100, augment="none")  # for a classifier of samples


@dataclass(frozen=True)
class Plan:
    """The amount of work of an evaluation. Checked at construction.

    Attributes:
        samples: samples per seed.
        seeds: seeds of the noise; each gives a value, and ± is their standard deviation.
        learnt: samples that a classifier is trained on.
        compared: samples that are compared with their nearest neighbours.
        likely: images per split and seed whose likelihood is computed.
        parts: the `PARTS` to measure.
        steps, guidance, autoguidance, eta: sampling options; None for those of the model.
        batch_size: images in the network at once.
    """

    samples: int
    seeds: tuple[int, ...] = (0, 1, 2)
    learnt: int = 5_000
    compared: int = 5_000
    likely: int = 128
    parts: tuple[str, ...] = PARTS
    steps: int | None = None
    guidance: float | None = None
    autoguidance: float | None = None
    eta: float | None = None
    batch_size: int = 250

    def __post_init__(self) -> None:
        whole_number("num", self.samples, 1, MAX_IMAGES)
        for name in ("learnt", "compared", "likely", "batch_size"):
            whole_number(name, getattr(self, name), 1)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InvalidArgument(f"seeds must list at least one seed, each once, got {self.seeds}")
        for seed in self.seeds:
            whole_number("seed", seed, 0, MAX_SEED)
        if not self.parts:
            raise InvalidArgument(f"parts must name at least one of {', '.join(PARTS)}")
        for part in self.parts:
            one_of("parts", part, PARTS)


def plan_for(
    data: ImageData, num: int | None = None, *, quick: bool = False, seed: int = 0, seeds: int = 3
) -> Plan:
    """Return the plan of the protocol for a data set.

    Args:
        data: training images; without `num` their number is the largest number of samples.
        num: samples per seed; None for 50,000, or 10,000 if quick.
        quick: smaller numbers throughout, for a quarter of the time.
        seed, seeds: first seed, and number of seeds.
    Raises:
        InvalidArgument: a number is out of range.
    """
    if num is None:
        num = max(MIN_IMAGES, min(QUICK_SAMPLES if quick else SAMPLES, len(data)))
    first, count = whole_number("seed", seed, 0), whole_number("seeds", seeds, 1, 100)
    plan = Plan(num, tuple(range(first, first + count)))
    return replace(plan, learnt=2_000, compared=2_000, likely=32) if quick else plan


def evaluate(
    pipe: Pipeline,
    train: ImageData,
    test: ImageData,
    net: Classifier | None,
    plan: Plan,
    *,
    first_samples: list[Tensor] | None = None,
    progress: bool = False,
) -> EvaluationTable:
    """Measure a model by the protocol.

    Args:
        pipe: class-conditional or unconditional model.
        train, test: the two splits of its training data.
        net: classifier for features, on its device; None to leave out what needs one.
        plan: amount of work, see `plan_for`.
        first_samples: list that receives up to a hundred samples, uint8 (N, C, H, W).
        progress: True for progress bars.
    Raises:
        InvalidArgument: model, data, classifier and plan do not fit; raised before any work.
    """
    _check(pipe, train, test)
    evaluator = None if net is None else Evaluator.of(train, test, net)
    scored = evaluator is not None and "samples" in plan.parts
    whole_number("num", plan.samples, evaluator.min_images if scored else MIN_IMAGES)
    table = EvaluationTable(_about(pipe, train, plan))
    if evaluator is None:
        missing = [part for part in ("samples", "classifier") if part in plan.parts]
        reason = f"no classifier is shipped for {train.name}: train one with "
        reason += "minidiff train-classifier and give it by --classifier"
        table.absent.update(dict.fromkeys(missing, reason))
    elif "classifier" in plan.parts and (reason := _reason_without_labels(pipe, train)):
        table.absent["classifier"] = reason
    job = _Evaluation(pipe, train, test, evaluator, plan, table, progress)
    if job.wants("samples", "classifier", "copying"):
        job.measure_samples([] if first_samples is None else first_samples)
        job.measure_real()
    if job.wants("likelihood"):
        job.measure_likelihood()
    return table


def _check(pipe: Pipeline, train: ImageData, test: ImageData) -> None:
    """Refuse data that do not fit the model. Raises InvalidArgument."""
    if pipe.prompts is not None:
        raise InvalidArgument(
            "pipe must be a class-conditional or unconditional model, got one of captions"
        )
    shapes = (pipe.image_shape, tuple(train.images.shape[1:]), tuple(test.images.shape[1:]))
    if len(set(shapes)) > 1:
        raise InvalidArgument(
            f"data {train.name} has images of shape {shapes[1]} (train) and {shapes[2]} (test), "
            f"the model makes {shapes[0]}"
        )
    if pipe.class_names and len(pipe.class_names) != train.num_classes:
        raise InvalidArgument(
            f"data {train.name} has {train.num_classes} classes, the model {len(pipe.class_names)}"
        )
    for name, images in (("training", train), ("held-out", test)):
        whole_number(f"number of {name} images", len(images), MIN_IMAGES)


def _reason_without_labels(pipe: Pipeline, train: ImageData) -> str | None:
    """Return the reason why samples have no labels to learn from; None if they have."""
    if train.labels is None:
        return f"{train.name} has no labels"
    return None if pipe.class_names else "the model is unconditional, so its samples have no labels"


def _about(pipe: Pipeline, train: ImageData, plan: Plan) -> dict[str, Any]:
    """Return everything that the figures depend on, for a JSON file."""
    return {
        "protocol": PROTOCOL,
        "data": train.name,
        "model_sha256": digest(pipe.unet),
        "weaker_sha256": None if len(pipe.unets) == 1 else digest(pipe.unets[1]),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": pipe.num_inference_steps if plan.steps is None else plan.steps,
        "guidance": pipe.guidance_scale if plan.guidance is None else plan.guidance,
        "autoguidance": (
            pipe.autoguidance_scale if plan.autoguidance is None else plan.autoguidance
        ),
        "eta": plan.eta,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "plan": asdict(plan),
    }


@contextlib.contextmanager
def counted(*networks: nn.Module | None) -> Iterator[list[int]]:
    """Yield [count], the number of images that networks have evaluated since.

    A hook in each network counts. A guided evaluation of an image counts twice, since the network
    is evaluated with and without the class; an evaluation of the guidance network counts as well.

    Args:
        networks: networks to count; None is left out.
    """
    count = [0]

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        count[0] += len(output)

    handles = [network.register_forward_hook(hook) for network in networks if network is not None]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Evaluation:
    """The state of one evaluation."""

    pipe: Pipeline
    train: ImageData
    test: ImageData
    evaluator: Evaluator | None
    plan: Plan
    table: EvaluationTable
    progress: bool

    def wants(self, *parts: str) -> bool:
        """Return True if any of these parts is planned and possible."""
        return any(part in self.plan.parts and part not in self.table.absent for part in parts)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the duration of the block to that of a part."""
        started = time.monotonic()
        yield
        spent = self.table.seconds.get(part, 0.0)
        self.table.seconds[part] = spent + time.monotonic() - started

    # --- samples ---------------------------------------------------------------------------

    def measure_samples(self, first_samples: list[Tensor]) -> None:
        """Measure the columns of the model, seed by seed."""
        scales = self.table.about["guidance"], self.table.about["autoguidance"]
        columns = (
            {MODEL: scales} if scales == NO_GUIDANCE else {MODEL: scales, UNGUIDED: NO_GUIDANCE}
        )
        for seed in self.plan.seeds:
            for column, guidance in columns.items():
                with self.timed("sampling"):
                    images, labels = self.draw(seed, column, *guidance)
                if not first_samples:
                    first_samples.append(images[:100])
                self.measure(column, images, labels, learn=column == MODEL)

    def draw(
        self, seed: int, column: str, guidance: float, autoguidance: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return samples uint8 (N, C, H, W) and labels in the proportions of the training data."""
        n = self.samples
        labels = None
        if self.pipe.class_names:
            order = fixed_order(self.train)
            labels = self.train.labels[order[torch.arange(n) % len(order)]]
        with counted(*self.pipe.unets) as count:
            images = self.pipe(
                class_labels=labels,
                num_images=n,
                num_inference_steps=self.plan.steps,
                guidance_scale=guidance,
                autoguidance_scale=autoguidance,
                eta=self.plan.eta,
                seed=seed,
                batch_size=self.plan.batch_size,
                output_type="pt",
                progress=self.progress,
            ).images
        self.table.add("evaluations", column, count[0] / n)
        return to_uint8(images).cpu(), labels

    @property
    def samples(self) -> int:
        """The number of samples that the planned parts need."""
        if self.wants("samples"):
            return self.plan.samples
        needs = {"classifier": self.plan.learnt, "copying": self.plan.compared}
        return min(self.plan.samples, max(n for part, n in needs.items() if self.wants(part)))

    def measure(
        self, column: str, images: Tensor, labels: Tensor | None, *, learn: bool = True
    ) -> None:
        """Measure all figures of images, samples or real, except their likelihood."""
        if self.wants("samples"):
            with self.timed("samples"):
                self.table.add_scores(column, self.evaluator.score(images, labels))
        if learn and self.wants("classifier"):
            with self.timed("classifier"):
                part = slice(self.plan.learnt)
                self.table.add("learnt", column, self.learnt_from(images[part], labels[part]))
        self.compare(column, images)

    def learnt_from(self, images: Tensor, labels: Tensor) -> float:
        """Return the accuracy on held-out images of a classifier that was trained on these."""
        data = ImageData("samples", images, labels, self.train.class_names)
        net = train(data.to(self.pipe.device), LEARNT, on_epoch=lambda *line: None)
        predicted, _ = features(net, self.test.images)
        return accuracy(predicted, self.test.labels)

    def compare(self, column: str, images: Tensor) -> None:
        """Measure how close images are to training images, as copies would be."""
        if self.wants("copying"):
            with self.timed("copying"):
                samples = images[: self.plan.compared].to(self.pipe.device)
                held_out, _ = self.halves
                self.table.add("copying", column, copying(samples, self.train.images, held_out))

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Two halves of the held-out images: references, and images in the place of samples."""
        order = fixed_order(self.test)
        middle = len(order) // 2
        return self.test.images[order[:middle]], self.test.images[order[middle:]]

    # --- real images -----------------------------------------------------------------------

    def measure_real(self) -> None:
        """Measure the columns of real images."""
        if self.wants("samples"):
            with self.timed("samples"):
                if len(self.test) < self.evaluator.min_images:
                    self.table.absent["real, held out"] = (
                        f"{len(self.test)} held-out images are fewer than "
                        f"{self.evaluator.min_images}"
                    )
                else:
                    n = min(self.plan.samples, len(self.test))
                    self.table.add_scores(HELD_OUT, self.evaluator.ceiling(n))
                for seed in self.plan.seeds:
                    floor = self.evaluator.floor(self.plan.samples, seed)
                    self.table.add_scores(TRAINING, floor)
        order = fixed_order(self.train)
        if self.wants("classifier"):
            with self.timed("classifier"):
                chosen = order[: self.plan.learnt]
                found = self.learnt_from(self.train.images[chosen], self.train.labels[chosen])
                self.table.add("learnt", TRAINING, found)
        self.compare(HELD_OUT, self.halves[1])
        self.compare(TRAINING, self.train.images[order])

    # --- likelihood ------------------------------------------------------------------------

    def measure_likelihood(self) -> None:
        """Measure bits per dimension of held-out and of training images."""
        if isinstance(self.pipe.vae, AutoencoderKL):
            self.table.absent["likelihood"] = "the VAE maps many images to one latent"
            return
        bounds: dict[str, dict[str, list[float]]] = {}
        with self.timed("likelihood"), counted(self.pipe.unet) as count:
            images = 0
            for column, data in ((HELD_OUT, self.test), (TRAINING, self.train)):
                order, number = fixed_order(data), len(self.plan.seeds)
                for i, seed in enumerate(self.plan.seeds):
                    chosen = order[i::number][: self.plan.likely]
                    try:
                        bound, flow = self.bits(data, chosen, seed)
                    except InvalidArgument as error:  # such as ε-prediction at zero SNR
                        self.table.absent["likelihood"] = str(error)
                        return
                    images += len(chosen)
                    self.table.add("flow", column, flow)
                    for variance, value in bound.items():
                        bounds.setdefault(variance, {}).setdefault(column, []).append(value)
        # The better variance is chosen on training images, so held-out ones stay untouched.
        best = min(bounds, key=lambda variance: statistics.fmean(bounds[variance][TRAINING]))
        self.table.cells["bound"] = bounds[best]
        self.table.about["bounds"] = {"chosen": best, **bounds}
        self.table.about["likelihood_evaluations"] = count[0] / images

    def bits(self, data: ImageData, chosen: Tensor, seed: int) -> tuple[dict[str, float], float]:
        """Return the mean bound by variance, and the mean of the flow, in bits per dimension."""
        pipe = self.pipe
        bounds: dict[str, list[Tensor]] = {variance: [] for variance in likelihood.VARIANCES}
        flows = []
        for part in range(0, len(chosen), self.plan.batch_size):
            index = chosen[part : part + self.plan.batch_size]
            sources = image_generators(seed, range(part, part + len(index)))
            x0, labels = data.batch(index)
            draws = [torch.rand(x0.shape[1:], generator=g, dtype=torch.float32) for g in sources]
            noise = torch.stack(draws) - 0.5
            points = x0 + likelihood.PIXEL * noise  # dequantised: uniform in the bin of each byte
            x0, points = (self.latents(x) for x in (x0, points))
            signs = [likelihood.rademacher(x0.shape[1:], g, x0) for g in sources]
            classes = labels.to(pipe.device) if pipe.class_names else None
            # In float32 for every dtype of sampling: bits are small differences of large sums.
            denoise = _in_float32(pipe).denoiser(classes)
            bound = likelihood.variational_bound(
                denoise, pipe.scheduler, x0,
                draws=BOUND_DRAWS, generator=sources, bin_width=likelihood.PIXEL, seed=seed,
            )  # fmt: skip
            log_prob = likelihood.flow_log_prob(
                denoise, pipe.scheduler, points,
                steps=FLOW_STEPS, probes=torch.stack(signs, dim=1),
            )  # fmt: skip
            size = x0[0].numel()
            for variance, parts in bounds.items():
                parts.append(likelihood.bits_per_dimension(bound.total(variance), size))
            flows.append(likelihood.bits_per_dimension(-log_prob, size, likelihood.PIXEL))
        means = {variance: torch.cat(parts).mean().item() for variance, parts in bounds.items()}
        flow = torch.cat(flows).mean().item()
        if not math.isfinite(sum(means.values()) + flow):
            raise InvalidArgument(f"the likelihood must be finite, got {means} and {flow}")
        return means, flow

    def latents(self, x: Tensor) -> Tensor:
        """Return images in the network's space, whose elements are the permuted pixels."""
        x = x.to(self.pipe.device)
        z = x if self.pipe.vae is None else self.pipe.vae.to_latents(x)
        return z.contiguous(memory_format=torch.channels_last)


def _in_float32(pipe: Pipeline) -> Pipeline:
    """Return a pipeline of the same network without autocast."""
    return Pipeline(pipe.unet, pipe.scheduler, pipe.vae, pipe.class_names)
