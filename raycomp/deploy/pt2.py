"""Models as files that run without their Python source: `torch.export` archives without pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.pt2_archive._package import PT2ArchiveReader
from torch.export.pt2_archive._package import load_pt2 as load_archive

from raycomp.deploy.pt2_archive import check_archive
from raycomp.deploy.sizes import ExportReport, describe_fixed, leaf_names
from raycomp.deploy.versions import versions
from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Example, with_attributes
from raycomp.speedup.graph.program import (
    as_float32,
    cause_of,
    example_as_float32,
    export_program,
    quiet,
)

_METADATA_FILE = "raycomp.json"
_KEPT_METADATA = ("nn_module_stack", "torch_fn", "val")


class ProgramModule(nn.Module):
    """A loaded program as a module in eval mode; `train()` does not change what it computes.

    Args:
        program: what `torch.export` loaded.
        metadata: what `export_pt2` wrote beside it: the versions of the libraries, and whether the batch is dynamic.
    """

    def __init__(self, program: nn.Module, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.program = program
        self.metadata = metadata

    def train(self, mode: bool = True) -> ProgramModule:
        """Returns self: the program was exported in eval mode."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program; what the model returned in a class with names comes as `Outputs`."""
        return with_attributes(self.program(*args, **kwargs))


def export_pt2(model: nn.Module, example: Example, path: str | Path, others: Sequence[Example] = ()) -> ExportReport:
    """Writes the model in eval mode and float32 as a `torch.export` archive, which needs no Python source to run.

    The batch is dynamic where the model allows it, and so are the sizes in which the inputs differ. The archive holds
    no pickle: no example inputs, and weights as raw bytes; stack traces, which name the exporting machine's files, are
    left out.

    Args:
        model: any model in any dtype on any device; a copy of it is exported.
        example: the input to trace with.
        path: the file to write, ending in `.pt2`.
        others: further inputs, of other lengths or image sizes.

    Raises:
        SpeedupError: the model cannot be exported, or its archive would not pass `load_pt2`.
    """
    exported = export_program(as_float32(model), example_as_float32(example), [*map(example_as_float32, others)])
    program = exported.program
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {key: value for key, value in node.meta.items() if key in _KEPT_METADATA}
    described = json.dumps({"dynamic_batch": exported.dynamic_batch, "versions": versions()})
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.export.save(program, buffer, extra_files={_METADATA_FILE: described})
    except Exception as error:
        raise SpeedupError(f"{type(model).__name__} cannot be saved: {cause_of(error)}", where=str(path)) from error
    check_archive(_reader(buffer.getvalue(), str(path)), str(path))
    Path(path).write_bytes(buffer.getvalue())
    return ExportReport(exported.dynamic_batch, describe_fixed(exported.fixed, leaf_names(model, example)))


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
    check_archive(_reader(content, where), where)
    try:
        with quiet():
            archive = load_archive(io.BytesIO(content))
            program = archive.exported_programs["model"].module(check_guards=False)
    except Exception as error:
        raise SpeedupError(f"cannot load this archive: {cause_of(error)}", where=where) from error
    metadata = json.loads(archive.extra_files.get(_METADATA_FILE, "{}"))
    return ProgramModule(program, metadata)


def _reader(content: bytes, where: str) -> PT2ArchiveReader:
    try:
        return PT2ArchiveReader(io.BytesIO(content))
    except Exception as error:
        raise SpeedupError("this is not a torch.export archive", where=where, remedy=cause_of(error)) from error
