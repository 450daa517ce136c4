"""What a model is worth on data: F1, accuracy, log-loss before and after temperature scaling, calibration; or R2."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error, r2_score

__all__ = ["log_losses", "regression_scores", "scores", "temperature"]

BINS = 15

Logits = NDArray[np.float64]
Labels = NDArray[np.int64]


def log_losses(logits: Logits, labels: Labels) -> NDArray[np.float64]:
    """Of every row, in nats."""
    return -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]


def temperature(logits: Logits, labels: Labels) -> float:
    """What logits are to be divided by for the least log-loss; from validation data (Guo et al., arXiv 1706.04599)."""
    found = minimize_scalar(
        lambda log_t: log_losses(logits / np.exp(log_t), labels).mean(), bounds=(-3, 4), method="bounded"
    )
    return float(np.exp(found.x))


def calibration_error(logits: Logits, labels: Labels) -> float:
    """Expected difference of confidence and accuracy, over bins of equally many rows."""
    log_probabilities = log_softmax(logits, axis=1)
    confidence = np.exp(log_probabilities.max(1))
    right = log_probabilities.argmax(1) == labels
    bins = np.array_split(np.argsort(confidence, kind="stable"), BINS)
    return sum(len(rows) * abs(confidence[rows].mean() - right[rows].mean()) for rows in bins) / len(labels)


def scores(logits: Logits, labels: Labels, *, scaled_by: float) -> dict[str, float]:
    """All scores; those in percent are F1 (macro), accuracy and calibration error."""
    predicted = logits.argmax(1)
    return {
        "f1": 100 * float(f1_score(labels, predicted, average="macro")),
        "accuracy": 100 * float(accuracy_score(labels, predicted)),
        "log_loss": float(log_losses(logits, labels).mean()),
        "scaled_log_loss": float(log_losses(logits / scaled_by, labels).mean()),
        "calibration_error": 100 * calibration_error(logits, labels),
    }


def regression_scores(predicted: Logits, y: NDArray[np.float32]) -> dict[str, float]:
    """Coefficient of determination in percent, and the mean squared error."""
    return {"r2": 100 * float(r2_score(y, predicted)), "mse": float(mean_squared_error(y, predicted))}
