from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from raycomp.core.batch_share import BatchShare, use_share
from raycomp.errors import CompressionError
from raycomp.pipeline.training.batch_norm import global_moments, is_synchronised, synchronise_batch_norm_
from tests.pipeline.ranks import gradients_of, on_ranks

FORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.BatchNorm1d, (), {}),
    "1d-sequence": (nn.BatchNorm1d, (5,), {}),
    "2d": (nn.BatchNorm2d, (3, 4), {}),
    "3d": (nn.BatchNorm3d, (2, 3, 2), {}),
    "cumulative": (nn.BatchNorm2d, (3, 4), {"momentum": None}),
    "untracked": (nn.BatchNorm2d, (3, 4), {"track_running_stats": False}),
    "plain": (nn.BatchNorm2d, (3, 4), {"affine": False}),
}
SLICES = {"2 ranks": [3, 4], "3 uneven ranks": [1, 4, 2], "an idle rank": [5, 2, 0]}


def _norm(form: str) -> nn.Module:
    kind, _, options = FORMS[form]
    norm = kind(3, **options).double()
    if norm.weight is not None:
        norm.weight.data = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
        norm.bias.data = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    return norm


def _whole(form: str, step: int) -> tuple[Tensor, Tensor]:
    """A global batch of 7 samples whose channels have means far from zero, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(step)
    shape = (7, 3, *FORMS[form][1])
    offset = torch.tensor([100.0, -3.0, 0.0]).view(3, *[1] * len(FORMS[form][1]))
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64) * (step + 1) + offset,
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def _train(norm: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    outputs, gradients = [], []
    for inputs, gradient in batches:
        inputs = inputs.clone().requires_grad_()
        output = norm(inputs)
        output.backward(gradient)
        outputs.append(output.detach().numpy())
        assert inputs.grad is not None
        gradients.append(inputs.grad.numpy())
    return {
        "outputs": outputs,
        "input gradients": gradients,
        "parameter gradients": gradients_of(norm),
        "buffers": [buffer.numpy() for buffer in norm.buffers()],
    }


def _train_slice(rank: int, world: int, form: str, sizes: list[int]) -> dict[str, Any]:
    start = sum(sizes[:rank])
    batches = []
    for step in range(3):
        inputs, gradient = _whole(form, step)
        stop = start + sizes[rank]
        if sizes[rank]:
            batches.append((inputs[start:stop], gradient[start:stop]))
        else:
            batches.append((torch.full_like(inputs[:2], 7.0), torch.zeros_like(inputs[:2])))
    norm = _norm(form)
    synchronise_batch_norm_(norm)
    with use_share(BatchShare(sizes[rank], sum(sizes))):
        return _train(norm, batches)


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_compute_what_one_process_computes(form: str, slices: str) -> None:
    sizes = SLICES[slices]
    expected = _train(_norm(form), [_whole(form, step) for step in range(3)])
    ranks = on_ranks(len(sizes), _train_slice, form, sizes)
    for key in ("outputs", "input gradients"):
        for step in range(3):
            parts = [torch.from_numpy(rank[key][step]) for rank, size in zip(ranks, sizes, strict=True) if size]
            _assert_equal(torch.cat(parts), torch.from_numpy(expected[key][step]))
    for i, whole in enumerate(expected["parameter gradients"]):
        _assert_equal(torch.stack([torch.from_numpy(r["parameter gradients"][i]) for r in ranks]).sum(0), whole)
    for rank in ranks:
        for found, whole in zip(rank["buffers"], expected["buffers"], strict=True):
            _assert_equal(torch.from_numpy(found), whole)
        assert all((a == b).all() for a, b in zip(rank["buffers"], ranks[0]["buffers"], strict=True))


def _assert_equal(found: Tensor, expected: Any) -> None:
    expected = torch.as_tensor(expected)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max().clamp(min=1)


def _train_under_ddp(rank: int, world: int) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model = model.double()
    synchronise_batch_norm_(model)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    data = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    mine = {1: [data], 2: [data[:3], data[3:]], 3: [data[:1], data[1:], data[:0]]}[world][rank]
    stand_in = torch.full_like(data[:2], 9.0)
    with use_share(BatchShare(len(mine), 5)):
        (wrapped(mine if len(mine) else stand_in).square().mean() * len(mine) / 5 * world).backward()
    return gradients_of(model)


@pytest.mark.parametrize("world", [2, 3])
def test_a_network_under_ddp_has_the_gradients_of_one_process(world: int) -> None:
    expected = _train_under_ddp(0, 1)
    for rank in on_ranks(world, _train_under_ddp):
        for found, whole in zip(rank, expected, strict=True):
            _assert_equal(torch.from_numpy(found), whole)


def _idle_with_gradient(rank: int, world: int) -> list[Any]:
    inputs, gradient = _whole("2d", 0)
    norm = _norm("2d")
    synchronise_batch_norm_(norm)
    inputs = (inputs if rank == 0 else torch.full_like(inputs[:2], 7.0)).requires_grad_()
    with use_share(BatchShare(7 * (1 - rank), 7)):
        norm(inputs).backward(gradient[: len(inputs)])
    assert inputs.grad is not None
    return [inputs.grad.numpy()]


def test_a_stand_in_has_no_part_in_anyone_elses_gradient() -> None:
    expected = _train(_norm("2d"), [_whole("2d", 0)])["input gradients"]
    working, idle = on_ranks(2, _idle_with_gradient)
    _assert_equal(torch.from_numpy(working[0]), expected[0])
    # Moments that do not depend on the stand-in: its gradient is the one of evaluation, dy·γ/σ.
    inputs, gradient = _whole("2d", 0)
    variance = inputs.var((0, 2, 3), correction=0).view(3, 1, 1)
    weight = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64).view(3, 1, 1)
    _assert_equal(torch.from_numpy(idle[0]), gradient[:2] * weight / (variance + 1e-5).sqrt())


def _low_precision(rank: int, world: int) -> tuple[bool, float, float]:
    whole = (torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 1000).bfloat16()
    moments = global_moments(whole.chunk(world)[rank])
    norm = nn.BatchNorm2d(3)
    synchronise_batch_norm_(norm)
    inputs = whole.chunk(world)[rank].clone().requires_grad_()
    output = norm(inputs)
    output.sum().backward()
    variance, mean = torch.var_mean(whole.double(), (0, 2, 3), correction=0)
    kept = output.dtype == torch.bfloat16 and inputs.grad is not None and inputs.grad.dtype == torch.bfloat16
    return kept, float((moments.mean - mean).abs().max()), float((moments.variance / variance - 1).abs().max())


def test_bf16_keeps_its_type_and_is_measured_in_float32() -> None:
    for kept, mean_error, variance_error in on_ranks(2, _low_precision):
        assert kept
        assert mean_error < 1e-3
        assert variance_error < 1e-5


def _one_value(rank: int, world: int) -> str:
    norm = nn.BatchNorm1d(3)
    synchronise_batch_norm_(norm)
    with use_share(BatchShare(1 - rank, 1)), pytest.raises(ValueError) as raised:
        norm(torch.zeros(1 + rank, 3))
    return str(raised.value)


def test_a_single_value_per_channel_is_refused_on_every_rank() -> None:
    assert all("more than one value per channel" in message for message in on_ranks(2, _one_value))


def _evaluate_unevenly(rank: int, world: int) -> Any:
    norm = _norm("2d")
    synchronise_batch_norm_(norm)
    norm.eval()
    inputs = _whole("2d", 0)[0]
    return [norm(inputs).detach().numpy() for _ in range(rank + 1)][-1]


def test_evaluation_is_no_collective() -> None:
    expected = _norm("2d").eval()(_whole("2d", 0)[0])
    for rank in on_ranks(2, _evaluate_unevenly):
        _assert_equal(torch.from_numpy(rank), expected.detach())


def test_the_module_stays_what_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.InstanceNorm2d(3), nn.SyncBatchNorm(3))
    keys = list(model.state_dict())
    assert synchronise_batch_norm_(model) == ["1"]
    assert synchronise_batch_norm_(model) == []
    assert type(model[1]).__name__ == "BatchNorm2d"
    assert isinstance(model[1], nn.BatchNorm2d)
    assert list(model.state_dict()) == keys
    assert [is_synchronised(module) for module in model] == [False, True, False, False]


def test_a_copy_is_synchronised_by_itself() -> None:
    norm = nn.BatchNorm2d(3)
    synchronise_batch_norm_(norm)
    twin = copy.deepcopy(norm)
    assert is_synchronised(twin)
    twin(torch.randn(2, 3, 4, 4))
    assert twin.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrizations_come_and_go_on_a_synchronised_norm() -> None:
    inputs = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(3)
    synchronise_batch_norm_(norm)
    parametrize.register_parametrization(norm, "weight", _Double())
    assert torch.allclose(norm(inputs), 2 * nn.BatchNorm2d(3)(inputs))
    parametrize.remove_parametrizations(norm, "weight")
    assert is_synchronised(norm)


class _OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_a_norm_that_would_quietly_stay_unsynchronised_is_refused() -> None:
    parametrized = nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrized, "weight", _Double())
    for norm in (_OwnForward(3), parametrized):
        model = nn.Sequential(nn.BatchNorm2d(3), norm)
        with pytest.raises(CompressionError, match=r"^1: this "):
            synchronise_batch_norm_(model)
        assert not is_synchronised(model[0])
