"""What layers that run in training alone hold on to: an auxiliary head reads channels that evaluation needn't keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from raycomp.errors import SpeedupError
from raycomp.speedup.analysis.propagate import relate
from raycomp.speedup.graph.example import Example
from raycomp.speedup.graph.graph import Graph, Value
from raycomp.speedup.graph.trace import trace
from raycomp.speedup.rules.base import Bools, Registry


@dataclass(frozen=True)
class Pin:
    """Coordinates of a parameter or buffer that can't go, because of a layer that only training runs."""

    value: Value
    dim: int
    stays: Bools
    reason: str


def training_pins(graph: Graph, model: nn.Module, example: Example, rules: Registry) -> tuple[Pin, ...]:
    """The coordinates that go together with those of layers which the graph doesn't use and training does.

    Args:
        graph: of the model in eval mode.
        model: the model; it is in eval mode afterwards.
        example: an example input. Where training takes another one, nothing can be told.
        rules: the operators' rules.
    """
    idle = {value.tensor for value in graph.state() if value.kind == "parameter" and not graph.consumers[value]}
    if not idle:
        return ()
    try:
        training = trace(model, example, training=True)
    except SpeedupError:
        return ()
    finally:
        model.eval()
    return tuple(_pins(graph, training, idle, rules))


def _pins(graph: Graph, training: Graph, idle: set[str], rules: Registry) -> Iterator[Pin]:
    atoms = relate(training, rules)
    by_name = {value.tensor: value for value in graph.state()}
    alone = [value for value in training.state() if value.tensor in idle and training.consumers[value]]
    for held in (value for value in training.state() if value.tensor in by_name.keys() - idle):
        for dim in range(held.ndim):
            own = atoms.roots(atoms.ids(held, dim))
            for value in alone:
                theirs = [atoms.roots(atoms.ids(value, other)) for other in range(value.ndim)]
                stays = np.isin(own, np.concatenate(theirs))
                if stays.any():
                    reason = f"{value.tensor.rpartition('.')[0]!r}, which runs in training alone, goes with it"
                    yield Pin(by_name[held.tensor], dim, stays, reason)
