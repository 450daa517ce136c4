"""Population gradient in skorch: an estimator of scikit-learn, in a pipeline, its sigma chosen by a grid search.

skorch passes a closure to the optimizer, so every step runs all members on its batch. 200 handwritten digits to train
on, the others to test. The choice among three sigmas is by cross-validation on the 200; whether it helps differs from
data to data, and sigma 0 is among them. Run: ``python examples/skorch_digits.py``; takes about half a minute.
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler
from skorch import NeuralNetClassifier
from torch import nn

from gradwise.torch import PopulationGradient

SIGMAS = (0.0, 0.1, 0.3)


def population(params: Any, lr: float, *, population_size: int = 4, sigma: float = 0.1) -> PopulationGradient:
    """What skorch calls to make the optimizer; keywords become parameters of the net: ``optimizer__sigma``.

    A function of a module, not a lambda, so that nets can be pickled, cloned and sent to other processes.
    """
    inner = torch.optim.AdamW(params, lr=lr)
    return PopulationGradient(inner, population_size=population_size, sigma=sigma, seed=0)


class Digits(nn.Sequential):
    """A small network."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


class Pixels(MinMaxScaler):
    """Pixels from 0 to 1, in the precision of the network."""

    def transform(self, X: Any) -> Any:
        """Scale."""
        return super().transform(X).astype("float32")


def make_pipeline_of(optimizer: Any = population, *, max_epochs: int = 10, **settings: Any) -> Pipeline:
    """Scaling and the net, as one estimator."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"criterion": nn.CrossEntropyLoss, "train_split": None, "verbose": 0}
    common |= {"lr": 3e-3, "batch_size": 20, "max_epochs": max_epochs}
    return make_pipeline(Pixels(), NeuralNetClassifier(Digits, optimizer=optimizer, **(common | settings)))


def split() -> list[Any]:
    """Training and test images, training and test labels."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(images, labels, train_size=200, stratify=labels, random_state=0)


def search(images: Any, labels: Any, **settings: Any) -> GridSearchCV:
    """Choose sigma by cross-validation."""
    grid = {"neuralnetclassifier__optimizer__sigma": SIGMAS}
    return GridSearchCV(make_pipeline_of(**settings), grid, cv=3).fit(images, labels)


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks this small have nothing to share out
    train_x, test_x, train_y, test_y = split()
    found = search(train_x, train_y)
    for sigma, score in zip(SIGMAS, found.cv_results_["mean_test_score"], strict=True):
        print(f"sigma {sigma}: accuracy {score:.3f} in cross-validation")
    print(f"{found.best_params_} reaches {found.score(test_x, test_y):.3f} on the test data")
