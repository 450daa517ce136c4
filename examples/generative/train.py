"""A plain GAN and one whose discriminator knows a teacher's gradients, on scikit-learn's digits: about a minute.

Prints the scores of both, in the features of a network that neither has seen, and draws ``out/generative_example.png``:
the same noise and labels for both, beside real images. What ten seeds and the controls say is in docs/generative.md.
Run: ``python examples/generative/train.py``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generative.acgan import Run, train
from generative.digits import CLASSES, Split, split, train_classifier
from generative.scores import Scores, score
from generative.terms import Data, teacher_gradients

ROWS = 8


def train_both(parts: Split, *, seed: int, steps: int, weight: float) -> dict[str, Run]:
    """The two GANs, with the same first weights, batches and noise."""
    teacher = train_classifier(parts.x, parts.labels, seed=2 * seed)
    terms = {"plain": None, "teacher gradients": teacher_gradients(Data(parts.x, parts.labels, teacher, seed), weight)}
    return {name: train(parts.x, parts.labels, seed=seed, term=term, steps=(steps,)) for name, term in terms.items()}


def draw(images: dict[str, torch.Tensor], path: Path) -> None:
    """Grids of images, a column for each class."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(images), figsize=(3.4 * len(images), 3), layout="constrained")
    for axis, (name, pixels) in zip(axes, images.items(), strict=True):
        tiles = torch.nn.functional.pad(pixels.reshape(ROWS, CLASSES, 8, 8), (1, 1, 1, 1))  # grey frames
        axis.imshow(tiles.permute(0, 2, 1, 3).reshape(10 * ROWS, 10 * CLASSES).numpy(), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Scores]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of each GAN")
    parser.add_argument("--weight", type=float, default=0.1, help="of the gradient term")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/generative_example.png"))
    options = parser.parse_args(arguments)

    parts = split(options.seed)
    runs = train_both(parts, seed=options.seed, steps=options.steps, weight=options.weight)
    scorer = train_classifier(parts.scorer_x, parts.scorer_labels, seed=2 * options.seed + 1)
    reference = scorer.features(parts.reference_x)
    table = Table("", "KID x 1000", "Frechet distance", "precision", "recall", "process s")
    results: dict[str, Scores] = {}
    columns = torch.arange(CLASSES).repeat(ROWS)
    labels = parts.reference_labels
    images = {"real": torch.stack([parts.reference_x[labels == c][:ROWS] for c in range(CLASSES)], 1)}
    for name, run in runs.items():
        generator = run.at_steps[options.steps]
        results[name] = scores = score(reference, scorer.features(generator.sample(labels, seed=0)))
        numbers = (f"{1000 * scores.kid:.1f}", f"{scores.frechet:.2f}", f"{scores.precision:.2f}")
        table.add_row(name, *numbers, f"{scores.recall:.2f}", f"{run.seconds:.1f}")
        images[name] = generator.sample(columns, seed=0)
    draw(images, options.out)
    Console().print(table, f"same noise and labels: {options.out}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
