"""Handwritten digits: 1,797 images of 8 x 8 that come with scikit-learn; a ResNet-8 that teaches itself."""

from __future__ import annotations

from pathlib import Path

import torch
from dense import Weights, remembered, train
from resnet import ResNet
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import TensorDataset

from raycomp import Task

TEST_SAMPLES = 360


class Digits(Task):
    """Classifies digits with a ResNet-8.

    Args:
        width: channels of the first stage.
        dense_epochs: of the training that makes the dense model and teacher.
        seed: of the dense model and of the split into train and test data.
        learning_rate: the greatest one while the model is compressed.
    """

    def __init__(self, width: int = 16, dense_epochs: int = 15, seed: int = 0, learning_rate: float = 0.05) -> None:
        self.width = width
        self.dense_epochs = dense_epochs
        self.seed = seed
        self.learning_rate = learning_rate
        self.train_set, self.test_set = _split(seed)

    def prepare(self, folder: Path) -> None:
        recipe = {"name": "digits", "width": self.width, "epochs": self.dense_epochs, "seed": self.seed}
        save_file(remembered(recipe, self._train_dense), folder / "dense.safetensors")

    def model(self) -> nn.Module:
        model = ResNet(self.width)
        model.load_state_dict(load_file(self.prepared_file("dense.safetensors")))
        return model

    def teacher(self) -> nn.Module:
        return self.model()

    def train_data(self) -> TensorDataset:
        return self.train_set

    def eval_data(self) -> TensorDataset:
        return self.test_set

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return OneCycleLR(optimizer, self.learning_rate, total_steps=total_steps)

    def _train_dense(self) -> Weights:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = ResNet(self.width)
        train(model, self.train_set, epochs=self.dense_epochs, seed=self.seed)
        return model.state_dict()


def _split(seed: int) -> tuple[TensorDataset, TensorDataset]:
    digits = load_digits()
    images: Tensor = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, rest = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    return TensorDataset(images[rest], labels[rest]), TensorDataset(images[test], labels[test])
