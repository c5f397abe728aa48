"""The tensors of a `torch.export` archive: views of bytes that are there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raycomp.deploy.pt2_archive import CONSTANTS, WEIGHTS, Archive, not_whole, refused
from raycomp.deploy.pt2_schema import DTYPES, LAYOUTS, PAYLOADS, Payload, StoredSize, TensorMeta
from raycomp.errors import SpeedupError
from raycomp.storage.documents import parse_document


def read_tensors(archive: Archive) -> dict[str, Tensor]:
    """Weights, buffers and constants by name; names that share a file share their memory.

    Raises:
        SpeedupError: a tensor is pickled, or needs other bytes than its file has.
    """
    memory: dict[str, bytearray] = {}
    found = {}
    for folder, config, allowed in (WEIGHTS, CONSTANTS):
        text = bytes(archive.files[config])
        if b'"use_pickle": true' in text:
            raise refused(f"a pickled tensor ({config})", archive.where)
        payloads = parse_document(PAYLOADS, text, "a list of tensors", f"{archive.where}: {config}", SpeedupError)
        for name, payload in payloads.config.items():
            path = folder + payload.path_name
            if not allowed.fullmatch(payload.path_name):
                raise refused(f"{name!r} in {payload.path_name!r}", archive.where)
            if path not in archive.files:
                raise not_whole(f"no {path}", archive.where)
            if path not in memory:
                memory[path] = bytearray(archive.files[path])
            found[name] = _tensor(name, payload, memory[path], archive.where)
    return found


def _tensor(name: str, payload: Payload, memory: bytearray, where: str) -> Tensor:
    meta = payload.tensor_meta
    if meta is None or meta.dtype not in DTYPES or meta.layout not in LAYOUTS:
        raise not_whole(f"a tensor {name!r} of an unknown kind", where)
    dtype = DTYPES[meta.dtype]
    sizes, strides = _numbers(meta.sizes, name, where), _numbers(meta.strides, name, where)
    (offset,) = _numbers([meta.storage_offset], name, where)
    if len(strides) != len(sizes):
        raise not_whole(f"a tensor {name!r} with {len(sizes)} sizes and {len(strides)} strides", where)
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    needed = max(math.prod(sizes), 0 if 0 in sizes else offset + last + 1)
    stored = len(memory) // dtype.itemsize
    # Elements that overlap would let a small file stand for a tensor of any size.
    if needed > stored:
        told = f"{stored:,} elements, and the tensor {name!r} of the shape {sizes} needs {needed:,}"
        raise not_whole(f"a file with {told}", where)
    whole = torch.frombuffer(memory, dtype=dtype, count=stored) if stored else torch.empty(0, dtype=dtype)
    return _marked(whole.as_strided(sizes, strides, offset), payload, meta)


def _marked(tensor: Tensor, payload: Payload, meta: TensorMeta) -> Tensor:
    if payload.is_param:
        return torch.nn.Parameter(tensor, requires_grad=meta.requires_grad and tensor.is_floating_point())
    return tensor


def _numbers(sizes: list[StoredSize], name: str, where: str) -> list[int]:
    found = [size.as_int for size in sizes if size.as_int is not None]
    if len(found) != len(sizes):
        raise not_whole(f"a tensor {name!r} whose sizes aren't numbers", where)
    return found
