"""Exercises on guidance (notebook 10)."""

import torch

from minidiff.guidance import extrapolated, rescaled
from minidiff.teach.exercise import Bug, Exercise, Wrong, noise
from minidiff.training.learner import Learner


def guided(c, u, w):
    return u + w * (c - u)


def _guided(c, u, w):
    return extrapolated(lambda x, t: (c, u), w)(None, 0)


def _outputs():
    for seed, w in enumerate((0.0, 1.0, 2.5, 7.5)):
        yield noise(3, 1, 4, 4, seed=2 * seed), noise(3, 1, 4, 4, seed=2 * seed + 1), w


GUIDE = Exercise(
    "guide",
    10,
    "Write guided(c, u, w): classifier-free guidance from the outputs with (c) and without (u) "
    "the class. w = 0 gives u and w = 1 gives c, as in diffusers.",
    _guided,
    _outputs,
    guided,
    "A straight line through u and c, at w.",
    (
        Wrong(
            lambda c, u, w: c + w * (c - u),
            "That is Ho & Salimans' convention, eq. 6: their w is ours minus 1. Here w = 1 must "
            "give c.",
            "diffusers#5882, stable-dreamfusion#32",
        ),
        Wrong(
            lambda c, u, w: w * c + (w - 1) * u,
            "The sign of u: w·c + (1 − w)·u.",
            "labml annotated_deep_learning#177",
        ),
        Wrong(
            lambda c, u, w: c + w * (u - c),
            "c and u are exchanged: this moves away from the class as w grows.",
        ),
        Wrong(
            lambda c, u, w: w * (c - u),
            "Only the direction: it starts at u.",
        ),
        Wrong(
            lambda c, u, w: u + w * c,
            "w multiplies the whole of c, instead of the way from u to c: w = 1 gives u + c.",
        ),
        Wrong(
            lambda c, u, w: u + (w - 1) * (c - u),
            "That starts at u and takes one too few: w = 1 gives u, not c.",
        ),
    ),
)


def hide(labels, u, p, null):
    return torch.where(u < p, null, labels)


class _Null:
    def __init__(self, null):
        self.null = torch.tensor(null)


def _hide(labels, u, p, null):
    learner = Learner.__new__(Learner)
    torch.nn.Module.__init__(learner)
    object.__setattr__(learner, "condition", _Null(null))
    return learner.hide(labels, u < p)


def _labels():
    for seed, p in ((1, 0.1), (3, 0.5)):
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(400, generator=generator)
        yield torch.arange(400) % 10, u, p, 10


HIDE = Exercise(
    "hide-labels",
    10,
    "Write hide(labels, u, p, null): labels with the fraction p replaced by null, those where the "
    "uniform number u is below p.",
    _hide,
    _labels,
    hide,
    "torch.where(condition, value if true, value if false).",
    (
        Wrong(
            lambda labels, u, p, null: torch.where(u < p, labels, null),
            "The mask is inverted: 90 % of the labels are hidden, 10 % kept.",
            "MIT 6.S184 lab 3, commit 3ce71b6",
        ),
        Wrong(
            lambda labels, u, p, null: torch.where(u < p, 0, labels),
            "0 is a class: hidden labels become 'no class', which is null.",
        ),
        Wrong(
            lambda labels, u, p, null: labels,
            "The mask is not used, so the network never learns the output without a class.",
            "DALLE2-pytorch#235",
        ),
        Wrong(
            lambda labels, u, p, null: labels if u[0] >= p else torch.full_like(labels, null),
            "One number decides for the whole batch: use one per image.",
        ),
    ),
)


def rescale(c, u, w, phi):
    out = u + w * (c - u)
    factor = c.std(dim=(1, 2, 3), keepdim=True) / out.std(dim=(1, 2, 3), keepdim=True)
    return phi * factor * out + (1 - phi) * out


def _rescale(c, u, w, phi):
    return rescaled(lambda x, t: (c, u), w, phi)(None, 0)


def _rescaled_with(factor):
    def answer(c, u, w, phi):
        out = u + w * (c - u)
        return phi * factor(c, out) * out + (1 - phi) * out

    return answer


def _std(x):
    return x.std(dim=(1, 2, 3), keepdim=True)


RESCALE = Exercise(
    "rescale",
    10,
    "Write rescale(c, u, w, phi): guidance, and then φ of the way to the standard deviation of c, "
    "image by image (Lin et al. 2023, eq. 14 to 16). Images are (B, C, H, W).",
    _rescale,
    lambda: [(*case, 0.7) for case in _outputs()],
    rescale,
    "The factor is std(c)/std(guided), one number per image.",
    (
        Wrong(
            _rescaled_with(lambda c, out: c.std() / out.std()),
            "One standard deviation of the whole batch: images then depend on their neighbours. "
            "Take it image by image.",
            "ComfyUI#1923",
        ),
        Wrong(
            _rescaled_with(lambda c, out: 1.0),
            "Both standard deviations are of the guided output: the first is that of c.",
            "RIFT-SVC#8",
        ),
        Wrong(
            _rescaled_with(lambda c, out: _std(out) / _std(c)),
            "The factor is upside down: it makes over-exposed images more so.",
        ),
        Wrong(
            lambda c, u, w, phi: _rescale(c, u, w, 1 - phi),
            "φ is the weight of the rescaled output, 1 − φ that of the other.",
        ),
    ),
)


# --- planted bugs --------------------------------------------------------------------------------


def drop_labels(labels, u, p, null):
    drop = u < p
    return torch.where(drop, labels, null)


def with_guidance(c, u, w):
    return c + w * (c - u)


BUGS = (
    Bug(
        Exercise(
            "B5",
            10,
            "hide(labels, u, p, null) of a lab's first solution: it trained, and guided badly.",
            _hide,
            _labels,
            hide,
            "torch.where(condition, a, b) takes a where the condition holds: which labels are a?",
            (
                Wrong(
                    drop_labels,
                    "The mask is still inverted: 90 % are hidden.",
                    "MIT 6.S184 lab 3, commit 3ce71b6",
                ),
                Wrong(
                    lambda labels, u, p, null: labels,
                    "Now nothing is hidden: the network does not learn the output without a class.",
                    "DALLE2-pytorch#235",
                ),
                Wrong(
                    lambda labels, u, p, null: torch.where(u < 1 - p, labels, null),
                    "As many are hidden as should be, but they are others: those with u below p.",
                ),
                Wrong(
                    lambda labels, u, p, null: torch.where(u < p, 0, labels),
                    "0 is the class of zeros: hide with null.",
                ),
                Wrong(
                    lambda labels, u, p, null: torch.where(u < p, -1, labels),
                    "−1 is no class that the network has: hide with null.",
                ),
                Wrong(
                    lambda labels, u, p, null: torch.where(u < 0.5, null, labels),
                    "That hides one half, whatever p says: compare u with p.",
                ),
            ),
        ),
        "guidance mask inverted",
        "broken",
        "The network hardly ever sees a class, and guidance multiplies what little it learned.",
        "w = 0 must give the unconditional output, w = 1 the conditional one; count null labels.",
        "Hide where the mask is true.",
        "90 % of the labels hidden instead of 10 %.",
    ),
    Bug(
        Exercise(
            "B12",
            10,
            "guided(c, u, w) of a program in which w = 1 should mean no guidance.",
            _guided,
            _outputs,
            guided,
            "What does it return for w = 1, and for w = 0?",
            (
                Wrong(
                    with_guidance,
                    "It still starts from c: at w = 1 it returns 2·c − u.",
                    "diffusers#5882, classifier-free guidance eq. 6",
                ),
                Wrong(
                    lambda c, u, w: c + (w - 1) * (u - c),
                    "Starts from c with w − 1, good; but the direction is from u to c.",
                ),
            ),
        ),
        "guidance scale of another convention",
        "fine",
        "Every scale guides by 1 more than the name promises; contrast is a little high.",
        "The identities at w = 0 and w = 1.",
        "u + w·(c − u), or document that w starts at 0.",
        "At w = 1 the result is 2·c − u; the digits look right.",
    ),
)
EXERCISES = (GUIDE, HIDE, RESCALE)
