"""The core's unit noise inside a training step: windows of the table, found from the step counter in the graph."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from gradwise._noise import CHUNK, noise_table, window_draw, window_of
from gradwise._population import Population
from gradwise_keras._backend import BACKEND, WORD, as_word, ops

__all__ = ["Noise", "StepNoise"]


class Noise:
    """Unit noise of some tensors, for every stream and step; the same numbers as ``Population.unit_noise``.

    Parameters
    ----------
    population : Population
        What a member is.
    shapes : sequence of tuple of int
        Shapes of the tensors.
    indices : sequence of int
        Their words in the keys.
    streams : int
        How many streams there are.
    """

    def __init__(
        self, population: Population, shapes: Sequence[tuple[int, ...]], indices: Sequence[int], *, streams: int
    ) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        words = [
            [
                pair
                for size, index in zip(sizes, indices, strict=True)
                for pair in population.words_of(size, stream=stream, tensor=index)
            ]
            for stream in range(streams)
        ]
        pairs = np.array(words, dtype=np.uint32).reshape(streams, -1, 2)
        # Made outside of any step. A variable is what TensorFlow keeps one of on every device.
        self._first, self._second = as_word(pairs[..., 0]), as_word(pairs[..., 1])
        table = noise_table(population.noise)
        self._table = (
            keras.Variable(table, trainable=False) if BACKEND == "tensorflow" else ops.convert_to_tensor(table)
        )
        self.shapes = list(shapes)
        self._lengths = [[min(CHUNK, size - start) for start in range(0, size, CHUNK)] for size in sizes]

    def at(self, step: Any) -> "StepNoise":
        """The noise of one step, whose counter may be a tensor."""
        draws = window_draw(self._first, self._second, as_word(step), word=WORD)
        offsets, negative = window_of(draws)
        if BACKEND == "torch":  # one wait for the device instead of one for each window
            offsets, signs = offsets.tolist(), (1.0 - 2.0 * negative).tolist()
        else:
            offsets, signs = ops.cast(offsets, "int32"), 1.0 - 2.0 * ops.cast(negative, "float32")
        table = self._table.value if BACKEND == "tensorflow" else self._table
        return StepNoise(table, offsets, signs, self.shapes, self._lengths)


class StepNoise:
    """Unit noise of one step."""

    def __init__(
        self, table: Any, offsets: Any, signs: Any, shapes: list[tuple[int, ...]], lengths: list[list[int]]
    ) -> None:
        self._table, self._offsets, self._signs = table, offsets, signs
        self._shapes, self._lengths = shapes, lengths

    def unit(self, stream: int) -> list[Any]:
        """Every tensor's noise in float32, of mean 0 and standard deviation 1."""
        result: list[Any] = []
        place = 0
        for shape, lengths in zip(self._shapes, self._lengths, strict=True):
            parts: list[Any] = []
            for length in lengths:
                window = ops.slice(self._table, [self._offsets[stream][place]], [length])
                parts.append(window * self._signs[stream][place])
                place += 1
            flat = parts[0] if len(parts) == 1 else ops.concatenate([*parts, self._table[:0]])
            result.append(ops.reshape(flat, shape))
        return result
