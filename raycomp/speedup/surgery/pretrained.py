"""The config of a Hugging Face model that was cut: it says the new sizes where it can, so that `save_pretrained` loads
again; where it can't, `save_pretrained` says what to do instead.

Known by what they have (`config.to_dict`, `save_pretrained`), so that transformers need not be installed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import nn

from raycomp.errors import SpeedupError
from raycomp.speedup.surgery.plan import Surgery

_MOST_TRIES = 256


def settle_config_(model: nn.Module, surgeries: Sequence[Surgery]) -> None:
    """Gives a cut model the config whose fresh model has its sizes; one without a config is left alone.

    Args:
        model: the cut model.
        surgeries: what was done to it, in order.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or not hasattr(config, "to_dict"):
        return
    fitting = None
    with suppress(Exception):  # of the config's own code: then it can't say the sizes either
        fitting = next((tried for tried in _configs(config, surgeries) if _describes(tried, model)), None)
    if fitting is None:
        vars(model)["save_pretrained"] = _refuse
        return
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = fitting


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise SpeedupError(
        "from_pretrained could not load this cut model: its config can't say the sizes of its layers",
        remedy="save its state_dict, or load its artifact on a fresh model: raycomp.load(uri, model)",
    )


def _configs(config: Any, surgeries: Sequence[Surgery]) -> Iterator[Any]:
    """The config, and copies in which sizes that were cut are the new ones, those with the fewest changes first."""
    places = list(_places(config, _new_sizes(surgeries)))
    choices = itertools.product(*([None, *sizes] for _, sizes in places))
    for chosen in sorted(itertools.islice(choices, _MOST_TRIES), key=lambda c: sum(size is not None for size in c)):
        tried = copy.deepcopy(config)
        for (path, _), size in zip(places, chosen, strict=True):
            if size is not None:
                _set(tried, path, size)
        yield tried


def _new_sizes(surgeries: Sequence[Surgery]) -> dict[int, list[int]]:
    """Each size that was cut with what became of it."""
    pairs = [
        *((cut.size, len(cut.keep)) for surgery in surgeries for cut in surgery.cuts),
        *((each.old, each.new) for surgery in surgeries for each in surgery.attributes),
    ]
    found: dict[int, list[int]] = {}
    for old, new in dict.fromkeys(pairs):
        for earlier in (old, *(size for size, later in found.items() if old in later)):
            found.setdefault(earlier, []).append(new)
    return found


def _places(value: Any, sizes: dict[int, list[int]], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, list[int]]]:
    """Where in a config, its lists and the configs within it, a size stands that was cut."""
    if isinstance(value, (list, tuple)):
        items: Any = enumerate(value)
    elif hasattr(value, "to_dict"):
        items = ((name, part) for name, part in vars(value).items() if not name.startswith("_"))
    else:
        if type(value) is int and value in sizes:
            yield path, sizes[value]
        return
    for key, part in items:
        yield from _places(part, sizes, (*path, key))


def _set(config: Any, path: tuple[Any, ...], size: int) -> None:
    *above, last = path
    owner = config
    for key in above:
        owner = getattr(owner, key) if isinstance(key, str) else owner[key]
    if isinstance(last, str):
        setattr(owner, last, size)
    elif isinstance(owner, list):
        owner[last] = size


def _describes(config: Any, model: nn.Module) -> bool:
    """Whether a fresh model of the config has the sizes of this one, and states the same numbers."""
    try:
        with torch.device("meta"):
            fresh = type(model)(config)
    except Exception:  # whatever the user's class raises for sizes that don't go together
        return False
    return _sizes(fresh) == _sizes(model)


def _sizes(model: nn.Module) -> tuple[dict[str, torch.Size], dict[tuple[str, str], int]]:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    stated = {
        (name, key): value for name, module in model.named_modules() for key, value in vars(module).items()
        if type(value) is int
    }  # fmt: skip
    return shapes, stated
