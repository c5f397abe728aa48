"""Fashion-MNIST (Xiao et al., 1708.07747): 70,000 images of 28 x 28. A ResNet-8, taught by itself or by a ResNet-20."""

from __future__ import annotations

import gzip
import math
from functools import cache
from pathlib import Path

import torch
from dense import Weights, remembered, train
from resnet import ResNet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import TensorDataset

from raycomp import Task
from raycomp.errors import TaskError

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530


class FashionMnist(Task):
    """Classifies clothes.

    Args:
        folder: holds the four gzipped IDX files; default: where Debian's package dataset-fashion-mnist puts them.
        blocks: of each stage of the model: 1 is ResNet-8, 3 is ResNet-20.
        epochs: of the training that makes the dense model.
        teacher_blocks: of each stage of the teacher; as many as `blocks`: the dense model teaches itself.
        teacher_epochs: of the training that makes another teacher.
        train_samples: use the first so many alone; default: all.
        seed: of the dense model and teacher.
        learning_rate: the greatest one while the model is compressed.
    """

    def __init__(
        self,
        folder: str | None = None,
        blocks: int = 1,
        epochs: int = 4,
        teacher_blocks: int = 1,
        teacher_epochs: int = 6,
        train_samples: int | None = None,
        seed: int = 0,
        learning_rate: float = 0.05,
    ) -> None:
        self.folder = Path(folder) if folder is not None else DEFAULT_FOLDER
        self.blocks, self.epochs = blocks, epochs
        self.teacher_blocks, self.teacher_epochs = teacher_blocks, teacher_epochs
        self.train_samples = train_samples
        self.seed = seed
        self.learning_rate = learning_rate

    def prepare(self, folder: Path) -> None:
        save_file(self._trained(self.blocks, self.epochs), folder / "dense.safetensors")
        if self.teacher_blocks != self.blocks:
            save_file(self._trained(self.teacher_blocks, self.teacher_epochs), folder / "teacher.safetensors")

    def model(self) -> nn.Module:
        return self._loaded("dense.safetensors", self.blocks)

    def teacher(self) -> nn.Module:
        if self.teacher_blocks == self.blocks:
            return self.model()
        return self._loaded("teacher.safetensors", self.teacher_blocks)

    def train_data(self) -> TensorDataset:
        images, labels = read_split(self.folder, "train")
        return TensorDataset(images[: self.train_samples], labels[: self.train_samples])

    def eval_data(self) -> TensorDataset:
        return TensorDataset(*read_split(self.folder, "t10k"))

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def scheduler(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return OneCycleLR(optimizer, self.learning_rate, total_steps=total_steps)

    def _loaded(self, name: str, blocks: int) -> nn.Module:
        model = ResNet(blocks=blocks, stem_stride=2)
        model.load_state_dict(load_file(self.prepared_file(name)))
        return model

    def _trained(self, blocks: int, epochs: int) -> Weights:
        def make() -> Weights:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                model = ResNet(blocks=blocks, stem_stride=2)
            train(model, self.train_data(), epochs=epochs, seed=self.seed)
            return model.state_dict()

        recipe = {
            "name": "fashion",
            "blocks": blocks,
            "epochs": epochs,
            "seed": self.seed,
            "samples": self.train_samples,
        }
        return remembered(recipe, make)


@cache
def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28], normalised, and labels [n].

    Raises:
        TaskError: the folder lacks the files, or they are not what they should be.
    """
    pixels = _read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return ((pixels.float() / 255 - MEAN) / DEVIATION)[:, None], labels.long()


def _read_idx(path: Path) -> Tensor:
    """An array of bytes in the IDX format: magic number (type, number of dimensions), sizes, values."""
    if not path.is_file():
        raise TaskError(
            f"there is no {path.name} in {path.parent}",
            where="FashionMnist",
            remedy="apt-get install dataset-fashion-mnist, or get the four files from "
            "https://github.com/zalandoresearch/fashion-mnist and name their folder in task.arguments.folder",
        )
    content = bytearray(gzip.decompress(path.read_bytes()))
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i]) for i in range(content[3])]
    start = 4 + 4 * len(sizes)
    if content[:3] != b"\x00\x00\x08" or len(content) != start + math.prod(sizes):
        raise TaskError(f"{path} is not a whole IDX file of bytes", where="FashionMnist", remedy="get it again")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(sizes)
