"""The sections of a run's report, each a pure function of the summary; one with nothing to say is empty."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import yaml

from raycomp.report import text
from raycomp.report.comparison import (
    comparison,
    float_share,
    int8_reference,
    load_line,
    nothing_cut,
    rounding_texts,
    verification_texts,
)
from raycomp.report.markup import Column, code_block, dotted, facts, figure, paragraph, section, table
from raycomp.report.outcome import change, doubts, outcome, why_in_float
from raycomp.report.plots import Mark, Point, bar, line_chart
from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import FORMS, LayerFigures, ModelFigures, RunSummary


def headline(summary: RunSummary) -> str:
    """Title, one sentence on the outcome, the figures that matter most, and warnings."""
    names = f"run {summary.run} · {summary.created}"
    return "\n".join(
        (
            f"<header><h1>{escape(summary.job)}: compressed model</h1>",
            paragraph(names, "soft small"),
            paragraph(outcome(summary), "lead"),
            _heads(summary),
            _warnings(summary),
            "</header>",
        )
    )


def what_was_run(summary: RunSummary) -> str:
    """The job's stages and compressors, read from the job file."""
    job = _job(summary)
    if not job:
        return ""
    rows = [
        (escape(str(stage.get("name", ""))), "<br>".join(escape(_compressor(item)) for item in stage["compressors"]))
        for stage in job.get("stages", ())
    ]
    training = job.get("training", {})
    length = ", ".join(f"{training[key]} {key}" for key in ("epochs", "steps") if training.get(key))
    pairs = {
        "Task": str(job.get("task", {}).get("entrypoint", "")),
        "Training": ", ".join(
            part
            for part in (
                length,
                f"global batches of {training['global_batch_size']}" if "global_batch_size" in training else "",
                f"seed {training['seed']}" if "seed" in training else "",
            )
            if part
        ),
        "Workers": str(
            summary.history[-1].workers if summary.history else job.get("scaling", {}).get("num_workers", 1)
        ),
    }
    return section(
        "What was run",
        paragraph("Each stage trains the model with all of its compressors at once; stages follow each other.", "soft"),
        facts({name: value for name, value in pairs.items() if value}),
        table((Column("Stage"), Column("Compressors")), rows),
    )


def result(summary: RunSummary) -> str:
    """Every form of the model beside dense."""
    head = "".join(f"<th>{escape(model.name)}</th>" for model in summary.models)
    body = "\n".join(
        f"<tr><th>{escape(row.label)}</th>"
        + "".join(
            f"<td>{escape(cell.value)}"
            + (
                f"<small{' class=worse' if cell.worse else ''}>{escape(cell.against_dense)}</small>"
                if cell.against_dense
                else ""
            )
            + "</td>"
            for cell in row.cells
        )
        + "</tr>"
        for row in comparison(summary.models)
    )
    if not body:
        return ""
    shown = (
        f'<div class="wide"><table class="result"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    note = paragraph(
        "Under each value: for metrics the difference from dense, for all else how many times smaller or faster it is "
        "than dense (below 1× is worse). A dash is what wasn't measured. Latency is the median time of one call on the "
        "machine under Environment.",
        "soft small",
    )
    if summary.earlier:
        note += paragraph("The forms are those of the last stage.", "soft small")
    described = {**FORMS, "int8": FORMS["int8"] + float_share(summary)}
    if summary.int8 is not None and not summary.int8.computes_integers:
        described["int8"] = "the sped-up model in ONNX Runtime, its weights in integers and all computed in float"
    if summary.verification is None:
        described["sped-up"] = nothing_cut(summary)
    elif not any(model.name == "masked" for model in summary.models):
        described["sped-up"] = described["sped-up"].replace("masked model", "simulated model")
    forms = facts({model.name: described[model.name] for model in summary.models if model.name in described})
    load = ""
    if summary.artifact_uri:
        load = paragraph("To use it:") + code_block(load_line(summary.artifact_uri, summary.runs_alone))
    return section("Result", shown, note, forms, load)


def verification(summary: RunSummary) -> str:
    """Whether the sped-up model is the same function as the one that it was cut from; and how near what rounds is."""
    checks = summary.verifications
    if not checks:
        return ""
    passed = all(check.passed for check in checks)
    badge = '<span class="badge good">verified</span>' if passed else '<span class="badge bad">not verified</span>'
    texts = map(paragraph, (*(sentence for sentence, _ in verification_texts(summary)), *rounding_texts(summary)))
    return section("Is the sped-up model the same function?", f"<p>{badge}</p>", *texts)


def int8(summary: RunSummary) -> str:
    """How near the integer model is to what training simulated, and what the hardware did with it."""
    figures = summary.int8
    if figures is None:
        return ""
    reference = f"the {int8_reference(summary)} model"
    share = figures.weight_bytes / figures.float_weight_bytes if figures.float_weight_bytes else None
    hardware = (
        "The processor that measured has VNNI instructions, so 8-bit dot products are exact and fast."
        if figures.vnni
        else "The processor that measured has no VNNI instructions: 8-bit dot products may saturate there and gain "
        "little or no speed; expect better latency on one that has them."
    )
    if not figures.computes_integers:
        hardware = f"No layer computes with integers: {why_in_float(figures)}."
    elif figures.reduce_range:
        hardware += " Weights were held to 7 bits, so that sums do not saturate without VNNI."
    pairs = {
        "Signal to noise": f"{text.number(figures.sqnr_db)} dB, of its outputs against {reference}",
        "Metric": f"{_difference(figures.metric_difference)} against {reference}",
        "Weights": f"{text.size(figures.weight_bytes)}, {text.percent(share)} of the "
        f"{text.size(figures.float_weight_bytes)} that they take in float32",
    }
    rows = [(dotted(layer), escape(cause)) for layer, cause in figures.float_layers.items()]
    in_float = table((Column("Computed in float", "name"), Column("Why")), rows) if rows else ""
    return section("Integer arithmetic", facts(pairs), paragraph(hardware), in_float)


def _difference(value: float | None) -> str:
    return text.number(None) if value is None else text.difference(value)


def curves(summary: RunSummary) -> str:
    """Loss, metrics and sparsity over all steps of all stages."""
    steps, marks = timeline(summary.history)
    if not steps:
        return ""
    events = summary.history
    names = list(dict.fromkeys(name for event in events for name in event.metrics))
    drawings = [
        figure(
            "Training loss",
            _curve("loss", [(x, e.loss) for x, e in zip(steps, events, strict=True) if e.loss is not None], marks),
        )
    ]
    for name in names:
        points = [(x, event.metrics[name]) for x, event in zip(steps, events, strict=True) if name in event.metrics]
        drawings.append(figure(name, _curve(name, points, marks)))
    sparsity = [(x, event.sparsity) for x, event in zip(steps, events, strict=True)]
    drawings.append(figure("Sparsity (fraction masked)", _curve("sparsity", sparsity, marks)))
    return section("Training", f'<div class="charts">{"".join(drawings)}</div>')


def timeline(history: tuple[ProgressEvent, ...]) -> tuple[list[float], tuple[Mark, ...]]:
    """Steps counted through all stages, and where each stage begins (no marks for a single stage)."""
    steps: list[float] = []
    marks: list[Mark] = []
    offset = 0
    for index, event in enumerate(history):
        if index == 0 or event.stage != history[index - 1].stage:
            offset += history[index - 1].step if index else 0
            marks.append(Mark(offset, event.stage))
        steps.append(offset + event.step)
    return steps, tuple(marks) if len(marks) > 1 else ()


def layers(summary: RunSummary) -> str:
    """Channels before and after, layer by layer."""
    if not summary.layers:
        return ""
    columns = (
        Column("Layer", "name"),
        Column("Channels kept"),
        Column("", "num"),
        Column("Weights masked", "num on-desk"),
        Column("Type", "on-desk"),
        Column("Stored as", "on-desk"),
    )
    return section(
        "Layers",
        paragraph(
            "Output channels before and after, and the fraction of the layer's weights that masks had set to zero.",
            "soft",
        ),
        table(columns, map(_layer_cells, summary.layers), "layers"),
    )


def searches(summary: RunSummary) -> str:
    """What each search found, and what it was worth before training."""
    parts = []
    for found in summary.searches:
        told = (
            f"{found.compressor} of stage {found.stage} judged {found.judged} choices under their masks, before any "
            f"training: {text.number(found.first)} where all layers lose alike, {text.number(found.best)} the best. "
            "The artifact's searched.yaml has it as a config list."
        )
        rows = [(dotted(name), text.percent(part)) for name, part in found.parts.items()]
        parts += [paragraph(escape(told), "soft"), table((Column("Layers", "name"), Column("Pruned")), rows)]
    return section("What was searched for", *parts) if parts else ""


def unpruned(summary: RunSummary) -> str:
    """What masks wanted gone and speedup kept, since removing it would have changed the outputs."""
    if not summary.verifications and not summary.unpruned:
        return ""
    if not summary.unpruned:
        return section("Left in place", paragraph("Nothing: all that the masks set to zero was cut out."))
    rows = [(dotted(f.module), str(f.dim), str(f.count), escape(f.reason)) for f in summary.unpruned]
    columns = (Column("Module", "name"), Column("Dim", "num"), Column("Count", "num"), Column("Why"))
    note = "Masked, but kept in the sped-up model, because removing it would have changed the outputs."
    return section("Left in place", paragraph(note, "soft"), table(columns, rows))


def timings(summary: RunSummary) -> str:
    """Where the time went."""
    total = sum(summary.timings.values())
    if not total:
        return ""
    rows = [
        (escape(part), bar(spent / total, f"{part}: {text.seconds(spent)}"), text.seconds(spent))
        for part, spent in summary.timings.items()
    ]
    columns = (Column("Part"), Column("Share"), Column("Time", "num"))
    return section("Time", paragraph(f"{text.seconds(total)} in all.", "soft"), table(columns, rows, "times"))


def environment(summary: RunSummary) -> str:
    """Versions and hardware."""
    return section("Environment", facts(summary.environment))


def job_file(summary: RunSummary) -> str:
    """The job file, to run it again."""
    if not summary.config_yaml:
        return ""
    file, in_file, _ = str(_job(summary).get("task", {}).get("entrypoint", "")).partition(".py:")
    runs = "<code>raycomp run job.yaml</code> runs it again"
    if in_file:
        again = f"Save it as job.yaml where {escape(file)}.py is relative to it; {runs}."
    else:
        from_python = "<code>CompressionJob(&quot;job.yaml&quot;, task=…)</code>"
        again = f"Save it as job.yaml; {runs} where the task is in a module, {from_python} where Python gave it."
    again = f'<p class="soft">{again}</p>'
    shown = f"<details><summary>Show the job file</summary>{code_block(summary.config_yaml)}</details>"
    return section("Job file", again, shown)


def _job(summary: RunSummary) -> Mapping[str, Any]:
    job = yaml.safe_load(summary.config_yaml) if summary.config_yaml else None
    return job if isinstance(job, Mapping) else {}


def _heads(summary: RunSummary) -> str:
    if len(summary.models) < 2:
        return ""
    dense, last = summary.models[0], summary.models[-1]
    items = "".join(
        f"<div><dt>{escape(label)}</dt>"
        f'<dd><b>{escape(value)}</b><span class="soft small">{escape(detail)}</span></dd></div>'
        for label, value, detail in _head_figures(dense, last)
        if value
    )
    return f'<dl class="heads">{items}</dl>'


def _head_figures(dense: ModelFigures, last: ModelFigures) -> list[tuple[str, str, str]]:
    heads = [
        (name, text.number(last.metrics[name]), f"{text.difference(last.metrics[name] - value)} against dense")
        for name, value in list(dense.metrics.items())[:1]
        if name in last.metrics
    ]
    ratio, label = change(dense.macs, last.macs, "fewer MACs", "more MACs")
    heads.append((label, ratio, f"{text.count(dense.macs)} → {text.count(last.macs)}"))
    ratio, label = change(dense.file_bytes, last.file_bytes, "smaller file", "larger file")
    heads.append((label, ratio, f"{text.size(dense.file_bytes)} → {text.size(last.file_bytes)}"))
    batches = sorted(set(dense.latency_s) & set(last.latency_s), key=int)
    for batch in batches[-1:]:
        before, after = dense.latency_s[batch], last.latency_s[batch]
        if last.name != "int8" and (last.parameters, last.macs) == (dense.parameters, dense.macs):
            continue  # as large as dense: two times of one model differ by chance
        ratio, label = change(before, after, f"faster than dense, batch {batch}", f"slower than dense, batch {batch}")
        heads.append((label, ratio, f"{text.seconds(before)} → {text.seconds(after)}"))
    return heads


def _warnings(summary: RunSummary) -> str:
    told = (*doubts(summary), *summary.warnings)
    if not told:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in told)
    return f'<div class="warnings" role="note"><strong>Worth knowing</strong><ul>{items}</ul></div>'


def _compressor(item: Mapping[str, Any]) -> str:
    inner = item.get("pruner")
    name = f"{item.get('type')} over {_compressor(inner)}" if isinstance(inner, Mapping) else str(item.get("type"))
    settings = [
        level
        for entry in item.get("config_list", ())
        for level in (entry, *(entry.get("target_settings") or {}).values())
    ]
    ratios = {level["sparse_ratio"] for level in settings if level.get("sparse_ratio") is not None}
    kinds = {level["quant_dtype"] for level in settings if level.get("quant_dtype") is not None}
    details = [text.percent(ratio) for ratio in sorted(ratios)] + sorted(kinds)
    return f"{name} ({', '.join(details)})" if details else name


def _curve(name: str, points: list[Point], marks: tuple[Mark, ...]) -> str:
    return line_chart(points, label=f"{name} over training steps", x_label="step", marks=marks)


def _layer_cells(layer: LayerFigures) -> tuple[str, ...]:
    before = text.channels(layer.type, layer.shape_before)
    after = text.channels(layer.type, layer.shape_after)
    change = f"{before} → {after}" if after != before else str(before)
    return (
        dotted(layer.module),
        bar(after / before if before else 1.0, f"{after} of {before} channels"),
        change,
        text.percent(layer.sparsity) if layer.sparsity else "–",
        escape(layer.type),
        escape(layer.quantized or "float"),
    )
