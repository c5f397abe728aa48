"""The compressors that a stage can name, one small class per algorithm.

A new algorithm is a registered class here; those that a schedule may be put around stand above the schedules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raycomp.config.base import Conflict, Given
from raycomp.config.entries import Blocks, DistillEntry, PruneEntry, QuantizeEntry
from raycomp.config.registry import CompressorSettings, Kind, Need, OneOf, compressor
from raycomp.config.values import Count, CountOrZero, Flag, NonNegative, Positive, Seed, SomeItems, expects

_Cooling = Annotated[float, Field(gt=0, lt=1), expects("a number between 0 and 1")]


class PrunerSettings(CompressorSettings):
    """A pruner that decides its masks by itself."""

    kind: ClassVar[Kind] = "pruner"
    config_list: SomeItems[PruneEntry]
    """What to prune, and how much."""


class MagnitudeSettings(PrunerSettings):
    """A pruner that ranks weights as they are, and inputs and outputs by what passes in training."""

    training_steps: CountOrZero = 0
    """Optimizer steps before a decision, over which inputs and outputs are watched; at least 1 where these are ranked
    (0: before training)."""

    @property
    def least_steps(self) -> int:
        return self.training_steps


@compressor("raycomp.pruning.level:LevelPruner", schedulable=True, searchable=True)
class LevelPrunerConfig(MagnitudeSettings):
    """Prunes the single weights with the smallest magnitude; a threshold is a magnitude."""

    type: Literal["LevelPruner"] = "LevelPruner"
    mode: Annotated[Literal["normal", "balance"], expects("'normal' or 'balance'")] = "normal"
    """balance: the same number goes in every block of balance_gran weights."""
    balance_gran: Blocks | None = None
    """The size of a balanced block in the last dimensions: [4] with a ratio of 0.5 is 2:4 along the last dimension."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        if given.text("mode") == "balance" and not given.has("balance_gran"):
            yield Conflict(("mode",), "it does not say what is balanced", "add balance_gran: [4] for N:M of every four")
        if given.has("balance_gran") and given.text("mode") != "balance":
            yield Conflict(("balance_gran",), "it means something in mode balance alone", "add mode: balance")


@compressor("raycomp.pruning.l1_norm:L1NormPruner", schedulable=True, searchable=True)
class L1NormPrunerConfig(MagnitudeSettings):
    """Prunes the blocks with the smallest L1 norm (arXiv 1608.08710); a threshold is a norm."""

    type: Literal["L1NormPruner"] = "L1NormPruner"


@compressor("raycomp.pruning.l2_norm:L2NormPruner", schedulable=True, searchable=True)
class L2NormPrunerConfig(MagnitudeSettings):
    """Prunes the blocks with the smallest L2 norm; a threshold is a norm."""

    type: Literal["L2NormPruner"] = "L2NormPruner"


@compressor("raycomp.pruning.lamp:LAMPPruner", schedulable=True)
class LAMPPrunerConfig(MagnitudeSettings):
    """Ranks single weights over all layers by layer-adaptive scores (arXiv 2010.07611); a threshold is a score."""

    type: Literal["LAMPPruner"] = "LAMPPruner"


@compressor("raycomp.pruning.fpgm:FPGMPruner", schedulable=True, searchable=True)
class FPGMPrunerConfig(PrunerSettings):
    """Prunes the filters nearest to the others (arXiv 1811.00250); a threshold is a sum of distances."""

    type: Literal["FPGMPruner"] = "FPGMPruner"


@compressor("raycomp.pruning.random:RandomPruner", schedulable=True)
class RandomPrunerConfig(PrunerSettings):
    """Prunes blocks at random: the baseline; a threshold is a probability."""

    type: Literal["RandomPruner"] = "RandomPruner"


@compressor("raycomp.pruning.group_norm:GroupNormPruner", schedulable=True, searchable=True)
class GroupNormPrunerConfig(PrunerSettings):
    """Prunes the channels with the smallest norm of all weights that go with them (arXiv 2301.12900)."""

    type: Literal["GroupNormPruner"] = "GroupNormPruner"


@compressor("raycomp.pruning.group_taylor:GroupTaylorPruner", needs={Need.TRAINING}, schedulable=True)
class GroupTaylorPrunerConfig(PrunerSettings):
    """Prunes the channels whose weights in all layers change the loss least, to first order (arXiv 2301.12900)."""

    type: Literal["GroupTaylorPruner"] = "GroupTaylorPruner"
    training_steps: Count
    """Optimizer steps over which the metric is gathered before a decision."""

    @property
    def least_steps(self) -> int:
        return self.training_steps


class ActivationSettings(PrunerSettings):
    """A pruner that ranks channels by the module's output, behind an activation."""

    training_steps: Count
    """Optimizer steps over which outputs are watched before a decision."""
    activation: Annotated[
        Literal["relu", "relu6", "gelu", "silu", "tanh", "none"],
        expects("'relu', 'relu6', 'gelu', 'silu', 'tanh' or 'none'"),
    ] = "relu"
    """What the output is passed through before it is judged."""

    @property
    def least_steps(self) -> int:
        return self.training_steps


@compressor("raycomp.pruning.activation_apoz_rank:ActivationAPoZRankPruner", needs={Need.TRAINING}, schedulable=True)
class ActivationAPoZRankPrunerConfig(ActivationSettings):
    """Prunes the channels that are zero most often (arXiv 1607.03250); a threshold is the fraction that is not zero."""

    type: Literal["ActivationAPoZRankPruner"] = "ActivationAPoZRankPruner"


@compressor("raycomp.pruning.activation_mean_rank:ActivationMeanRankPruner", needs={Need.TRAINING}, schedulable=True)
class ActivationMeanRankPrunerConfig(ActivationSettings):
    """Prunes the channels with the smallest mean output (arXiv 1611.06440); a threshold is a mean."""

    type: Literal["ActivationMeanRankPruner"] = "ActivationMeanRankPruner"


@compressor("raycomp.pruning.taylor:TaylorPruner", needs={Need.TRAINING}, schedulable=True)
class TaylorPrunerConfig(PrunerSettings):
    """Prunes the blocks whose removal changes the loss least, to first order."""

    type: Literal["TaylorPruner"] = "TaylorPruner"
    training_steps: Count
    """Optimizer steps over which the metric is gathered before a decision."""

    @property
    def least_steps(self) -> int:
        return self.training_steps


@compressor("raycomp.pruning.slim:SlimPruner", needs={Need.TRAINING}, schedulable=True)
class SlimPrunerConfig(PrunerSettings):
    """Prunes where learned factors, which an L1 penalty shrinks, have become the smallest (arXiv 1708.06519)."""

    type: Literal["SlimPruner"] = "SlimPruner"
    training_steps: Count
    """Optimizer steps under the penalty before a decision."""
    regular_scale: NonNegative = 1.0
    """The weight of the penalty."""

    @property
    def least_steps(self) -> int:
        return self.training_steps


@compressor("raycomp.pruning.movement:MovementPruner", needs={Need.TRAINING})
class MovementPrunerConfig(PrunerSettings):
    """Prunes what moves towards zero, by learned scores (arXiv 2005.07683); a threshold is held against sigmoids."""

    type: Literal["MovementPruner"] = "MovementPruner"
    warmup_step: CountOrZero
    """Optimizer steps in which scores are learned and nothing is masked."""
    cooldown_begin_step: Count
    """The optimizer step of the last decision: from then on the masks stay."""
    regular_scale: NonNegative = 1.0
    """The weight of the penalty on scores, where there is a threshold."""

    @property
    def least_steps(self) -> int:
        return self.cooldown_begin_step

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        warmup, cooldown = given.number("warmup_step"), given.number("cooldown_begin_step")
        if warmup is not None and cooldown is not None and warmup >= cooldown:
            message = f"{cooldown} is not behind warmup_step, {warmup}"
            yield Conflict(("cooldown_begin_step",), message, f"at least {warmup + 1}")


@compressor("raycomp.pruning.admm:ADMMPruner", needs={Need.TRAINING, Need.ROUNDS}, searchable=True)
class ADMMPrunerConfig(PrunerSettings):
    """Draws weights towards sparse ones in several rounds (arXiv 1804.03294); a threshold is an L2 norm."""

    type: Literal["ADMMPruner"] = "ADMMPruner"
    iterations: Count
    """Rounds before the masks; one more, of the stage's length, trains what is left."""
    training_epochs: Count = 1
    """Epochs of each of them."""
    rho: NonNegative = 1e-4
    """The weight of the term that draws."""
    granularity: Annotated[Literal["fine-grained", "coarse-grained"], expects("'fine-grained' or 'coarse-grained'")] = (
        "fine-grained"
    )
    """Of targets that don't say their own: single weights, or output channels."""


class AroundSettings(CompressorSettings):
    """Goes around a pruner, which holds the config list."""

    kind: ClassVar[Kind] = "pruner"
    pruner: PrunerSettings
    """The pruner that decides."""


class ScheduleSettings(AroundSettings):
    """Says when a pruner decides, and for which part of its goals."""

    pruner: Annotated[PrunerSettings, OneOf(schedulable=True)]
    """The pruner that decides."""


class GrowingSettings(ScheduleSettings):
    """The goals grow step by step within one training."""

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


@compressor("raycomp.pruning.linear:LinearPruner", needs={Need.TRAINING})
class LinearPrunerConfig(GrowingSettings):
    """The goals grow evenly."""

    type: Literal["LinearPruner"] = "LinearPruner"


@compressor("raycomp.pruning.agp:AGPPruner", needs={Need.TRAINING})
class AGPPrunerConfig(GrowingSettings):
    """The goals grow quickly at first and slowly at the end (arXiv 1710.01878)."""

    type: Literal["AGPPruner"] = "AGPPruner"


@compressor("raycomp.pruning.lottery_ticket:LotteryTicketPruner", needs={Need.TRAINING, Need.ROUNDS})
class LotteryTicketPrunerConfig(ScheduleSettings):
    """The goals grow from one training to the next (arXiv 1803.03635)."""

    type: Literal["LotteryTicketPruner"] = "LotteryTicketPruner"
    total_iteration: Count
    """Rounds until the goals of the config list are reached."""
    reset_weight: Flag = True
    """Whether each round starts from the weights that the first one started from."""

    @property
    def least_steps(self) -> int:
        return self.pruner.least_steps


class SearchSettings(AroundSettings):
    """Finds how much a pruner prunes of each layer, under one sparse_ratio or budget for all of them."""

    pruner: Annotated[PrunerSettings, OneOf(searchable=True)]
    """The pruner that ranks, and prunes by what was found."""
    mode: Annotated[Literal["max", "min"], expects("'max' or 'min'")] = "max"
    """Whether more or less of the task's first metric is better."""
    candidates: Count = 4
    """Choices that are judged side by side; the result depends on it, and not on how many evaluators there are."""
    evaluations: Count | None = None
    """Choices that are judged at most (null: all that the search asks for)."""
    seconds: Positive | None = None
    """No round of choices is begun after this time (null: none); with it, the result depends on the machine."""
    seed: Seed = 0
    """Draws the choices."""

    @property
    def least_steps(self) -> int:
        return self.pruner.least_steps


@compressor("raycomp.pruning.simulated_annealing:SimulatedAnnealingPruner", needs={Need.SEARCH})
class SimulatedAnnealingPrunerConfig(SearchSettings):
    """Anneals how much layers lose (arXiv 1907.03141)."""

    type: Literal["SimulatedAnnealingPruner"] = "SimulatedAnnealingPruner"
    start_temperature: Positive = 100.0
    """Where it begins: how readily a worse choice is taken."""
    stop_temperature: Positive = 20.0
    """Where it ends."""
    cool_down_rate: _Cooling = 0.9
    """What the temperature is multiplied by after each round."""
    perturbation_magnitude: Positive = 0.35
    """How far the parts of layers are moved at first."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        start, stop = given.number("start_temperature") or 100.0, given.number("stop_temperature") or 20.0
        if stop >= start:
            message = f"{stop} is not below start_temperature, {start}"
            yield Conflict(("stop_temperature",), message, f"should be below {start}")


@compressor("raycomp.pruning.auto_compress:AutoCompressPruner", needs={Need.SEARCH})
class AutoCompressPrunerConfig(SimulatedAnnealingPrunerConfig):
    """Anneals and prunes in turns, each of which a job makes a stage of its own (arXiv 1907.03141)."""

    type: Literal["AutoCompressPruner"] = "AutoCompressPruner"  # type: ignore[assignment]
    total_iteration: Count
    """Turns until the goal is reached."""

    @classmethod
    def conflicts(cls, given: Given) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        for index, entry in enumerate(given.child("pruner").children("config_list")):
            for name, value in entry.child("budget").values.items():
                if isinstance(value, int | float) and value > 1:
                    where = ("pruner", "config_list", index, "budget", name)
                    yield Conflict(where, f"turns share out a part, not the number {value}", "should be at most 1")

    def turn(self, number: int, *, cut: bool) -> SimulatedAnnealingPrunerConfig:
        """What one turn does, counted from 0.

        Args:
            number: which.
            cut: whether what the turn before masked is gone; else the goal is of the model as it was at first.
        """
        share = 1 / self.total_iteration if cut else (number + 1) / self.total_iteration
        entries = tuple(entry.towards(share) for entry in self.pruner.config_list)
        pruner = self.pruner.model_copy(update={"config_list": entries})
        values = {name: getattr(self, name) for name in SimulatedAnnealingPrunerConfig.model_fields if name != "type"}
        kind: Any = SimulatedAnnealingPrunerConfig
        made: SimulatedAnnealingPrunerConfig = kind(**{**values, "pruner": pruner, "seed": self.seed + number})
        return made


@compressor("raycomp.pruning.amc:AMCPruner", needs={Need.SEARCH})
class AMCPrunerConfig(SearchSettings):
    """Lets a policy learn how much layers lose (arXiv 1802.03494)."""

    type: Literal["AMCPruner"] = "AMCPruner"
    total_episode: Count = 100
    """Choices in all."""
    warmup_episode: CountOrZero | None = None
    """The first ones, drawn at random (null: a quarter of them, at most 100)."""


class QuantizerSettings(CompressorSettings):
    """A quantizer."""

    kind: ClassVar[Kind] = "quantizer"
    config_list: SomeItems[QuantizeEntry]
    """What to quantize, and how."""


@compressor("raycomp.quantization.qat:QATQuantizer", needs={Need.TRAINING})
class QATQuantizerConfig(QuantizerSettings):
    """Quantization-aware training (Jacob et al., CVPR 2018)."""

    type: Literal["QATQuantizer"] = "QATQuantizer"
    quant_start_step: CountOrZero = 0
    """Optimizer steps in which ranges are only observed."""

    @property
    def least_steps(self) -> int:
        return self.quant_start_step + 1


@compressor("raycomp.quantization.ptq:PtqQuantizer", needs={Need.CALIBRATION})
class PtqQuantizerConfig(QuantizerSettings):
    """Quantization of a trained model, with the ranges that calibration finds."""

    type: Literal["PtqQuantizer"] = "PtqQuantizer"
    calibration_steps: Count | None = None
    """Batches of the calibration (null: one pass over the training data)."""


class DistillerSettings(CompressorSettings):
    """A distiller of layers' outputs."""

    kind: ClassVar[Kind] = "distiller"
    config_list: SomeItems[DistillEntry]
    """Which layers' outputs are held against the teacher's."""
    origin_loss_lambda: NonNegative = 1.0
    """The weight of the task's own loss."""


@compressor("raycomp.distillation.dynamic:DynamicLayerwiseDistiller", needs={Need.TRAINING, Need.TEACHER})
class DynamicLayerwiseDistillerConfig(DistillerSettings):
    """Holds outputs of layers against the teacher's; of several links the nearest counts."""

    type: Literal["DynamicLayerwiseDistiller"] = "DynamicLayerwiseDistiller"


@compressor("raycomp.distillation.adaptive:Adaptive1dLayerwiseDistiller", needs={Need.TRAINING, Need.TEACHER})
class Adaptive1dLayerwiseDistillerConfig(DistillerSettings):
    """Holds outputs of layers against the teacher's through a learned linear layer on the last dimension."""

    type: Literal["Adaptive1dLayerwiseDistiller"] = "Adaptive1dLayerwiseDistiller"


CompressorConfig = Annotated[CompressorSettings, OneOf()]
"""The settings of any algorithm."""
