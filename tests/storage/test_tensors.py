"""Tensors and states in files that hold data alone."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import raycomp.storage
from raycomp.errors import ArtifactError, StorageError
from raycomp.storage import join_state, load_tensors, save_tensors, split_state


def test_tensors_come_back_bitwise(tmp_path: Path) -> None:
    shared = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    tensors = {
        "f32": torch.tensor([0.1, -0.0, math.nan, math.inf]),
        "bf16": torch.tensor([1.5, 2.25], dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "base": shared,
        "tied": shared,
        "view": shared[:, 1],
        "transposed": shared.t(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "images": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    save_tensors(tmp_path / "sub" / "t.safetensors", tensors)
    loaded = load_tensors(tmp_path / "sub" / "t.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(7), tensor.detach().nan_to_num(7)), name
    assert math.copysign(1, loaded["f32"][1].item()) == -1
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["t.safetensors"]


def test_a_file_that_is_not_safetensors_is_never_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harmed",)

    for content in (pickle.dumps(Harm()), b"", b"\xff" * 100):
        (tmp_path / "t.safetensors").write_bytes(content)
        with pytest.raises(ArtifactError, match="it is not a safetensors file"):
            load_tensors(tmp_path / "t.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "t.safetensors")
    with pytest.raises(ArtifactError):
        load_tensors(tmp_path / "t.safetensors")
    assert not (tmp_path / "harmed").exists()


def test_storage_has_no_way_to_unpickle() -> None:
    for file in Path(raycomp.storage.__file__).parent.glob("*.py"):
        source = file.read_text()
        assert "torch.load" not in source
        assert "import pickle" not in source


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    save_tensors(file, {"a": torch.ones(100)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        load_tensors(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no such file"):
        load_tensors(tmp_path / "none")


def through_files(state: object, folder: Path) -> Any:
    tensors, rest = split_state(state)
    save_tensors(folder / "state.safetensors", tensors)
    (folder / "state.json").write_text(json.dumps(rest, allow_nan=False))
    return join_state(load_tensors(folder / "state.safetensors"), json.loads((folder / "state.json").read_text()))


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        0.1,
        "text",
        True,
        [],
        (),
        {},
        {"a": [1, (2, 3.5, None)], 0: {"b": False}, "0": "text key beside a number"},
        [math.inf, -math.inf],
        {"tensor": "name", "dict": [1], "float": "nan", "tuple": ()},
        {"big": 2**70, "small": 5e-324, "third": 1 / 3},
    ],
)
def test_plain_states_come_back_with_their_types(state: object, tmp_path: Path) -> None:
    again = through_files(state, tmp_path)
    assert again == state
    assert repr(again) == repr(state)


def test_nan_comes_back(tmp_path: Path) -> None:
    assert math.isnan(through_files({"loss": math.nan}, tmp_path)["loss"])


def test_names_that_look_alike_stay_apart(tmp_path: Path) -> None:
    state = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), 0: torch.tensor(3), "0": torch.tensor(4)}
    again = through_files(state, tmp_path)
    assert (again["a"]["b"], again["a.b"], again[0], again["0"]) == (1, 2, 3, 4)
    assert set(split_state(state)[0]) == {"a.b", "a.b_", "0", "0_"}


def test_an_optimizer_and_its_scheduler_resume_bitwise(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> None:
        for number in range(count):
            optimizer.zero_grad()
            model(torch.full((4, 3), float(number))).square().sum().backward()
            optimizer.step()
            scheduler.step()

    first = make()
    step(*first, 3)
    saved = through_files([part.state_dict() for part in first], tmp_path)
    second = make()
    parts: tuple[Any, ...] = second
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    step(*first, 3)
    step(*second, 3)
    assert torch.equal(first[0].weight, second[0].weight)  # type: ignore[arg-type]
    assert first[2].get_last_lr() == second[2].get_last_lr()


@pytest.mark.parametrize(
    ("state", "where", "told"),
    [
        ({"a": [1, object()]}, "a.1", "object"),
        ({"a": {1.5: 2}}, "a", "key 1.5"),
        ({"a": {True: 2}}, "a", "key True"),
        ({"a": {1, 2}}, "a", "set"),
        (torch.Size([1]), "state", "Size"),
        (b"bytes", "state", "bytes"),
    ],
)
def test_what_a_state_can_not_hold(state: object, where: str, told: str) -> None:
    with pytest.raises(StorageError) as caught:
        split_state(state)
    assert caught.value.where == where
    assert told in caught.value.message


@pytest.mark.parametrize("damaged", [{"tensor": "gone"}, {"what": 1}, {"dict": 3}, {"a": 1, "b": 2}, {"float": "x"}])
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(ArtifactError, match="does not fit"):
        join_state({}, damaged)
