"""Post-training quantization: golden ranges, a pass that changes nothing, and what it is fused with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raycomp.core.batch_share import BatchShare, use_share
from raycomp.core.moments import RunContext
from raycomp.errors import NotFiniteError
from raycomp.evaluators import TorchEvaluator
from raycomp.pruning import L1NormPruner
from raycomp.quantization import PtqQuantizer, QATQuantizer
from tests.pipeline.ranks import on_ranks


class Net(nn.Module):
    """The identity in evaluation: a batch norm and dropout before the layer that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1, eps=1e-12)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(1, 1)
        with torch.no_grad():
            self.fc.weight.fill_(1.0)
            self.fc.bias.zero_()

    def forward(self, value: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(value)))


class Script:
    """The user's own training: backward, step, schedule, whatever is asked of it."""

    def __init__(self, model: nn.Module, batches: Sequence[float], optimizer: Optimizer | None = None) -> None:
        self.batches = [torch.tensor([[float(value)]] * 2) for value in batches]
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.5)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.lengths: list[tuple[int | None, int | None]] = []
        self.modes: list[bool] = []
        self.evaluator = TorchEvaluator(self.train, self.optimizer, self.step, self.scheduler)

    def step(self, batch: Tensor, model: nn.Module) -> Tensor:
        self.modes.append(any(module.training for module in model.modules()))
        return model(batch).square().sum()

    def train(self, model: nn.Module, optimizer: Any, step: Any, scheduler: Any, steps: Any, epochs: Any) -> None:
        self.lengths.append((steps, epochs))
        for batch in self.batches[: steps or len(self.batches)]:
            model.train()
            optimizer.zero_grad(set_to_none=False)
            step(batch, model).backward()
            optimizer.step()
            scheduler.step()


def quantized(script: Script, model: nn.Module, steps: int | None = None, **settings: Any) -> PtqQuantizer:
    return PtqQuantizer(model, [{"op_names": ["fc"], **settings}], script.evaluator, steps)


def range_of(quantizer: Any, target: str = "_input_0") -> tuple[float, float]:
    found = quantizer.get_calibration_config()["fc"][target]
    return float(found["tracked_min"]), float(found["tracked_max"])


@pytest.mark.parametrize(
    ("scheme", "scale", "zero_point"),
    [("affine", 8 / 254, -32), ("symmetric", 5 / 127, 0)],
    ids=["affine", "symmetric"],
)
def test_the_golden_scale_of_the_inputs_one_five_minus_three(scheme: str, scale: float, zero_point: int) -> None:
    model = Net()
    quantizer = quantized(Script(model, [1, 5, -3]), model, quant_scheme=scheme, quant_dtype="int8")
    quantizer.compress()
    found = quantizer.get_calibration_config()["fc"]
    assert set(found) == {"_input_0", "weight", "bias", "_output_0"}
    assert float(found["_input_0"]["scale"]) == pytest.approx(scale, rel=1e-6)
    assert int(found["_input_0"]["zero_point"]) == zero_point
    assert range_of(quantizer) == range_of(quantizer, "_output_0") == (-3, 5)
    # 6 is beyond the range: the integer 127.
    model.eval()
    assert float(model(torch.tensor([[6.0]])).detach()) == pytest.approx((127 - zero_point) * scale, rel=1e-5)


def test_nothing_but_the_scales_changes_though_the_loop_does_backward_and_step() -> None:
    model = Net()
    script = Script(model, [1, 5, -3])
    # Momenta of a training before, which would move the weights without a gradient, as weight decay would.
    model(torch.tensor([[2.0], [3.0]])).sum().backward()
    script.optimizer.step()
    model.norm.eval()
    before = copy.deepcopy([model.state_dict(), script.optimizer.state_dict(), script.scheduler.state_dict()])
    quantizer = quantized(script, model)
    quantizer.compress()
    assert [module.training for module in (model, model.norm, model.drop)] == [True, False, True]
    assert [script.optimizer.state_dict(), script.scheduler.state_dict()] == before[1:]
    assert all(torch.equal(value, before[0][name]) for name, value in quantizer.chain.users_state().items())
    assert script.modes == [False] * 3
    quantizer.unwrap_model()
    assert list(model.state_dict()) == list(before[0])


def test_every_batch_passes_through_the_same_weights() -> None:
    model = Net()
    script = Script(model, [1, 1, 1])
    model(torch.tensor([[2.0], [3.0]])).sum().backward()
    script.optimizer.step()
    expected = float(model.eval()(torch.tensor([[1.0]])).detach())
    quantizer = quantized(script, model, target_names=["_output_"])
    quantizer.compress()
    assert range_of(quantizer, "_output_0") == (expected, expected)


def test_its_length_is_its_own_or_that_of_compress_or_one_epoch() -> None:
    for steps, given, expected in (
        (None, (None, None), (None, 1)),
        (2, (None, None), (2, None)),
        (None, (1, None), (1, None)),
        (None, (None, 4), (None, 1)),
        (2, (1, None), (2, None)),
    ):
        model = Net()
        script = Script(model, [1, 5, -3])
        quantized(script, model, steps).compress(*given)
        assert script.lengths == [expected]
    assert range_of(quantized_for(2)) == (1, 5)


def quantized_for(steps: int) -> PtqQuantizer:
    model = Net()
    quantizer = quantized(Script(model, [1, 5, -3]), model, steps)
    quantizer.compress()
    return quantizer


def test_before_the_calibration_nothing_is_quantized() -> None:
    model = Net()
    quantizer = quantized(Script(model, [1]), model, quant_dtype="int2")
    assert float(model.eval()(torch.tensor([[0.3]])).detach()) == pytest.approx(0.3)
    assert quantizer.get_calibration_config() == {}


def test_while_it_calibrates_it_does_not_quantize() -> None:
    model = Net()
    quantizer = quantized(Script(model, [0.3, 5, 0.7]), model, quant_dtype="int2", target_names=["_output_", "weight"])
    quantizer.compress()
    assert range_of(quantizer, "_output_0") == pytest.approx((0.3, 5))


def test_an_idle_ranks_stand_in_does_not_count() -> None:
    model = Net()
    quantizer = quantized(Script(model, []), model)
    with quantizer.chain.calibrating():
        quantizer.chain.calibration_step(lambda: model(torch.tensor([[2.0]])))
        with use_share(BatchShare(0, 4)):
            quantizer.chain.calibration_step(lambda: model(torch.tensor([[70.0]])))
        model(torch.tensor([[70.0]]))
    assert range_of(quantizer) == (2, 2)


def calibrated_on_a_rank(rank: int, world: int) -> dict[str, Any]:
    model = Net()
    quantizer = quantized(Script(model, [[1, 5], [-3, 2]][rank]), model, quant_scheme="affine")
    quantizer.compress()
    return {
        "range": range_of(quantizer),
        "zero_point": int(model.fc.raycomp_targets.targets["_input_0"].quantizer.zero_point),
    }


def test_ranks_merge_what_they_saw() -> None:
    assert on_ranks(2, calibrated_on_a_rank) == [{"range": (-3, 5), "zero_point": -32}] * 2


def test_fused_with_what_trains_it_calibrates_what_was_trained() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.25)
    script = Script(model, [], optimizer)
    script.batches = [torch.tensor([[0.0], [1.0]])] * 4
    torch.manual_seed(0)
    pruner = L1NormPruner(model, [{"op_names": ["fc"], "sparse_ratio": 0.1}], script.evaluator)
    quantizer = PtqQuantizer.from_compressor(pruner, [{"op_names": ["fc"]}])
    quantizer.compress(4, None)
    assert script.lengths == [(4, None), (None, 1)]
    trained = float(quantizer.chain.users_state()["fc.weight"])
    assert trained != 1
    assert range_of(quantizer, "weight") == (trained, trained)
    # The trained norm's outputs, which in training are -1, 0 (dropped), 1 and their doubles.
    assert range_of(quantizer) == tuple(model.norm.eval()(torch.tensor([[0.0], [1.0]])).flatten().tolist())


def test_what_passes_while_another_trains_does_not_count() -> None:
    model = Net().eval()
    pruner = L1NormPruner(model, [{"op_names": ["fc"], "sparse_ratio": 0.1}])
    quantizer = PtqQuantizer.from_compressor(pruner, [{"op_names": ["fc"]}])
    chain = quantizer.chain
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with chain.run(RunContext([optimizer])):
        chain.training_step(lambda: model(torch.tensor([[70.0]])).sum(), None).backward()
        optimizer.step()
        chain.end_round()
    assert quantizer.get_calibration_config() == {}
    with chain.calibrating():
        chain.calibration_step(lambda: model(torch.tensor([[2.0]])))
    assert range_of(quantizer) == (2, 2)
    assert chain.notes == ()


def test_a_calibration_leaves_the_averages_of_qat() -> None:
    model = Net().eval()
    trained = QATQuantizer(model, [{"op_names": ["fc"], "target_names": ["_input_"]}])
    PtqQuantizer.from_compressor(trained, [{"op_names": ["fc"], "target_names": ["_output_"]}])
    chain = trained.chain
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with chain.run(RunContext([optimizer])):
        chain.training_step(lambda: model(torch.tensor([[2.0]])).sum(), None).backward()
        optimizer.step()
    with chain.calibrating():
        chain.calibration_step(lambda: model(torch.tensor([[70.0]])))
    assert range_of(trained) == (2, 2)
    assert not chain.state_dict()["compressors"][0]["state"]["gathered"]["fc._input_0"]


def test_an_activation_that_no_batch_passed_is_told() -> None:
    class Unused(Net):
        def forward(self, value: Tensor) -> Tensor:
            return self.norm(value)

    model = Unused()
    with pytest.warns(UserWarning, match=r"PtqQuantizer: no .*passed fc._input_0, fc._output_0: not quantized"):
        quantized(Script(model, [1, 2]), model).compress()


def test_nnis_order_of_arguments() -> None:
    model = Net()
    evaluator = Script(model, [1]).evaluator
    pruner = L1NormPruner(model, [{"op_names": ["fc"], "sparse_ratio": 0.1}])
    assert PtqQuantizer.from_compressor(pruner, [{"op_names": ["fc"]}], evaluator).evaluator is evaluator


def test_a_calibration_that_is_not_finite_says_that_it_was_one() -> None:
    model = Net()
    entry = {"op_names": ["fc"], "target_names": ["weight", "_input_"]}
    quantizer = PtqQuantizer(model, [entry], Script(model, [1.0, float("inf")]).evaluator)
    with pytest.raises(NotFiniteError, match=r"in the calibration .*fc\._input_0.* is not finite \(look at"):
        quantizer.compress()
