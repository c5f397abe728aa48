"""What falls at which moment, in which order, and what several members of a chain have in common."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raycomp.core.chain import Chain
from raycomp.core.kept_masks import KeptMasks
from raycomp.core.masks import Masks
from raycomp.core.moments import RunContext
from raycomp.core.target import TargetId
from raycomp.errors import CompressionError
from raycomp.pruning import AGPPruner, L1NormPruner, LotteryTicketPruner
from raycomp.quantization import QATQuantizer


class Folded(nn.Module):
    """Channels 0, 1, 2, 3 of the weight are 8, 1, 4, 2; the norm multiplies them by 1, 100, 1, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4, eps=0.0)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([8.0, 1, 4, 2]).view(4, 1, 1, 1))
            self.norm.weight.copy_(torch.tensor([1.0, 100, 1, 1]))

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images))


def fused(model: Folded, quantizer_first: bool) -> tuple[Chain, QATQuantizer]:
    """AGP that prunes one channel after step 2 and two after step 4, and a folded scale of the weight."""
    prune = [{"op_names": ["conv"], "sparse_ratio": 0.5}]
    quantize = [{"op_names": ["conv"], "target_names": ["weight"], "fuse_names": [("conv", "norm")]}]
    if quantizer_first:
        quantizer = QATQuantizer(model, quantize)
        pruner = L1NormPruner.from_compressor(quantizer, prune)
    else:
        pruner = L1NormPruner(model, prune)
        quantizer = QATQuantizer.from_compressor(pruner, quantize)
    AGPPruner(pruner, 2, 2)
    return pruner.chain, quantizer


@pytest.mark.parametrize("quantizer_first", [False, True])
def test_the_scale_of_a_folded_weight_is_that_of_the_mask_of_the_same_step(quantizer_first: bool) -> None:
    model = Folded()
    chain, quantizer = fused(model, quantizer_first)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    greatest = []
    # In evaluation mode the running variance stays 1, so the fold multiplies by gamma.
    model.eval()
    with chain.run(RunContext([optimizer])):
        for _ in range(4):
            chain.training_step(lambda: model(torch.ones(2, 1, 3, 3)).sum(), None).backward()
            optimizer.step()
            greatest.append(float(quantizer.get_calibration_config()["conv"]["weight"]["scale"]) * 127)
    # Channel 1, with the least norm and the greatest folded weight, goes at step 2.
    assert greatest == pytest.approx([100, 8, 8, 8], rel=1e-6)
    assert chain.masks()["conv"]["weight"].flatten().tolist() == [1, 0, 1, 0]


def test_a_decision_at_the_end_of_a_round_is_in_the_state_that_follows() -> None:
    model = Folded()
    pruner = L1NormPruner(model, [{"op_names": ["conv"], "sparse_ratio": 0.5, "target_names": ["weight"]}])
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_names": ["conv"], "target_names": ["weight"]}])
    chain = LotteryTicketPruner(pruner, 1).chain
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        pruner.chain.space.parameter(TargetId("conv", "weight"))[3] = 0.5
    with chain.run(RunContext([optimizer])):
        optimizer.step()
        assert chain.masks()["conv"]["weight"].min() == 1
        chain.end_round()
        model_state, chain_state = model.state_dict(), chain.state_dict()
    (name,) = [name for name in model_state if name.endswith("masks.0.mask")]
    assert model_state[name].flatten().tolist() == [1, 0, 1, 0]
    assert (chain_state["round"], chain_state["steps_in_round"], chain_state["step"]) == (1, 0, 1)
    assert float(quantizer.get_calibration_config()["conv"]["weight"]["tracked_min"]) == 0


def test_the_masks_that_a_round_ends_with_are_those_of_the_weights_range() -> None:
    model = Folded()
    with torch.no_grad():
        model.conv.weight.copy_(torch.tensor([8.0, 0, 9, -20]).view(4, 1, 1, 1))
    pruner = L1NormPruner(
        model, [{"op_names": ["conv"], "sparse_threshold": 100.0, "max_sparse_ratio": 0.75, "target_names": ["weight"]}]
    )
    quantizer = QATQuantizer.from_compressor(pruner, [{"op_names": ["conv"], "target_names": ["weight"]}])
    chain = LotteryTicketPruner(pruner, 1).chain
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with chain.run(RunContext([optimizer])):
        optimizer.step()
        before = quantizer.get_calibration_config()["conv"]["weight"]
        chain.end_round()
    after = quantizer.get_calibration_config()["conv"]["weight"]
    assert (float(before["tracked_min"]), float(before["tracked_max"])) == (-20, 9)
    assert (float(after["tracked_min"]), float(after["tracked_max"])) == (-20, 0)


def kept(chain: Chain) -> KeptMasks:
    masks = Masks({"0": {"weight": torch.tensor([[1.0, 1], [0, 0]])}, "1": {"_input_0": torch.tensor([[1.0, 0]])}})
    masks.methods[TargetId("1", "_input_0")] = "add"
    return KeptMasks(chain, masks)


def test_kept_masks_hold_while_training_and_are_handed_on() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Softmax(-1))
    chain = Chain(model)
    kept(chain)
    with torch.no_grad():
        chain.space.parameter(TargetId("0", "weight")).copy_(torch.tensor([[1.0, 2], [3, 4]]))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with chain.run(RunContext([optimizer])):
        chain.training_step(lambda: model[0](torch.ones(1, 2)).sum(), None).backward()
        optimizer.step()
    # The gradient is 1 where the mask keeps, and 0 elsewhere.
    assert chain.space.parameter(TargetId("0", "weight")).tolist() == [[0, 1], [3, 4]]
    assert model[0].weight.tolist() == [[0, 1], [0, 0]]
    # The second score is 1000 less.
    assert model(torch.ones(1, 2)).tolist() == [[1, 0]]
    masks = chain.masks()
    assert masks["0"]["weight"].tolist() == [[1, 1], [0, 0]]
    assert masks["1"]["_input_0"].tolist() == [[1, 0]]
    assert (masks.method("0", "weight"), masks.method("1", "_input_0")) == ("mul", "add")
    chain.unwrap()
    assert model[0].weight.tolist() == [[0, 1], [0, 0]]


def test_kept_masks_and_a_pruners_hold_both() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Softmax(-1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
    chain = Chain(model)
    kept(chain)
    entry = {"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "in_channel", "target_names": ["weight"]}
    L1NormPruner(chain, [entry])
    chain.begin()
    assert chain.masks()["0"]["weight"].tolist() == [[0, 1], [0, 0]]
    chain.unwrap()
    assert model[0].weight.tolist() == [[0, 2], [0, 0]]


def test_a_run_needs_an_optimizer_and_a_wrapped_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    with pytest.raises(CompressionError, match="a training run needs an optimizer"), pruner.chain.run([]):
        pass
    pruner.unwrap_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(CompressionError, match="the model is unwrapped"), pruner.chain.run([optimizer]):
        pass


def test_a_calibration_takes_no_gradients() -> None:
    chain, seen = Chain(Folded()), []
    with chain.calibrating():
        chain.calibration_step(lambda: seen.append(torch.is_grad_enabled()))
    assert seen == [False] and torch.is_grad_enabled()


def test_a_chain_of_nothing_is_dense_and_needs_no_training() -> None:
    chain = Chain(Folded())
    assert (chain.sparsity(), chain.rounds, chain.wants_training) == (0.0, 0, False)
