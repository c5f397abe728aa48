"""The model as its user wrote it, while compressors stand on it: names, order, classes, and no trace afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raycomp.core.chain import Chain
from raycomp.core.moments import RunContext
from raycomp.distillation import DynamicLayerwiseDistiller
from raycomp.pruning import L1NormPruner, SlimPruner
from raycomp.quantization import QATQuantizer


class Net(nn.Module):
    """Parameters in an unusual order, a folded pair, a hooked Sequential, and a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gain = nn.Parameter(torch.ones(1))
        self.embed = nn.Embedding(5, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.conv = nn.Conv1d(6, 6, 1)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)
        self.head.weight = self.embed.weight
        # The user's order is bias first.
        self.conv._parameters = {name: self.conv._parameters[name] for name in ("bias", "weight")}

    def forward(self, tokens: Tensor) -> Tensor:
        value = self.body(self.embed(tokens)) * self.gain
        return self.head(self.norm(self.conv(value.movedim(1, 2))).mean(2))


def compressed(model: Net) -> Chain:
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5, "exclude_op_names": ["head"]}])
    L1NormPruner.from_compressor(pruner, [{"op_names": ["head"], "sparse_ratio": 0.2}])
    SlimPruner.from_compressor(pruner, [{"op_names": ["norm"], "sparse_ratio": 0.5}], 2)
    QATQuantizer.from_compressor(
        pruner, [{"op_names": ["conv", "head"], "fuse_names": [("conv", "norm")]}, {"op_names": ["body.1"]}]
    )
    predict: Any = lambda batch, teacher: teacher(batch)  # noqa: E731
    return DynamicLayerwiseDistiller.from_compressor(pruner, [{"op_names": ["body"]}], Net(), predict).chain


def described(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "all parameters": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "state": list(model.state_dict()),
        "layers": [type(layer) for layer in model.body],
    }


TOKENS = torch.arange(5).view(1, 5).expand(3, 5)


def trained(chain: Chain, steps: int = 2) -> None:
    with chain.space.as_written():
        optimizer = torch.optim.SGD(chain.model.parameters(), 0.05)
    chain.model.train()
    with chain.run(RunContext([optimizer])):
        for _ in range(steps):
            optimizer.zero_grad()
            chain.training_step(lambda: chain.model(TOKENS).square().mean(), TOKENS).backward()
            optimizer.step()


@pytest.mark.parametrize("steps", [0, 2])
def test_inside_all_is_as_written_and_outside_all_is_as_before(steps: int) -> None:
    model = Net()
    written = described(model)
    chain = compressed(model)
    trained(chain, steps)
    wrapped = described(model)
    assert wrapped["all parameters"] != written["all parameters"]
    model.eval()
    output = model(TOKENS)
    with chain.space.as_written():
        assert described(model) == written
        for module in model.modules():
            for name, value in module._parameters.items():
                assert getattr(module, name) is value
        assert model.head.weight is model.embed.weight
        assert isinstance(model.conv.weight, nn.Parameter)
        assert not parametrize.is_parametrized(model.conv)
    assert described(model) == wrapped
    assert torch.equal(model(TOKENS), output)


def test_an_error_inside_leaves_it_as_before() -> None:
    model = Net()
    chain = compressed(model)
    wrapped = described(model)
    with pytest.raises(KeyError), chain.space.as_written():
        raise KeyError
    assert described(model) == wrapped


def test_groups_by_name_find_what_the_user_wrote() -> None:
    model = Net()
    plain = [name for name, _ in model.named_parameters() if "bias" not in name and "norm" not in name]
    chain = compressed(model)
    with chain.space.as_written():
        decayed = {name: p for name, p in model.named_parameters() if "bias" not in name and "norm" not in name}
    assert list(decayed) == plain
    assert {id(p) for p in decayed.values()} <= {id(p) for p in model.parameters()}


def test_a_users_state_is_his_alone_and_comes_back_bitwise() -> None:
    model = Net()
    start = copy.deepcopy(model.state_dict())
    chain = compressed(model)
    before = chain.users_state()
    assert list(before) == list(start)
    assert all(torch.equal(before[name], value) for name, value in start.items())
    trained(chain, 3)
    masks, scales = chain.masks(), chain.calibration()
    assert not torch.equal(chain.users_state()["conv.weight"], start["conv.weight"])
    assert int(chain.users_state()["norm.num_batches_tracked"]) == 3
    chain.restore_users_state(before)
    assert all(torch.equal(chain.users_state()[name], value) for name, value in start.items())
    assert all(torch.equal(mask, dict(masks.by_target())[key]) for key, mask in chain.masks().by_target())
    assert set(chain.calibration()) == set(scales)
    chain.unwrap()
    assert list(model.state_dict()) == list(start)


def test_a_state_of_the_plain_model_can_be_loaded() -> None:
    model, other = Net(), Net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    chain = compressed(model)
    chain.restore_users_state(other.state_dict())
    with chain.space.as_written():
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_parameters_that_no_optimizer_holds_are_named_as_the_user_knows_them() -> None:
    model = Net()
    model.gain.requires_grad_(False)
    chain = compressed(model)
    held = [p for name, p in model.named_parameters() if not name.startswith(("conv", "norm"))]
    optimizers = [torch.optim.SGD(held[:2], 0.1), torch.optim.SGD(held[2:], 0.1)]
    assert chain.unheld_parameters(optimizers) == ["conv.bias", "conv.weight", "norm.weight", "norm.bias"]
    assert chain.unheld_parameters([torch.optim.SGD(model.parameters(), 0.1)]) == []


def test_what_the_user_parametrized_is_shown_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    written = [name for name, _ in model.named_parameters()]
    chain = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}]).chain
    with chain.space.as_written():
        assert [name for name, _ in model.named_parameters()] == written
