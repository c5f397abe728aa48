"""The compressors that a stage can name, one small class per algorithm.

A new algorithm is a class here, and its name in the table and the union at the end of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Tag

from raycomp.config.base import Conflict, Given, Settings, by_type
from raycomp.config.entries import DistillEntry, PruneEntry, QuantizeEntry
from raycomp.config.values import Count, CountOrZero, NonNegative, SomeItems

Kind = Literal["pruner", "quantizer", "distiller"]


def _require_type(schema: dict[str, Any]) -> None:
    schema["required"] = ["type", *schema.get("required", ())]


class CompressorSettings(Settings):
    """What every compressor's settings share."""

    model_config = ConfigDict(json_schema_extra=_require_type)
    kind: ClassVar[Kind]
    type: str
    """The algorithm: the name of the compressor's class."""

    @property
    def least_steps(self) -> int:
        """Optimizer steps without which the algorithm has not done its work."""
        return 0


class PrunerSettings(CompressorSettings):
    """A pruner that decides its masks by itself."""

    kind: ClassVar[Kind] = "pruner"
    config_list: SomeItems[PruneEntry]
    """What to prune, and how much."""


class L1NormPrunerConfig(PrunerSettings):
    """Prunes the blocks with the smallest L1 norm."""

    type: Literal["L1NormPruner"] = "L1NormPruner"


class TaylorPrunerConfig(PrunerSettings):
    """Prunes the blocks whose removal changes the loss least, to first order."""

    type: Literal["TaylorPruner"] = "TaylorPruner"
    training_steps: Count
    """Optimizer steps over which the metric is gathered before a decision."""

    @property
    def least_steps(self) -> int:
        return self.training_steps


class ScheduleSettings(CompressorSettings):
    """A pruner whose goals grow step by step."""

    kind: ClassVar[Kind] = "pruner"
    pruner: Annotated[
        Annotated[L1NormPrunerConfig, Tag("L1NormPruner")] | Annotated[TaylorPrunerConfig, Tag("TaylorPruner")],
        by_type("L1NormPruner", "TaylorPruner"),
    ]
    """The pruner that decides."""
    interval_steps: Count
    """Optimizer steps between two decisions."""
    total_times: Count
    """Decisions until the goals of the config list are reached."""

    @property
    def least_steps(self) -> int:
        return self.interval_steps * self.total_times

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        gathered, interval = given.child("pruner").number("training_steps"), given.number("interval_steps")
        if gathered is not None and interval is not None and gathered > interval:
            yield Conflict(
                ("pruner", "training_steps"),
                f"{gathered} steps do not fit between two decisions, {interval} steps apart",
                f"should be at most interval_steps, {interval}",
            )


class LinearPrunerConfig(ScheduleSettings):
    """The goals grow evenly."""

    type: Literal["LinearPruner"] = "LinearPruner"


class AGPPrunerConfig(ScheduleSettings):
    """The goals grow quickly at first and slowly at the end (arXiv 1710.01878)."""

    type: Literal["AGPPruner"] = "AGPPruner"


class QATQuantizerConfig(CompressorSettings):
    """Quantization-aware training (Jacob et al., CVPR 2018)."""

    type: Literal["QATQuantizer"] = "QATQuantizer"
    kind: ClassVar[Kind] = "quantizer"
    config_list: SomeItems[QuantizeEntry]
    """What to quantize, and how."""
    quant_start_step: CountOrZero = 0
    """Optimizer steps in which ranges are only observed."""

    @property
    def least_steps(self) -> int:
        return self.quant_start_step + 1


class DynamicLayerwiseDistillerConfig(CompressorSettings):
    """Holds outputs of layers against the teacher's; of several links the nearest counts."""

    type: Literal["DynamicLayerwiseDistiller"] = "DynamicLayerwiseDistiller"
    kind: ClassVar[Kind] = "distiller"
    config_list: SomeItems[DistillEntry]
    """Which layers' outputs are held against the teacher's."""
    origin_loss_lambda: NonNegative = 1.0
    """The weight of the task's own loss."""


COMPRESSORS: Mapping[str, type[CompressorSettings]] = {
    settings.model_fields["type"].default: settings
    for settings in (
        L1NormPrunerConfig,
        TaylorPrunerConfig,
        LinearPrunerConfig,
        AGPPrunerConfig,
        QATQuantizerConfig,
        DynamicLayerwiseDistillerConfig,
    )
}
CompressorConfig = Annotated[
    Annotated[L1NormPrunerConfig, Tag("L1NormPruner")]
    | Annotated[TaylorPrunerConfig, Tag("TaylorPruner")]
    | Annotated[LinearPrunerConfig, Tag("LinearPruner")]
    | Annotated[AGPPrunerConfig, Tag("AGPPruner")]
    | Annotated[QATQuantizerConfig, Tag("QATQuantizer")]
    | Annotated[DynamicLayerwiseDistillerConfig, Tag("DynamicLayerwiseDistiller")],
    by_type(*COMPRESSORS),
]
