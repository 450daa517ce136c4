"""One more loss term for the discriminator of each arm, all of them `gradwise.torch.GradientMatching` but for one.

The information arm makes the input derivatives of the discriminator's class logits, at real images, those of a teacher.
The others are its controls: they have the same term without the information, or the information without the term.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwise.torch import GradientMatching, teacher_jacobian

from .acgan import Step, Term
from .digits import Classifier

__all__ = ["ARMS", "Arm", "Data", "teacher_gradients"]


@dataclass(frozen=True)
class Data:
    """What a term may know: the images of the GAN and a classifier trained on the same images."""

    x: Tensor
    labels: Tensor
    teacher: Classifier
    seed: int


def teacher_gradients(data: Data, weight: float) -> Term:
    """Recipe: the discriminator's class-logit gradients at real images are matched to those of a teacher classifier.

    Adds ``weight * sigma_c^2 * mean_i |S (dl_c/dx_i - dt_c/dx_i)|^2 / mean_i |S dt_c/dx_i|^2`` for one class c drawn
    for each image, where l are the discriminator's centred class logits, t the teacher's, sigma_c the standard
    deviation of t_c and S those of the pixels. The teacher's Jacobian is computed once; a step costs one backward pass
    through the discriminator and the differentiation of that. Not for a teacher with kinks (ReLU), nor for logits that
    are not centred: the constant that softmax ignores would be matched as well.

    Parameters
    ----------
    data : Data
        Images (n, 64), and a smooth classifier trained on them.
    weight : float
        At 1 a relative error of the derivatives counts like a relative error of the logits.

    Returns
    -------
    callable
        The term: from a `Step` to a loss.
    """
    targets = teacher_jacobian(data.teacher, data.x)
    return _class_gradients(data, weight, targets)


def _class_gradients(data: Data, weight: float, targets: Tensor) -> Term:
    # The scale is that of the teacher's own derivatives in all arms: only what is matched differs.
    matching = GradientMatching(weight, projections=1, seed=data.seed)
    matching.fit(data.x, data.teacher(data.x), teacher_jacobian(data.teacher, data.x))
    return lambda step: matching.from_outputs(step.logits, wrt=step.x, target=targets[step.rows])


def shuffled_gradients(data: Data, weight: float) -> Term:
    """Control: each image gets the teacher's gradients at another image, the same one throughout."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(data.seed))
    return _class_gradients(data, weight, teacher_jacobian(data.teacher, data.x)[order])


def zero_class_gradients(data: Data, weight: float) -> Term:
    """Control: the same term with targets of zero (Jacobian regularisation, or R1 on the class logits)."""
    return _class_gradients(data, weight, torch.zeros(len(data.x), 1, 1).expand(-1, 10, data.x.shape[1]))


def teacher_logits(data: Data, weight: float) -> Term:
    """Control: the teacher's logits at the same images, no derivatives (distillation); relative like the others."""
    targets = data.teacher(data.x)
    return lambda step: weight * (step.logits - targets[step.rows]).square().mean()


def r1(_: Data, weight: float) -> Term:
    """Control: R1 as usual (Mescheder et al. 2018), the gradient of the "real" logit at real images matched to zero."""
    matching = GradientMatching(weight, scale="none")
    return lambda step: matching.from_outputs(step.real, wrt=step.x)


def gradient_penalty(_: Data, weight: float) -> Term:
    """Control: the penalty of WGAN-GP, the norm of the "real" logit's gradient matched to 1 between real and fake."""
    matching = GradientMatching(weight, scale="none")

    def term(step: Step) -> Tensor:
        share = torch.rand(len(step.x), 1, generator=step.random)
        between = torch.lerp(step.x.detach(), step.fake, share)
        return matching(lambda x: step.discriminator(x)[0], between, target_norm=1.0)

    return term


def pixel_differences(data: Data, weight: float) -> Term:
    """Control: gradients of an image's own class logit matched to pixel differences ``x' - x``.

    x' is another real image of the class, drawn anew in every step. The difference of two samples is not the derivative
    of anything: on average it is that of ``-|x - m|^2 / 2`` with the mean image m of the class, which labels and images
    say without a teacher. An arm for readers who take the differences of images for their gradients.
    """
    matching = GradientMatching(weight, seed=data.seed)
    members = [torch.nonzero(data.labels == c)[:, 0] for c in range(int(data.labels.max()) + 1)]
    counts = torch.tensor([len(m) for m in members])
    table = torch.nn.utils.rnn.pad_sequence(members, batch_first=True)

    def other(labels: Tensor, random: torch.Generator) -> Tensor:
        column = (torch.rand(len(labels), generator=random) * counts[labels]).long()
        return data.x[table[labels, column]]

    random = torch.Generator().manual_seed(data.seed)
    differences = other(data.labels, random) - data.x
    own = data.teacher(data.x).gather(1, data.labels[:, None])
    matching.fit(data.x, own, differences[:, None])

    def term(step: Step) -> Tensor:
        target = other(step.labels, step.random) - step.x.detach()
        return matching.from_outputs(step.logits.gather(1, step.labels[:, None]), wrt=step.x, target=target)

    return term


@dataclass(frozen=True)
class Arm:
    """A loss term and the weights that are tried for it; with `beside_r1`, R1 is added, at its own best weight."""

    name: str
    term: Callable[[Data, float], Term] | None = None
    weights: tuple[float, ...] = (0.0,)
    beside_r1: bool = False

    def build(self, data: Data, weight: float, r1_weight: float = 0.0) -> Term | None:
        """The term, ready for `acgan.train`."""
        if self.term is None:
            return None
        term = self.term(data, weight)
        if not self.beside_r1:
            return term
        penalty = r1(data, r1_weight)
        return lambda step: term(step) + penalty(step)


_WEIGHTS = (0.01, 0.1, 1.0)
ARMS = (
    Arm("plain"),
    Arm("teacher gradients", teacher_gradients, _WEIGHTS),
    Arm("teacher logits", teacher_logits, _WEIGHTS),
    Arm("shuffled gradients", shuffled_gradients, _WEIGHTS),
    Arm("zero class gradients", zero_class_gradients, _WEIGHTS),
    Arm("R1", r1, _WEIGHTS),
    Arm("gradient penalty", gradient_penalty, (0.1, 1.0, 10.0)),
    Arm("pixel differences", pixel_differences, _WEIGHTS),
    Arm("R1 + teacher gradients", teacher_gradients, _WEIGHTS, beside_r1=True),
)
