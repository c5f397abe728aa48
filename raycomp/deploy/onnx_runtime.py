"""Running exported models in ONNX Runtime, under the call signature of the float model."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.deploy.onnx_check import check_onnx
from raycomp.deploy.onnx_file import METADATA_KEY, require_onnx
from raycomp.deploy.signature import count_tensors, read_description
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import bind_as_exported, flatten, rebuild

_TORCH_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}

_MOST_FOLDED_BYTES = str(64 * 1024**2)


class OnnxModule(nn.Module):
    """A model in ONNX Runtime that is called, and answers, like the float model it was exported from.

    It is for inference only: `train()` and `to()` change nothing, and no gradient flows. What it returns is on the CPU.

    Args:
        model: the bytes of an ONNX file that raycomp wrote.
        threads: how many threads one operator may use; None leaves it to ONNX Runtime (all cores).
        cuda: run on CUDA, where ONNX Runtime has it; else, and by default, on the CPU.
        ignored: keyword arguments that are left out when the exported model does not take them: labels are only for
            the loss that a Hugging Face model computes beside its outputs.

    Raises:
        SpeedupError: ONNX Runtime is missing or cannot load the model, or the file was not written by raycomp.
    """

    def __init__(
        self, model: bytes, *, threads: int | None = None, cuda: bool = False, ignored: Collection[str] = ("labels",)
    ) -> None:
        super().__init__()
        self.session = _session(model, threads, cuda)
        described = self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if described is None:
            raise SpeedupError("this ONNX model was not exported by raycomp, so its call signature is unknown")
        signature, self.metadata = read_description(described, METADATA_KEY)
        self.parameter_names = tuple(signature.parameters)
        self.input_tree, self.output_tree = signature.input_tree(), signature.output_tree()
        self.dynamic_batch = signature.dynamic_batch
        self.ignored = frozenset(ignored)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        odd = next((i.type for i in inputs if i.type not in _TORCH_DTYPES), None)
        told = (count_tensors(self.input_tree), count_tensors(self.output_tree))
        if odd is not None or told != (len(inputs), len(outputs)):
            raise SpeedupError("this ONNX model takes or gives other values than its signature says")
        self.inputs = [(i.name, _TORCH_DTYPES[i.type], i.shape) for i in inputs]

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, the preferred one first."""
        return list(self.session.get_providers())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model.

        Raises:
            TypeError: other arguments than the exported model takes.
            SpeedupError: ONNX Runtime refuses the inputs, such as a batch size that was not exported.
        """
        dropped = self.ignored - set(self.input_tree["items"])
        named = {name: value for name, value in kwargs.items() if name not in dropped}
        tensors = flatten(self.input_tree, bind_as_exported(self.input_tree, self.parameter_names, args, named))
        feed = {
            name: tensor.detach().to("cpu", dtype).contiguous().numpy()
            for (name, dtype, _), tensor in zip(self.inputs, tensors, strict=True)
        }
        try:
            outputs = self.session.run(None, feed)
        except Exception as error:
            expected = ", ".join(f"{name} {shape}" for name, _, shape in self.inputs)
            raise SpeedupError(
                f"ONNX Runtime cannot run this input: {str(error).splitlines()[0]}",
                remedy=f"the model takes {expected}",
            ) from error
        return rebuild(self.output_tree, iter([torch.from_numpy(output) for output in outputs]))


def _session(model: bytes, threads: int | None, cuda: bool, optimized: Path | None = None) -> Any:
    require_onnx()
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    # Its warnings speak of its own optimizer; errors are raised as well as logged.
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    options.inter_op_num_threads = 1
    # While it loads a model it computes what depends on constants alone, however large that is.
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", _MOST_FOLDED_BYTES)
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = ["CUDAExecutionProvider"] if cuda else []
    available = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        providers = [*available, "CPUExecutionProvider"]
        # Its fallback prints the model's error to the terminal, and tries the same again.
        return onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise SpeedupError(f"ONNX Runtime cannot load the model: {str(error).splitlines()[0]}") from error


def load_onnx(path: str | Path, *, threads: int | None = None, cuda: bool = False) -> OnnxModule:
    """The model of an ONNX file that raycomp wrote (`export_onnx`, `Int8Model.save`), ready to run.

    Raises:
        SpeedupError: no such file, or not a model that raycomp wrote.
    """
    try:
        model = Path(path).read_bytes()
    except OSError as error:
        raise SpeedupError(f"cannot read {path}: {error.strerror}", where=str(path)) from error
    require_onnx()
    check_onnx(model, str(path))
    return OnnxModule(model, threads=threads, cuda=cuda)


def takes(model: bytes, inputs: Sequence[Tensor]) -> bool:
    """Whether ONNX Runtime runs the model on these tensors.

    Raises:
        SpeedupError: ONNX Runtime is missing or cannot load the model.
    """
    session = _session(model, threads=1, cuda=False)
    names = [each.name for each in session.get_inputs()]
    try:
        session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    except Exception:
        return False
    return True


@dataclass(frozen=True)
class Execution:
    """What ONNX Runtime makes of a model on this machine's CPU, after its fusions.

    Args:
        operators: how often each operator stands in the graph that it runs.
        dequantized: names of the integer constants that it dequantizes before use: their layers compute in float.
    """

    operators: dict[str, int]
    dequantized: tuple[str, ...]


def execution(model: bytes) -> Execution:
    """The graph that ONNX Runtime runs on this machine's CPU, summed up.

    Raises:
        SpeedupError: ONNX Runtime is missing or cannot load the model.
    """
    require_onnx()
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        _session(model, threads=1, cuda=False, optimized=optimized)
        graph = onnx.load(optimized).graph
    constants = {tensor.name for tensor in graph.initializer}
    names = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    return Execution(
        operators=dict(Counter(node.op_type for node in graph.node)),
        dequantized=tuple(sorted({name for name in names if name in constants})),
    )
