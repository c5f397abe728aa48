"""How a run ended, in the few sentences that come first."""

from __future__ import annotations

from raycomp.report import text
from raycomp.results.summary import Int8Figures, RunSummary

_LEAST_SQNR_DB = 10.0


def outcome(summary: RunSummary) -> str:
    """The result in a sentence or two, for someone who reads nothing else."""
    if not summary.models:
        return "The run made no model."
    dense, last = summary.models[0], summary.models[-1]
    if last is dense:
        return "The run measured the dense model only."
    changes = (
        change(dense.macs, last.macs, "fewer MACs", "more MACs"),
        change(dense.file_bytes, last.file_bytes, "smaller on disk", "larger on disk"),
    )
    gains = [f"{ratio} {what}" for ratio, what in changes if ratio]
    first = next(iter(dense.metrics), None)
    quality = ""
    if first is not None and first in last.metrics:
        quality = (
            f" {first.capitalize()} {text.number(last.metrics[first])} against {text.number(dense.metrics[first])}."
        )
    compared = f"against the dense one it was made from: {' and '.join(gains) or 'as large'}."
    return f"The {last.name} model, {compared}{quality}{_in_float(summary)}{_slower(summary)}"


def _in_float(summary: RunSummary) -> str:
    in_float = summary.int8 is not None and not summary.int8.computes_integers
    return " No layer of it computes with integers." if in_float else ""


def _slower(summary: RunSummary) -> str:
    """Where int8 takes longer than the float model of its size."""
    rows = {model.name: model for model in summary.models}
    if "int8" not in rows or "sped-up" not in rows:
        return ""
    before, after = rows["sped-up"].latency_s, rows["int8"].latency_s
    slower = [
        f"{text.seconds(after[batch])} against {text.seconds(before[batch])} with batch {batch}"
        for batch in sorted(before.keys() & after.keys(), key=int)
        if after[batch] > before[batch]
    ]
    told = f" On this machine int8 is slower than the sped-up model in float: {', '.join(slower)}."
    return told if slower else ""


def doubts(summary: RunSummary) -> tuple[str, ...]:
    """What speaks against using the result."""
    int8 = summary.int8
    if int8 is None:
        return ()
    found = [] if int8.computes_integers else [f"the int8 model computes everything in float: {why_in_float(int8)}"]
    if int8.sqnr_db < _LEAST_SQNR_DB:
        sqnr = f"SQNR {text.number(int8.sqnr_db)} dB, below {_LEAST_SQNR_DB:g}"
        remedy = "leave the layers out of the quantizer that take it badly, or train longer"
        found.append(f"the int8 model's outputs are not those of the simulated quantization: {sqnr} ({remedy})")
    return tuple(found)


def why_in_float(int8: Int8Figures) -> str:
    """Why no layer computes with integers, and what would change it."""
    if not int8.layers:
        return "no weight is stored in integers; quantize `weight`, with granularity out_channel or one scale"
    return "; ".join(text.layers_by_cause(int8.float_layers))


def change(dense: float | None, last: float | None, better: str, worse: str) -> tuple[str, str]:
    """The ratio as at least 1, and the word for its direction; an empty ratio where nothing changed or is known."""
    if dense and last and last > dense:
        return text.times(last, dense), worse
    return text.times(dense, last), better
