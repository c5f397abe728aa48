"""A Hugging Face model and a dataset: the whole task. Batches are dicts, the model brings its own loss."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from raycomp import Task


class HuggingFaceDigits(Task):
    """Handwritten digits with transformers' ResNet."""

    def model(self) -> nn.Module:
        config = ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10
        )
        return ResNetForImageClassification(config)

    def train_data(self) -> list[dict[str, Any]]:
        return _samples()[360:]

    def eval_data(self) -> list[dict[str, Any]]:
        return _samples()[:360]


def _samples() -> list[dict[str, Any]]:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]
