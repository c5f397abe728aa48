"""Nothing after the last checkpoint loses a training: what fails is a note, and the artifact is there without it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from raycomp.config import parse_job
from raycomp.core.masks import Masks
from raycomp.deploy.int8 import Int8Model
from raycomp.deploy.sizes import ExportReport
from raycomp.errors import TaskError
from raycomp.pipeline import stage
from raycomp.pipeline.earlier import kept_for_the_ending
from raycomp.pipeline.ending import artifact, conclude, figures
from raycomp.pipeline.entrypoint import build_task
from raycomp.pipeline.notes import Notes
from raycomp.pipeline.stage import StageStart, resolve_start
from raycomp.pipeline.task import given
from raycomp.pipeline.training.checkpoint import StageState
from raycomp.pipeline.training.metrics import evaluate
from raycomp.report import render_report
from raycomp.report.comparison import load_line
from raycomp.results.summary import FORMS, LayerFigures, RunSummary, Unpruned
from raycomp.speedup import RULES, Plan, apply_plan
from raycomp.storage import load_tensors, open_store, publish
from tests.contracts import tiny
from tests.contracts.training import Keeper, train

RAW = tiny.job(tiny.pruner("L1NormPruner"), tiny.quantizer(2), steps=4)
FILES = {
    "calibration.json", "int8.onnx", "job.yaml", "masks.safetensors", "metrics.parquet", "model.onnx", "model.pt2",
    "model.safetensors", "plan.json", "report.html", "summary.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    train(RAW, Keeper(folder))
    with pytest.MonkeyPatch.context() as patch:
        # The exporter compiles its 500 operators anew for every export.
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield folder


def ended(checkpoint: Path, folder: Path, fault: Callable[[], None] | None = None, **keys: Any) -> RunSummary:
    """What the head node makes of the training, for a job with other keys; `fault` comes up in between."""
    config = parse_job({**RAW, **keys})
    task, start = build_task(config.task), StageStart()
    state, facts = StageState.load(checkpoint), conclude.RunFacts("run", "now", str(folder), {}, {})
    resolved = resolve_start(config, 0, task, start)
    if fault is not None:
        fault()
    return conclude.conclude(config, task, start, resolved, state, [], facts, folder).summary


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Int8Model]:
    """A whole artifact, and its int8 model."""
    lowered: list[Int8Model] = []
    lower = conclude.lower_int8

    def kept(*given: Any, **keys: Any) -> Int8Model:
        lowered.append(lower(*given, **keys))
        return lowered[-1]

    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conclude, "lower_int8", kept)
        ended(checkpoint, folder)
    assert {path.name for path in folder.iterdir()} == FILES
    return folder, lowered[0]


@pytest.fixture
def ready_exports(made: tuple[Path, Int8Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported anew where a test isn't about that, which takes most of the time, is there already."""

    def copied(name: str) -> Any:
        def export(_model: Any, _example: Any, path: Path, *_: Any) -> ExportReport:
            shutil.copy(made[0] / name, path)
            return ExportReport(True)

        return export

    monkeypatch.setattr(conclude, "lower_int8", lambda *_, **__: made[1])
    monkeypatch.setattr(artifact, "export_pt2", copied("model.pt2"))
    monkeypatch.setattr(artifact, "export_onnx", copied("model.onnx"))
    monkeypatch.setattr(figures, "export_onnx", copied("model.onnx"))


def fail(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("it failed")


PLACES: list[tuple[str, Any, str, str, set[str]]] = [
    ("speedup", stage, "ModelSpeedup", "stage fused: nothing was cut", set()),
    ("verification", stage, "verify", "stage fused: nothing was cut", set()),
    ("data", stage, "differing_inputs", "stage fused: nothing was cut", set()),
    ("inputs", conclude, "differing_inputs", "the sizes that real batches have are not known", set()),
    ("example", conclude, "real_inputs", "the evaluation data can't be read", set()),
    ("lowering", conclude, "lower_int8", "there is no int8 model", {"int8.onnx"}),
    ("pt2", artifact, "export_pt2", "there is no model.pt2", {"model.pt2"}),
    ("onnx", artifact, "export_onnx", "there is no model.onnx", {"model.onnx"}),
    ("timed onnx", figures, "export_onnx", "the float models are timed in PyTorch", set()),
    ("timing", figures, "latencies_s", "the int8 model is not timed with batches of 2", set()),
    ("macs", figures, "count_macs", "the MACs of the sped-up model are not counted", set()),
    ("size", figures, "save_tensors", "the size of the dense model is unknown", set()),
    ("metrics", figures, "evaluation_batches", "no form is evaluated", set()),
    ("sqnr", figures, "sqnr_db", "int8 is not compared with the simulated quantization", set()),
    ("layers", figures, "layer_figures", "the layers are not listed", set()),
    ("history", artifact, "_write_history", "there is no metrics.parquet", {"metrics.parquet"}),
    ("masks", conclude, "dense_masks", "masks.safetensors holds the masks of the last stage alone", set()),
    ("statistics", artifact, "save_masks", "masks or calibration", {"masks.safetensors", "calibration.json"}),
    ("left", conclude, "_left_in_place", "what is masked and was not cut is not listed", set()),
    ("environment", figures, "hardware", "the environment is not told", set()),
    ("report", artifact, "write_report", "there is no report", {"report.html"}),
]


@pytest.mark.usefixtures("ready_exports")
@pytest.mark.parametrize("module, name, note, lost", [pytest.param(*rest, id=key) for key, *rest in PLACES])
def test_what_fails_is_a_note_and_the_artifact_is_published_without_it(
    module: Any, name: str, note: str, lost: set[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, fail)
    summary = ended(checkpoint, tmp_path)
    told = [warning for warning in summary.warnings if note in warning]
    assert told and all(warning.endswith("ZeroDivisionError: it failed") for warning in told)
    assert {path.name for path in tmp_path.iterdir()} == FILES - lost
    assert RunSummary.from_json((tmp_path / "summary.json").read_text()) == summary
    assert render_report(summary)
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    model = apply_plan(build_task(parse_job(RAW).task).model(), plan)
    model.load_state_dict(load_tensors(tmp_path / "model.safetensors"))
    cut = 6 if "nothing was cut" in note else 3
    assert model.conv1.weight.count_nonzero((1, 2, 3)).count_nonzero() == 3
    assert model.conv1.weight.shape[0] == cut


class Odd(BaseException):
    """None of Python's errors."""


@pytest.mark.usefixtures("ready_exports")
@pytest.mark.parametrize("error", [SystemExit(3), Odd("odd"), GeneratorExit(), MemoryError(), RecursionError("deep")])
def test_whatever_is_raised_is_a_note(
    error: BaseException, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: Any, **__: Any) -> None:
        raise error

    for module, name in ((conclude, "lower_int8"), (artifact, "export_pt2"), (figures, "count_macs")):
        monkeypatch.setattr(module, name, leave)
    summary = ended(checkpoint, tmp_path)
    assert sum(f"{type(error).__name__}: " in warning for warning in summary.warnings) >= 3
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"int8.onnx", "model.pt2"}


def test_an_interrupt_is_no_note() -> None:
    stopped = SystemExit(15)
    stopped.is_ray_terminate = True  # type: ignore[attr-defined]
    for error in (KeyboardInterrupt(), stopped):
        with pytest.raises(type(error)), Notes().instead_of("it ends"):
            raise error


@pytest.mark.usefixtures("ready_exports")
def test_one_form_that_fails_costs_the_others_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(torch.nn.Module):
        forward = fail

    monkeypatch.setattr(conclude.Int8Model, "as_module", lambda *_, **__: Broken())
    summary = ended(checkpoint, tmp_path)
    rows = {row.name: row for row in summary.models}
    assert rows["int8"].metrics == {} and rows["int8"].latency_s == {}
    for name in ("dense", "simulated", "sped-up"):
        assert rows[name].metrics.keys() == {"accuracy"} and rows[name].latency_s.keys() == {"1", "2"}
    assert any("the int8 model is not evaluated: " in warning for warning in summary.warnings)


def test_a_rule_that_raises_leaves_its_channels_and_the_job_ends(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = type("Raising", (type(RULES._rules["aten.conv2d"]),), {"sinks": fail})()
    monkeypatch.setitem(RULES._rules, "aten.conv2d", rule)
    summary = ended(checkpoint, tmp_path)
    reasons = {item.module: item.reason for item in summary.unpruned}
    assert reasons["conv1"] == "the speedup rule for aten.conv2d raised ZeroDivisionError: it failed"
    assert summary.verification is not None and summary.verification.passed


@pytest.mark.parametrize("runs_alone", [True, False])
def test_the_line_that_loads_the_model_works(
    runs_alone: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runs_alone:
        monkeypatch.setattr(artifact, "export_pt2", fail)
    files = tmp_path / "files"
    files.mkdir()
    summary = ended(checkpoint, files)
    assert summary.runs_alone is runs_alone
    fields = {
        "job": "tiny",
        "run": "run",
        "created": "now",
        "lineage": {},
        "versions": {},
        "figures": summary.figures(),
    }
    publish(open_store(str(tmp_path / "store")), "run", files, fields)
    task = build_task(parse_job(RAW).task)
    known: dict[str, Any] = {"model": task.model()}
    line = load_line(str(tmp_path / "store" / "run"), summary.runs_alone)
    exec(line, known)
    images = torch.stack([image for image, _ in task.eval_data()])
    with torch.no_grad():
        assert known["model"](images).shape == (21, 3)
    assert (type(known["model"]) is type(task.model())) is not runs_alone


def test_every_form_is_measured_and_held_against_the_one_whose_function_it_should_have(
    checkpoint: Path, tmp_path: Path
) -> None:
    found = ended(checkpoint, tmp_path)
    assert [row.name for row in found.models] == list(FORMS)
    accuracy = {row.name: row.metrics["accuracy"] for row in found.models}
    assert found.verification is not None and found.simulation is not None and found.int8 is not None
    assert found.verification.reference == "masked" and found.verification.passed
    assert found.verification.metric_difference == accuracy["sped-up"] - accuracy["masked"] == 0
    # The cut model rounds as the one that trained; single values that lie between two steps may fall to either side.
    assert found.simulation.sqnr_db > 30
    assert found.simulation.metric_difference == accuracy["sped-up simulated"] - accuracy["simulated"]
    assert found.int8.sqnr_db > 20
    assert found.int8.metric_difference == accuracy["int8"] - accuracy["sped-up simulated"]


@pytest.mark.usefixtures("ready_exports")
def test_every_form_sees_every_batch_and_each_is_read_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    batches = figures.evaluation_batches

    def counted(*given: Any) -> Iterator[Any]:
        for batch, wanted in batches(*given):
            read.append(wanted)
            yield batch, wanted

    monkeypatch.setattr(figures, "evaluation_batches", counted)
    summary = ended(checkpoint, tmp_path, evaluation={"batch_size": 8, "latency_runs": 1})
    assert read == [8, 8, 5]
    config = parse_job(RAW)
    task = build_task(config.task)
    expected = evaluate(task, task.model(), task.eval_data(), batch_size=21)
    assert summary.models[0].metrics == pytest.approx(expected)


@pytest.mark.usefixtures("ready_exports")
def test_measuring_ends_at_its_limit_for_all_forms_alike(checkpoint: Path, tmp_path: Path) -> None:
    summary = ended(checkpoint, tmp_path, evaluation={"batch_size": 1, "limit_s": 1e-9, "latency_runs": 1})
    assert [row.metrics["accuracy"] in (0.0, 1.0) for row in summary.models] == [True] * len(FORMS)
    assert "metrics are of the first 1 samples: evaluation.limit_s is 1e-09" in summary.warnings


@pytest.mark.usefixtures("ready_exports")
@pytest.mark.parametrize("methods", [("model",), ("example_input", "eval_data"), ("train_data", "eval_data", "inputs")])
def test_what_the_task_gave_before_its_training_stands_in_for_what_fails_after_it(
    methods: tuple[str, ...], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model may come from a hub that is away by then, or its code may leave with `sys.exit()`."""

    def leave(*_: Any) -> None:
        raise SystemExit(3)

    def fault() -> None:
        for method in methods:
            monkeypatch.setattr(tiny.Tiny, method, leave)

    with kept_for_the_ending():
        summary = ended(checkpoint, tmp_path, fault)
    assert {"model.safetensors", "model.pt2", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert any("SystemExit: 3" in warning for warning in summary.warnings)
    if methods == ("model",):
        assert any("model() raised SystemExit: 3: what model() gave" in warning for warning in summary.warnings)
        assert {row.name: row.metrics for row in summary.models}["dense"].keys() == {"accuracy"}


def test_nothing_stands_in_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task(parse_job(RAW).task)
    with kept_for_the_ending():
        given(task, "model")
        monkeypatch.setattr(type(task), "model", fail)
        with pytest.raises(TaskError, match="ZeroDivisionError"):
            given(task, "model")


def recurrent() -> nn.ModuleDict:
    """The layer has weights of 32 x 6 and 32 x 8 and two biases of 32, the other one 9 parameters."""
    return nn.ModuleDict({"rnn": nn.LSTM(6, 8), "fc": nn.Linear(8, 1)})


def test_the_part_that_stays_masked_is_of_what_has_masks() -> None:
    model = recurrent()
    masks = Masks({"rnn": {"weight_ih_l0": torch.zeros(32, 6), "_input_0": torch.zeros(6)}})
    (told,) = conclude._left_in_place(model, masks, [Unpruned("rnn", 0, 32, "no rule")])
    # 192 of 192 + 256 + 64 + 9
    assert told == "masked and not cut: rnn (37% of the parameters): no rule"


def test_layers_whose_compressed_parameter_has_another_name_are_listed() -> None:
    model = recurrent()
    masks = Masks({"rnn": {"weight_ih_l0": torch.ones(32, 6)}})
    masks["rnn"]["weight_ih_l0"][:8] = 0
    with torch.no_grad():
        model["rnn"].weight_ih_l0[:8] = 0
    final = SimpleNamespace(model=model, calibration={"rnn": {"weight_hh_l0": {"quant_dtype": "int8"}}})
    rows = figures.layer_figures(model, masks, final)  # type: ignore[arg-type]
    assert rows == (
        LayerFigures("rnn.weight_ih_l0", "LSTM", (32, 6), (32, 6), 0.25),
        LayerFigures("rnn.weight_hh_l0", "LSTM", (32, 8), (32, 8), 0.0, "int8"),
    )


@pytest.mark.parametrize(("before", "after"), [(torch.float64, torch.float32), (torch.float16, torch.float16)])
def test_what_is_stored_in_fewer_bits_alone_counts_as_no_compression(
    before: torch.dtype, after: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conclude, "dense_model", lambda task, seed: nn.Linear(2, 2).to(before))
    notes = Notes()
    assert conclude._dense(parse_job(RAW), build_task(parse_job(RAW).task), notes).weight.dtype == after
    (told,) = notes()
    assert told.startswith(f"the model is in {str(before)[6:]}, and trains and is published in float32")


def test_a_job_without_int8_took_no_time_for_it(checkpoint: Path, tmp_path: Path) -> None:
    assert "lower to int8" in ended(checkpoint, tmp_path).timings
    (tmp_path / "float").mkdir()
    assert "lower to int8" not in ended(checkpoint, tmp_path / "float", int8={"enabled": False}).timings


@pytest.mark.usefixtures("ready_exports")
def test_each_form_that_is_held_against_another_runs_once_for_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[nn.Module] = []
    run = figures._outputs
    monkeypatch.setattr(figures, "_outputs", lambda module, inputs: (ran.append(module), run(module, inputs))[1])
    found = ended(checkpoint, tmp_path)
    assert found.simulation is not None and found.int8 is not None
    assert len(ran) == len(set(map(id, ran))) == 3
