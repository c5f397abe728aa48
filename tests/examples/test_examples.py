from __future__ import annotations

import gzip
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from raycomp.config import TaskConfig, load_job, parse_job
from raycomp.errors import TaskError
from raycomp.pipeline.data.batches import open_batches
from raycomp.pipeline.data.plan import BatchPlan
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.preflight import check_stages
from raycomp.pipeline.task import Task, prepare_task
from raycomp.pipeline.training.metrics import evaluate
from tests.contracts.training import chain_of

EXAMPLES = Path(__file__).parents[2] / "examples"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def own_cache_and_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXAMPLES)):
            del sys.modules[name]


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """A folder with 40 and 20 made-up images, in Fashion-MNIST's format."""
    folder = tmp_path / "clothes"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", torch.randint(256, (count, 28, 28), generator=generator))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", torch.arange(count) % 10)
    return folder


def write_idx(path: Path, values: Tensor) -> None:
    sizes = b"".join(size.to_bytes(4) for size in values.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + bytes(values.flatten().tolist())))


def build(entrypoint: str, **arguments: object) -> Task:
    return build_task(TaskConfig.model_validate({"entrypoint": entrypoint, "arguments": arguments}), EXAMPLES)


def test_the_dense_digits_model_is_good_and_quickly_made(tmp_path: Path) -> None:
    task = build("digits.py:Digits")
    started = time.process_time()
    prepare_task(task, tmp_path / "files")
    assert time.process_time() - started < 20
    model = task.model()
    assert evaluate(task, model, task.eval_data(), batch_size=256)["accuracy"] >= 0.98
    assert all(norm.bias.abs().max() > 0.01 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    assert sum(parameter.numel() for parameter in model.parameters()) == 77_754


def test_dense_weights_are_made_once_and_are_the_same_when_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(name: str, cache: str) -> bytes:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        task = build("digits.py:Digits", dense_epochs=1, width=4)
        prepare_task(task, tmp_path / name)
        return task.prepared_file("dense.safetensors").read_bytes()

    torch.manual_seed(1)
    first = weights("first", "cache")
    torch.manual_seed(2)
    assert weights("second", "another cache") == first
    with monkeypatch.context() as patched:
        patched.setattr("torch.optim.SGD.step", lambda *args: pytest.fail("trained again"))
        assert weights("third", "cache") == first


@pytest.mark.parametrize("name", ["digits", "digits-sequence", "fashion", "fashion-sequence"])
def test_job_files_fit_their_models(name: str, tmp_path: Path, clothes: Path) -> None:
    job = load_job(EXAMPLES / f"{name}.yaml")
    fashion = {"folder": str(clothes), "epochs": 1, "teacher_epochs": 1}
    arguments = {"dense_epochs": 1} if "digits" in name else fashion
    task = build_task(job.task.model_copy(update={"arguments": {**job.task.arguments, **arguments}}), EXAMPLES)
    prepare_task(task, tmp_path / "files")
    for index in range(len(job.stages)):
        chain = chain_of(job, index, task)
        quantized = chain.calibration()
        if quantized:
            assert {names[0] for names in chain.folds()} == {
                module for module, layer in chain.model.named_modules() if isinstance(layer, nn.Conv2d)
            }
            assert "weight" in quantized["fc"]
        if index == 0:
            pruned = {module for module, targets in chain.masks().items() if "weight" in targets}
            assert {"conv", "bn", "layer3.0.projection.0", "layer3.0.projection.1"} <= pruned
            assert "fc" not in pruned


def test_the_hugging_face_job_fits_its_model() -> None:
    pytest.importorskip("transformers")
    job = load_job(EXAMPLES / "huggingface.yaml")
    chain = chain_of(job, 0, build_task(job.task, EXAMPLES))
    pruned = {module for module, targets in chain.masks().items() if "weight" in targets}
    convolutions = {name for name, layer in chain.model.named_modules() if isinstance(layer, nn.Conv2d)}
    assert len(convolutions) == 7
    assert convolutions <= pruned


def test_fashion_mnist_reads_what_the_folder_holds(clothes: Path) -> None:
    task = build("fashion_mnist.py:FashionMnist", folder=str(clothes), train_samples=30)
    assert len(task.train_data()) == 30
    images, labels = task.eval_data().tensors
    assert images.shape == (20, 1, 28, 28)
    assert labels.tolist() == [*range(10)] * 2
    raw = gzip.decompress((clothes / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert torch.isclose(images[0, 0, 0, 5], torch.tensor((raw[16 + 5] / 255 - 0.2860) / 0.3530))


def test_fashion_mnist_says_how_to_get_what_is_missing(tmp_path: Path, clothes: Path) -> None:
    task = build("fashion_mnist.py:FashionMnist", folder=str(tmp_path))
    with pytest.raises(TaskError, match=r"no train-images-idx3-ubyte.gz in .*apt-get install dataset-fashion-mnist"):
        task.train_data()
    write_idx(clothes / "t10k-images-idx3-ubyte.gz", torch.zeros(2, 3, 3, dtype=torch.uint8))
    whole = gzip.decompress((clothes / "t10k-images-idx3-ubyte.gz").read_bytes())
    (clothes / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole[:-1]))
    with pytest.raises(TaskError, match="not a whole IDX file"):
        build("fashion_mnist.py:FashionMnist", folder=str(clothes)).eval_data()


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    task = build("fashion_mnist.py:FashionMnist")
    images, labels = task.train_data().tensors
    assert (len(images), len(task.eval_data())) == (60_000, 10_000)
    assert torch.bincount(labels).tolist() == [6000] * 10
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


def test_a_hugging_face_model_learns_with_the_defaults_alone() -> None:
    pytest.importorskip("transformers")
    task = build("huggingface.py:HuggingFaceDigits")
    torch.manual_seed(0)
    model = task.model()
    before = evaluate(task, model, task.eval_data(), batch_size=256)["accuracy"]
    optimizer = task.optimizer(model)
    batches = open_batches(task, task.train_data(), BatchPlan(32))
    for epoch in range(3):
        for step in batches.iterate(epoch):
            optimizer.zero_grad()
            task.training_step(model, step[0].batch).backward()
            optimizer.step()
    after = evaluate(task, model, task.eval_data(), batch_size=256)["accuracy"]
    assert before < 0.3 < 0.8 < after
    example = task.example_input()
    assert isinstance(example, dict)
    assert {name: tuple(value.shape) for name, value in example.items()} == {"pixel_values": (2, 1, 8, 8)}


def test_the_readmes_job_gives_real_int8_and_needs_its_outputs_for_it(tmp_path: Path) -> None:
    text = (EXAMPLES.parent / "README.md").read_text()
    raw = yaml.safe_load(
        next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "name: digits" in block)
    )
    task = build("digits.py:Digits", width=8, dense_epochs=1)
    prepare_task(task, tmp_path / "files")
    in_float = "int8 will compute in float"
    assert not [told for told in check_stages(parse_job(raw), task).warnings if in_float in told]
    quantizer = raw["stages"][0]["compressors"][1]["config_list"][0]
    quantizer["target_names"].remove("_output_")
    del quantizer["target_settings"]["_output_"]
    assert [told for told in check_stages(parse_job(raw), task).warnings if in_float in told]
