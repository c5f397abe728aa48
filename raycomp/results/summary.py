"""What a finished run has to say, as frozen values that survive JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from raycomp.errors import ArtifactError
from raycomp.results.progress import ProgressEvent
from raycomp.storage.documents import ManyFrozen, ManyNamed, not_a_document, parse_document

FORMS = {
    "dense": "the model as it was, before compression",
    "masked": "the trained model under its masks, without rounding; as large and as fast as what its stage began with",
    "simulated": "what trained: masks, and rounding simulated in float; as large as masked, and slower",
    "sped-up": "what was masked is cut out; computes the same function as the masked model",
    "sped-up simulated": "the sped-up model with rounding simulated in float; the simulated model, cut",
    "int8": "the sped-up model computing with 8-bit integers, with the scales that training learned",
}
"""Every form that a run can make, in order. Where nothing rounds, what is masked is what trained: it is simulated."""


@dataclasses.dataclass(frozen=True)
class ModelFigures:
    """One form of the model.

    Args:
        name: one of `FORMS`.
        metrics: the task's metrics, averaged over all evaluated samples; the first is the one that headlines show.
            Empty where the model could not be evaluated.
        parameters: number of elements of all parameters.
        macs: multiply-accumulates for one sample; None where they could not be counted.
        file_bytes: size of the stored model; None where it could not be stored.
        latency_s: batch size (as text, since JSON keys are) -> median seconds for one call.
    """

    name: str
    metrics: ManyNamed[float]
    parameters: int
    macs: int | None
    file_bytes: int | None
    latency_s: ManyNamed[float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far the sped-up model's outputs are from those of the model that it was cut from.

    Args:
        max_abs_diff: the greatest absolute difference of any output element.
        output_range: greatest minus least element, over all inputs, of the output tensor where the relative difference
            is greatest (the greatest magnitude, where all its elements are equal).
        relative: the greatest difference of an output tensor, divided by the range of that tensor.
        tolerance: what `relative` may be.
        batch_sizes: the batch sizes that were tried.
        passed: whether `relative` is at most `tolerance`.
        reference: the form that it was cut from.
        metric_difference: sped-up metric minus that form's; None where one of them is not known.
        stage: the stage that cut; empty where the job has no other.
    """

    max_abs_diff: float
    output_range: float
    relative: float
    tolerance: float
    batch_sizes: ManyFrozen[int]
    passed: bool
    reference: str = "simulated"
    metric_difference: float | None = None
    stage: str = ""


@dataclasses.dataclass(frozen=True)
class Simulation:
    """The sped-up model with simulated rounding against the simulated model.

    Args:
        sqnr_db: signal to noise of its outputs against the simulated ones, in dB; rounding turns the float differences
            of a cut model into whole steps here and there.
        metric_difference: its metric minus the simulated one; None where one of them is not known.
    """

    sqnr_db: float
    metric_difference: float | None


@dataclasses.dataclass(frozen=True)
class Int8Figures:
    """The real int8 model against the sped-up model with simulated rounding.

    Args:
        sqnr_db: signal to quantization noise of the real against the simulated outputs, in dB.
        metric_difference: int8 metric minus simulated metric; None where one of them is not known.
        weight_bytes: bytes of the stored int8 weights.
        float_weight_bytes: bytes of the same weights in float32.
        vnni: whether the CPU that measured has VNNI instructions (dot products of int8).
        reduce_range: whether weights were held to 7 bits, as CPUs without VNNI need.
        layers: how many layers have int8 weights.
        float_layers: those of them that are computed in float all the same -> why, with the remedy.
    """

    sqnr_db: float
    metric_difference: float | None
    weight_bytes: int
    float_weight_bytes: int
    vnni: bool
    reduce_range: bool
    layers: int = 0
    float_layers: ManyNamed[str] = dataclasses.field(default_factory=dict)

    @property
    def computes_integers(self) -> bool:
        """Whether any layer does."""
        return len(self.float_layers) < self.layers


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """One compressed layer; shapes are its weight's, `quantized` names the data type of its weight or is None. Where
    another parameter is compressed, `module` ends with its name."""

    module: str
    type: str
    shape_before: ManyFrozen[int]
    shape_after: ManyFrozen[int]
    sparsity: float
    quantized: str | None = None


@dataclasses.dataclass(frozen=True)
class SearchFigures:
    """What a search found.

    Args:
        stage: the stage's name.
        compressor: the algorithm's.
        judged: how many choices were.
        first: the metric of the first one, in which all layers lose alike.
        best: that of the one that was taken; both under masks, before training.
        parts: the targets that share a mask -> the part of them that goes.
        config_list: the same, to be used again.
    """

    stage: str
    compressor: str
    judged: int
    first: float
    best: float
    parts: dict[str, float]
    config_list: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Unpruned:
    """Coordinates that a mask names and speedup left in the model.

    Args:
        module: the module's name.
        dim: the dimension of the masked tensor.
        count: how many coordinates.
        reason: why.
    """

    module: str
    dim: int
    count: int
    reason: str


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """All that a report shows about one run.

    Args:
        job: the job's name.
        run: the run's id.
        created: UTC time, ISO 8601.
        models: dense first, then each form that the run's last stage made, in order.
        verification: of what the last stage cut.
        earlier: of what each stage before it cut, whose forms are not among the models.
        timings: part of the run -> seconds.
        environment: what the run stood on (versions, processor, nodes), shown as it is.
        config_yaml: the job file as it was run.
        artifact_uri: where the result is stored.
        runs_alone: whether it holds a program that runs without the model's source.
        searches: what was searched for, in the order of the stages.
    """

    job: str
    run: str
    created: str
    models: ManyFrozen[ModelFigures]
    verification: Verification | None = None
    earlier: ManyFrozen[Verification] = ()
    simulation: Simulation | None = None
    int8: Int8Figures | None = None
    layers: ManyFrozen[LayerFigures] = ()
    unpruned: ManyFrozen[Unpruned] = ()
    history: ManyFrozen[ProgressEvent] = ()
    timings: ManyNamed[float] = dataclasses.field(default_factory=dict)
    environment: ManyNamed[str] = dataclasses.field(default_factory=dict)
    warnings: ManyFrozen[str] = ()
    config_yaml: str = ""
    artifact_uri: str = ""
    runs_alone: bool = True
    searches: tuple[SearchFigures, ...] = ()

    # JSON has no NaN; a diverged loss or an exact int8 model (infinite SQNR) must come back as what it was.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings", extra="forbid")

    @property
    def verifications(self) -> tuple[Verification, ...]:
        """Those of all stages that cut, in order."""
        return (*self.earlier, *(() if self.verification is None else (self.verification,)))

    def to_json(self) -> str:
        """The summary as JSON text; `from_json` gives an equal summary back."""
        return _ADAPTER.dump_json(self, indent=2).decode()

    @staticmethod
    def from_json(text: str | bytes) -> RunSummary:
        """Reads what `to_json` wrote. Raises ArtifactError where it is something else."""
        return parse_document(_ADAPTER, text, "a run's summary", "summary.json")

    def figures(self) -> dict[str, Any]:
        """The results without history, layers and job file, as plain JSON values: what a manifest carries."""
        kept = {
            "models",
            "verification",
            "earlier",
            "simulation",
            "int8",
            "unpruned",
            "timings",
            "environment",
            "warnings",
            "runs_alone",
            "searches",
        }
        figures: dict[str, Any] = json.loads(_ADAPTER.dump_json(self, include=kept))
        return figures

    @staticmethod
    def from_figures(figures: Mapping[str, Any], *, job: str, run: str, created: str) -> RunSummary:
        """The summary that a manifest's figures describe. Raises ArtifactError where they are something else."""
        fields = {**figures, "job": job, "run": run, "created": created}
        try:
            return _ADAPTER.validate_python(fields)
        except ValidationError as error:
            raise not_a_document(error, "a run's summary", "manifest.json", ArtifactError) from None


@dataclasses.dataclass(frozen=True)
class TrialFigures:
    """One trial of a sweep.

    Args:
        trial: the trial's id.
        settings: searched key -> the value that this trial took.
        metric: the final model's first metric; None where the trial failed.
        macs: the final model's multiply-accumulates for one sample.
        file_bytes: the final model's stored size.
        on_front: whether no other trial is better in one of metric and MACs and as good in the other.
        artifact_uri: where the trial's artifact is stored; empty where the trial failed.
        error: the cause of a failure, in one line; empty where there was none.
    """

    trial: str
    settings: dict[str, Any]
    metric: float | None
    macs: int | None
    file_bytes: int | None = None
    on_front: bool = False
    artifact_uri: str = ""
    error: str = ""


_ADAPTER: TypeAdapter[RunSummary] = TypeAdapter(RunSummary)
