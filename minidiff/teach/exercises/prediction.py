"""Exercises on prediction types (notebook 03)."""

from minidiff.prediction import split, target
from minidiff.schedule import add_noise
from minidiff.teach.exercise import Exercise, Wrong, images_at_levels


def _outputs(prediction_type):
    """Return cases (output, x, level) of a perfect network."""

    def cases():
        for x0, eps, at in images_at_levels():
            yield target(x0, eps, at, prediction_type), add_noise(x0, eps, at), at

    return cases


def _inputs():
    """Yield (x0, ε, x, level): a target may be computed from any of them."""
    for x0, eps, at in images_at_levels():
        yield x0, eps, add_noise(x0, eps, at), at


def x0_from_eps(eps, x, level):
    return (x - level.sigma * eps) / level.alpha


X0_FROM_EPS = Exercise(
    "x0-from-eps",
    3,
    "Write x0_from_eps(eps, x, level): the clean image that a predicted noise implies "
    "(DDPM eq. 15).",
    lambda eps, x, level: split(eps, x, level, "epsilon")[0],
    _outputs("epsilon"),
    x0_from_eps,
    "Solve x = α·x0 + σ·ε for x0.",
    (
        Wrong(
            lambda eps, x, level: x - level.sigma * eps,
            "That is α·x0: divide by α. Where α is small, this is where ε-networks fail.",
        ),
        Wrong(
            lambda eps, x, level: x / level.alpha - eps / level.sigma,
            "The noise has the factor σ/α, not 1/σ: check the brackets under the root.",
            "GNTPP#2",
        ),
        Wrong(
            lambda eps, x, level: (x - level.sigma**2 * eps) / level.alpha,
            "The root is missing: the noise in x has the factor σ, not σ².",
            "classifier-free-diffusion-guidance-Pytorch#12",
        ),
        Wrong(
            lambda eps, x, level: (x - level.sigma * eps) / level.alpha**2,
            "The root is missing: the image in x has the factor α, not ᾱ = α².",
        ),
    ),
)


def eps_from_v(v, x, level):
    return level.alpha * v + level.sigma * x


EPS_FROM_V = Exercise(
    "eps-from-v",
    3,
    "Write eps_from_v(v, x, level): the noise that a predicted v = α·ε − σ·x0 implies.",
    lambda v, x, level: split(v, x, level, "v_prediction")[1],
    _outputs("v_prediction"),
    eps_from_v,
    "Two equations, v and x; multiply them by α and σ so that x0 drops out. α² + σ² = 1.",
    (
        Wrong(
            lambda v, x, level: (v + level.sigma * x) / level.alpha,
            "In v = α·ε − σ·x0 stands the clean x0; you solved it with the noisy x.",
            "threestudio#126",
        ),
        Wrong(
            lambda v, x, level: level.alpha * x - level.sigma * v,
            "That is x̂0. The noise is the other combination, with α and σ exchanged.",
        ),
        Wrong(
            lambda v, x, level: level.alpha * v - level.sigma * x,
            "The sign of x: add the equations so that x0 drops out, not ε.",
        ),
    ),
)


def v_target(x0, eps, x, level):
    return level.alpha * eps - level.sigma * x0


V_TARGET = Exercise(
    "v-target",
    3,
    "Write v_target(x0, eps, x, level): the target of v-prediction "
    "(Salimans & Ho 2022, appendix D).",
    lambda x0, eps, x, level: target(x0, eps, level, "v_prediction"),
    _inputs,
    v_target,
    "With α = cos φ and σ = sin φ, x = cos φ·x0 + sin φ·ε. v is the derivative with respect to φ.",
    (
        Wrong(
            lambda x0, eps, x, level: level.alpha * eps - level.sigma * x,
            "The second term is of the clean x0, not of the noisy x.",
            "threestudio#126",
        ),
        Wrong(
            lambda x0, eps, x, level: level.sigma * x0 - level.alpha * eps,
            "The sign is turned around: v goes from the data to the noise.",
        ),
        Wrong(
            lambda x0, eps, x, level: level.alpha * x0 - level.sigma * eps,
            "x0 and ε are exchanged: for hardly any noise, v is nearly ε.",
        ),
    ),
)


def flow_target(x0, eps, x, level):
    return eps - x0


FLOW_TARGET = Exercise(
    "flow-target",
    8,
    "Write flow_target(x0, eps, x, level): dx/dσ on the straight line x = (1 − σ)·x0 + σ·ε.",
    lambda x0, eps, x, level: target(x0, eps, level, "flow"),
    _inputs,
    flow_target,
    "Differentiate the line. Does σ remain in the result?",
    (
        Wrong(
            lambda x0, eps, x, level: x0 - eps,
            "That is the velocity from noise to data. Both conventions are in use: the training "
            "target and the direction of sampling must agree.",
            "splitmeanflow#2, tau-0-vla#7",
        ),
        Wrong(
            lambda x0, eps, x, level: eps - x,
            "The line starts at the clean x0; the noisy x is somewhere on it.",
            "pi-zero-pytorch#13",
        ),
        Wrong(
            lambda x0, eps, x, level: x - x0,
            "That is σ·(ε − x0), the way so far: divide by σ, or start from the line's ends.",
        ),
    ),
)

BUGS = ()
EXERCISES = (X0_FROM_EPS, EPS_FROM_V, V_TARGET, FLOW_TARGET)
