"""The result as rows: one quantity for every form of the model, each held against dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raycomp.report import text
from raycomp.results.summary import ModelFigures, RunSummary, Verification


@dataclass(frozen=True)
class Cell:
    """One figure: its value, how it compares with dense (empty for dense itself), and whether it is worse."""

    value: str
    against_dense: str = ""
    worse: bool = False


@dataclass(frozen=True)
class Row:
    """One quantity, with a cell for each model."""

    label: str
    cells: tuple[Cell, ...]


def comparison(models: Sequence[ModelFigures]) -> tuple[Row, ...]:
    """Metrics, parameters, MACs, file size and latencies of all models; the first one is the measure of the others."""
    if not models:
        return ()
    rows = [_metric_row(name, models) for name in dict.fromkeys(name for model in models for name in model.metrics)]
    rows.append(_size_row("parameters", models, lambda model: model.parameters, text.count))
    rows.append(_size_row("MACs", models, lambda model: model.macs, text.count))
    rows.append(_size_row("file size", models, lambda model: model.file_bytes, text.size))
    for batch in sorted({batch for model in models for batch in model.latency_s}, key=int):
        rows.append(_latency_row(batch, models))
    return tuple(rows)


def verification_texts(summary: RunSummary) -> tuple[tuple[str, bool], ...]:
    """For each stage a sentence on how far the sped-up model is from the form that it was cut from, and whether it is
    near enough."""
    found = [(_verification_text(summary, check), check.passed) for check in summary.verifications]
    if summary.verification is None and any(row.name == "sped-up" for row in summary.models):
        found.append((f"sped-up: {nothing_cut(summary)}.", True))
    return tuple(found)


def _verification_text(summary: RunSummary, check: Verification) -> str:
    batches = " and ".join(str(batch) for batch in check.batch_sizes)
    verdict = "within" if check.passed else "NOT within"
    stage = f"stage {check.stage}: " if check.stage else ""
    return (
        f"{stage}sped-up against {check.reference}: greatest difference of outputs {text.number(check.max_abs_diff)}, "
        f"that is {text.number(check.relative)} of their range ({verdict} the tolerance of "
        f"{text.number(check.tolerance)}; batch sizes {batches}){_metric(summary, check.metric_difference)}."
    )


def nothing_cut(summary: RunSummary) -> str:
    """What the sped-up model is where there is no verification of it."""
    reference = "masked" if any(row.name == "masked" for row in summary.models) else "simulated"
    where = " in the last stage" if summary.earlier else ""
    return f"nothing was cut{where}, so it is the {reference} model as it stands"


def rounding_texts(summary: RunSummary) -> tuple[str, ...]:
    """A sentence for each form that rounds, on how far it is from the one whose function it should have."""
    found = []
    if summary.simulation is not None:
        near = f"SQNR {text.number(summary.simulation.sqnr_db)} dB"
        found.append(
            f"sped-up simulated against simulated: {near}{_metric(summary, summary.simulation.metric_difference)}."
        )
    if summary.int8 is not None:
        reference = int8_reference(summary)
        near = f"SQNR {text.number(summary.int8.sqnr_db)} dB{_metric(summary, summary.int8.metric_difference)}"
        found.append(f"int8 against {reference}: {near}{float_share(summary)}.")
    return tuple(found)


def int8_reference(summary: RunSummary) -> str:
    """The form whose function the int8 model should have."""
    return "simulated" if summary.simulation is None else "sped-up simulated"


def float_share(summary: RunSummary) -> str:
    """How much of the int8 model is no integer arithmetic."""
    if summary.int8 is None or not summary.int8.float_layers:
        return ""
    return f"; {len(summary.int8.float_layers)} of its {summary.int8.layers} quantized layers compute in float"


def _metric(summary: RunSummary, difference: float | None) -> str:
    name = next((name for model in summary.models for name in model.metrics), None)
    return "" if name is None or difference is None else f"; {name} {text.difference(difference)}"


def load_line(artifact_uri: str, runs_alone: bool = True) -> str:
    """The one line of Python that loads a stored model.

    Args:
        artifact_uri: where it is.
        runs_alone: whether it holds a program that runs without the model's source.
    """
    if runs_alone:
        return f"import raycomp; model = raycomp.load({artifact_uri!r})"
    return f"import raycomp; model = raycomp.load({artifact_uri!r}, model)  # model: from the task's model()"


def _metric_row(name: str, models: Sequence[ModelFigures]) -> Row:
    dense = models[0].metrics.get(name)
    cells = [Cell(text.number(dense))]
    for model in models[1:]:
        value = model.metrics.get(name)
        against = "" if value is None or dense is None else text.difference(value - dense)
        cells.append(Cell(text.number(value), against))
    return Row(name, tuple(cells))


def _size_row(
    label: str,
    models: Sequence[ModelFigures],
    read: Callable[[ModelFigures], float | None],
    write: Callable[[float | None], str],
) -> Row:
    dense = read(models[0])
    cells = [Cell(write(dense))]
    for value in (read(model) for model in models[1:]):
        worse = value is not None and dense is not None and value > dense
        cells.append(Cell(write(value), text.times(dense, value), worse))
    return Row(label, tuple(cells))


def _latency_row(batch: str, models: Sequence[ModelFigures]) -> Row:
    return _size_row(f"latency, batch {batch}", models, lambda model: model.latency_s.get(batch), text.seconds)
