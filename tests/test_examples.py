"""The README's snippets as they are, and the examples: they run, and fail if what they show is not there."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def snippets() -> list[Any]:
    """Python blocks of the README, one program per section; the two-line teaser at the top is no program."""
    text = (ROOT / "README.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    programs = [
        (section.splitlines()[0], "\n".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)))
        for section in sections
    ]
    return [pytest.param(code, id=title) for title, code in programs if code]


# What Lightning 2.6 and torch 2.13 say about each other, and Lightning's advice on loaders.
FILTERS = """
import warnings
warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*does not have many workers")
"""


@pytest.mark.parametrize("code", snippets())
def test_readme_snippets_run(code: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", FILTERS * ("import lightning" in code) + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_readme_has_a_snippet_for_each_plugin_and_tool() -> None:
    assert len(snippets()) == 10


def test_wing_weight_derivatives_equal_central_differences() -> None:
    from matching_wing_weight import LOWER, UPPER, sample, wing_weight

    x = sample(20, 0)
    y, slopes = wing_weight(x)
    area, fuel, aspect, sweep, q, taper, tc, load, gross, paint = x.T
    cosine = np.cos(np.radians(sweep))
    formula = (
        0.036
        * area**0.758
        * fuel**0.0035
        * (aspect / cosine**2) ** 0.6
        * q**0.006
        * taper**0.04
        * (100 * tc / cosine) ** -0.3
        * (load * gross) ** 0.49
        + area * paint
    )
    np.testing.assert_allclose(y, formula, rtol=1e-12)
    for j, step in enumerate(np.diag(1e-5 * (UPPER - LOWER))):
        slope = (wing_weight(x + step)[0] - wing_weight(x - step)[0]) / (2 * step[j])
        np.testing.assert_allclose(slopes[:, j], slope, rtol=1e-6)  # truncation and rounding of the difference


def test_derivatives_help_on_the_wing_weight() -> None:
    import matching_wing_weight as example

    x, y, dydx = example.standardised(example.sample(40, 0))
    test_x, test_y, _ = example.standardised(example.sample(500, 1))
    errors = {
        derivatives: example.score(
            example.train(example.Method("", derivatives=derivatives), x, y, dydx, 0), test_x, test_y
        )
        for derivatives in (False, True)
    }
    assert errors[True] < 0.2 * errors[False]


def test_demo_draws_and_says_what_it_found(tmp_path: Path) -> None:
    import demo
    import population_digits
    from rich.console import Console

    methods = population_digits.METHODS
    offsets = np.random.default_rng(0).uniform(0, 0.01, 3)
    rows = [{m.name: (90.0, 0.4 + (0.1 + offset) * (m.sigma == 0.3)) for m in methods} for offset in offsets]
    population = {m.name: np.array([row[m.name] for row in rows]) for m in methods}
    matching = {
        m.name: np.array([0.99, 1.0, 1.01]) * (0.1 if m.derivatives else 1) for m in demo.matching_wing_weight.METHODS
    }
    console = Console(width=150, file=io.StringIO())
    console.print(demo.population_table(population), demo.matching_table(matching))
    text = console.file.getvalue()  # type: ignore[attr-defined] - the StringIO above
    assert "equal to the bit" in text
    assert re.search(r"sigma 0\.3 .*hurts: \+\d", text)
    assert re.search(r"steps +│ 8x +│[^│]+│[^│]+│ +│", text)  # a method is compared at equal passes, this one with none
    assert re.search(r"derivatives .*helps: -90\.0 %", text)
    assert demo.verdict(np.array([1.0, 2.0]), np.array([2.0, 1.0])).startswith("no difference shown")
    picture = tmp_path / "out" / "demo.png"
    demo.draw({"population gradient": population, "gradient matching": matching}, picture)
    assert picture.stat().st_size > 10_000


def test_digits_control_equals_the_bare_optimizer() -> None:
    import population_digits as example

    train_x, test_x, train_y, test_y = example.split(0)
    scores = [
        example.score(example.train(method, 0, train_x, train_y), test_x, test_y)
        for method in (example.Method("", None, epochs=2), example.Method("", 0.0, epochs=2))
    ]
    assert scores[0] == scores[1]
