"""Real images, and the two classifiers that see them: a teacher of the GAN's own images, a scorer of other ones."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

__all__ = ["CLASSES", "PIXELS", "Classifier", "Split", "split", "train_classifier"]

CLASSES, PIXELS = 10, 64
TRAINING, SCORER = 1000, 400


class Split(NamedTuple):
    """scikit-learn's 1,797 handwritten digits in three disjoint parts; images are rows of 64 pixels from -1 to 1."""

    x: Tensor
    """1,000 images for the GAN and its teacher."""
    labels: Tensor
    scorer_x: Tensor
    """400 images for the scorer."""
    scorer_labels: Tensor
    reference_x: Tensor
    """397 images that no network is trained on: what generated images are compared with."""
    reference_labels: Tensor


def split(seed: int) -> Split:
    """Three disjoint parts of the digits, each with all classes in proportion."""
    images, labels = load_digits(return_X_y=True)
    x, rest_x, y, rest_y = train_test_split(images, labels, train_size=TRAINING, stratify=labels, random_state=seed)
    scorer_x, other_x, scorer_y, other_y = train_test_split(
        rest_x, rest_y, train_size=SCORER, stratify=rest_y, random_state=seed
    )
    x, scorer_x, other_x = (torch.tensor(part).float() / 8 - 1 for part in (x, scorer_x, other_x))
    y, scorer_y, other_y = (torch.tensor(part).long() for part in (y, scorer_y, other_y))
    return Split(x, y, scorer_x, scorer_y, other_x, other_y)


class Classifier(nn.Module):
    """A smooth network with 64 features before its logits.

    Logits are centred (mean over classes zero): the constant that softmax ignores has no meaning, nor has its gradient.
    """

    center: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PIXELS, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU())
        self.head = nn.Linear(64, CLASSES)
        self.register_buffer("center", torch.zeros(64))
        self.register_buffer("spread", torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        """Centred logits, shape (batch, 10), of images (batch, 64)."""
        logits = self.head(self.body(x))
        return logits - logits.mean(1, keepdim=True)

    @torch.no_grad()
    def features(self, x: Tensor) -> NDArray[np.float64]:
        """Features, shape (batch, 64), with mean 0 and standard deviation 1 over the images of the training."""
        return ((self.body(x) - self.center) / self.spread).double().numpy()


def train_classifier(x: Tensor, labels: Tensor, *, seed: int, steps: int = 1500, noise: float = 0.3) -> Classifier:
    """Classifier of images with Gaussian noise added, which keeps its input gradients smooth (AdamW, cosine decay)."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=random)
        noisy = x[rows] + noise * torch.randn(64, PIXELS, generator=random)
        loss = nn.functional.cross_entropy(model(noisy), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        known = model.body(x)
        model.center.copy_(known.mean(0))
        model.spread.copy_(known.std(0) + 1e-6)  # a feature may be the same everywhere
    return model.eval().requires_grad_(False)
