"""The digits example in Keras's `fit`, on the backend of this process."""

import keras_fit as example
import numpy as np


def test_control_equals_the_bare_optimizer() -> None:
    train_x, _, train_y, _ = example.split(0)
    methods = (example.Method("", epochs=2), example.Method("", population={"sigma": 0.0}, epochs=2))
    plain, control = (example.train(method, 0, train_x, train_y).get_weights() for method in methods)
    assert all(np.array_equal(a, b) for a, b in zip(plain, control, strict=True))


def test_members_learn_the_digits() -> None:
    train_x, test_x, train_y, test_y = example.split(0)
    model = example.train(example.Method("", population={"population_size": 2}), 0, train_x, train_y)
    accuracy, loss = example.score(model, test_x, test_y)
    assert accuracy > 80  # of ten classes; plain AdamW reaches 89
    assert loss < 0.7
