"""How a stored model is called and what it returns, as its file says it: read by a strict model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter

from raycomp.errors import SpeedupError
from raycomp.speedup.graph.example import Tree
from raycomp.speedup.graph.operators import is_identifier
from raycomp.storage.documents import Document, Many, ManyNamed, parse_document


def _identifier(name: str) -> str:
    if not is_identifier(name) or name.startswith("_"):
        raise ValueError(f"{name[:80]!r} is no name of a field")
    return name


_Field = Annotated[str, AfterValidator(_identifier)]


class _Tensor(Document):
    kind: Literal["tensor"]


class _Constant(Document):
    kind: Literal["constant"]
    value: bool | int | float | str | None


class _Dict(Document):
    kind: Literal["dict"]
    items: ManyNamed[_Tree]
    attributes: bool


class _Sequence(Document):
    kind: Literal["list", "tuple"]
    items: Many[_Tree]
    fields: Many[_Field] | None = None
    name: _Field | None = None


_Tree = Annotated[_Tensor | _Constant | _Dict | _Sequence, Field(discriminator="kind")]


class Signature(Document):
    """What an exported file says of its call; keys that a later version adds are passed over."""

    model_config = ConfigDict(extra="ignore")

    parameters: Many[str]
    inputs: _Dict
    outputs: _Tree
    dynamic_batch: bool

    def input_tree(self) -> Tree:
        """As `flatten` takes it."""
        return self.inputs.model_dump(exclude_unset=True)

    def output_tree(self) -> Tree:
        """As `rebuild` takes it."""
        return self.outputs.model_dump(exclude_unset=True)


class Description(Document):
    """What raycomp writes into a file beside the model."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    signature: Signature
    versions: ManyNamed[str]


_ADAPTER = TypeAdapter(Description)


def read_description(text: str | bytes, where: str) -> tuple[Signature, dict[str, Any]]:
    """The signature in a file's description, and all that the description says.

    Raises:
        SpeedupError: it is something else.
    """
    found = parse_document(_ADAPTER, text, "the description of a model that raycomp exported", where, SpeedupError)
    return found.signature, found.model_dump(exclude_unset=True)


def count_tensors(tree: Tree) -> int:
    """How many tensors a description holds."""
    if tree["kind"] in ("tensor", "constant"):
        return int(tree["kind"] == "tensor")
    items = tree["items"].values() if tree["kind"] == "dict" else tree["items"]
    return sum(map(count_tensors, items))
