"""Models as files that run without their Python source: `torch.export` archives without pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycomp.core.parts import as_call
from raycomp.deploy import pt2_schema as schema
from raycomp.deploy.pt2_archive import METADATA, PROGRAM, not_whole, open_archive
from raycomp.deploy.pt2_program import InputSizes, argument_names, build_program, input_sizes
from raycomp.deploy.pt2_tensors import read_tensors
from raycomp.deploy.pt2_unread import check_unread
from raycomp.deploy.signature import Signature, count_tensors, read_description
from raycomp.deploy.sizes import ExportReport, describe_fixed, leaf_names
from raycomp.deploy.versions import versions
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, bind, bind_as_exported, describe, flatten, parameter_names, rebuild
from raycomp.speedup.graph.interpreted import GraphError
from raycomp.speedup.graph.program import as_float32, cause_of, example_as_float32, export_program, quiet
from raycomp.speedup.graph.result_bytes import is_traced
from raycomp.storage.documents import parse_document


class ProgramModule(nn.Module):
    """A loaded program as a module in eval mode; `train()` does not change what it computes.

    Args:
        program: the graph, over its weights; it takes tensors and returns a tuple of them.
        signature: how the exported model was called, and what it returned.
        sizes: each input's name and sizes: a number, or a text that is the same for equal sizes.
        metadata: what `export_pt2` wrote beside it: the versions of the libraries, and whether the batch is dynamic.
    """

    def __init__(
        self, program: nn.Module, signature: Signature, sizes: Sequence[InputSizes], metadata: dict[str, Any]
    ) -> None:
        super().__init__()
        self.program = program
        self.parameter_names = tuple(signature.parameters)
        self.input_tree, self.output_tree = signature.input_tree(), signature.output_tree()
        self.sizes = tuple(sizes)
        self.metadata = metadata

    def train(self, mode: bool = True) -> ProgramModule:
        """Returns self: the program was exported in eval mode."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program.

        Raises:
            TypeError: other arguments than the exported model takes.
            GraphError: tensors of other sizes than it takes, or an operator that refuses them.
        """
        tensors = flatten(self.input_tree, bind_as_exported(self.input_tree, self.parameter_names, args, kwargs))
        if not is_traced():
            self._check_sizes(tensors)
        return rebuild(self.output_tree, iter(self.program(*tensors)))

    def _check_sizes(self, tensors: Sequence[Tensor]) -> None:
        known: dict[str, int] = {}
        for (name, sizes), tensor in zip(self.sizes, tensors, strict=True):
            if tensor.ndim != len(sizes):
                raise GraphError(f"expected {len(sizes)} dimensions, but got {tensor.ndim}", where=name)
            for dim, (size, actual) in enumerate(zip(sizes, tensor.shape, strict=True)):
                expected = known.setdefault(size, actual) if isinstance(size, str) else size
                if actual != expected:
                    message = f"expected dimension {dim} to be equal to {expected}, but got {actual}"
                    raise GraphError(message, where=name, remedy="the model was exported for these sizes")


def export_pt2(model: nn.Module, example: Example, path: str | Path, others: Sequence[Example] = ()) -> ExportReport:
    """Writes the model in eval mode and float32 as a `torch.export` archive, which needs no Python source to run.

    The batch is dynamic where the model allows it, and so are the sizes in which the inputs differ. The archive holds
    no pickle: no example inputs, and weights as raw bytes; stack traces, which name the exporting machine's files, and
    the modules behind each operator are left out.

    Args:
        model: any model in any dtype on any device; a copy of it is exported.
        example: the input to trace with.
        path: the file to write, ending in `.pt2`.
        others: further inputs, of other lengths or image sizes.

    Raises:
        SpeedupError: the model cannot be exported, or its archive would not pass `load_pt2`.
    """
    model, example = as_float32(model), example_as_float32(example)
    exported = export_program(model, example, [*map(example_as_float32, others)])
    program = exported.program
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    signature = {**_signature(model, example), "dynamic_batch": exported.dynamic_batch}
    described = json.dumps({"dynamic_batch": exported.dynamic_batch, "versions": versions(), "signature": signature})
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.export.save(program, buffer, extra_files={METADATA.removeprefix("extra/"): described})
    except Exception as error:
        raise SpeedupError(f"{type(model).__name__} cannot be saved: {cause_of(error)}", where=str(path)) from error
    _read(buffer.getvalue(), str(path))
    Path(path).write_bytes(buffer.getvalue())
    return ExportReport(exported.dynamic_batch, describe_fixed(exported.fixed, leaf_names(model, example)))


def _signature(model: nn.Module, example: Example) -> dict[str, Any]:
    args, kwargs = as_call(example)
    names = parameter_names(model)
    with torch.no_grad():
        outputs = describe(model(*args, **kwargs))
    return {"parameters": names, "inputs": describe(bind(names, args, kwargs)), "outputs": outputs}


def load_pt2(path: str | Path) -> ProgramModule:
    """The program of an archive that `export_pt2` wrote, ready to run. Nothing in it is unpickled.

    Raises:
        SpeedupError: no such file, not an archive, or one that holds pickles, native code or foreign operators.
    """
    where = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpeedupError(f"cannot read {where}: {error.strerror}", where=where) from error
    return _read(content, where)


def _read(content: bytes, where: str) -> ProgramModule:
    archive = open_archive(content, where)
    text = bytes(archive.files[PROGRAM])
    program = parse_document(schema.PROGRAM, text, "an exported program", f"{where}: {PROGRAM}", SpeedupError)
    check_unread(program, where)
    module = build_program(program, read_tensors(archive), where)
    sizes = input_sizes(program)
    signature, metadata = read_description(bytes(archive.files.get(METADATA, b"")), f"{where}: {METADATA}")
    told, given = argument_names(program), signature.inputs.items
    # What is given as `*args` has no name but its index, and torch makes one up.
    named = {name for name in given if not name.isdecimal()}
    if told and (len(told) != len(given) or not named <= set(told)):
        raise not_whole("other arguments than its description", where)
    if count_tensors(signature.input_tree()) != len(sizes):
        raise not_whole("another signature than its program", where)
    if count_tensors(signature.output_tree()) != len(module.graph.output_node().args[0]):  # type: ignore[arg-type]
        raise not_whole("another signature than its program", where)
    return ProgramModule(module, signature, sizes, metadata)
