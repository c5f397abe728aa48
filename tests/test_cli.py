"""The command line: what it hands on, what it prints, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result
from rich.text import Text

from raycomp import submit as jobs
from raycomp.cli import main
from raycomp.config import JobConfig, SourceMap
from raycomp.distributed.job import CompressionJob
from raycomp.errors import ArtifactError, ClusterError, ConfigError, TaskError
from raycomp.storage import open_store, publish
from tests.report.summaries import summary

JOB = """\
name: small
task:
  entrypoint: task.py:Task
stages:
  - name: prune
    compressors:
      - type: L1NormPruner
        config_list:
          - op_names: [conv]
            sparse_ratio: 0.5
training:
  epochs: 2
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return file


class FakeJob:
    """Stands in for CompressionJob: notes what it was given, and ends as it is told."""

    config: JobConfig
    base_dir: Path
    source: SourceMap
    resume: bool
    error: Exception | None = None

    def __init__(self, config: JobConfig, base_dir: Path, source: SourceMap) -> None:
        FakeJob.config, FakeJob.base_dir, FakeJob.source = config, base_dir, source

    def validate(self) -> tuple[str, ...]:
        if FakeJob.error is not None:
            raise FakeJob.error
        return ("stage prune: fc will be masked",)

    def fit(self, *, resume: bool, progress: Any, resume_with: str) -> SimpleNamespace:
        FakeJob.resume = resume
        progress.message("run 1 on local Ray")
        self.validate()
        return SimpleNamespace(summary=summary(), artifact_uri="/store/small/artifacts/1", report_path="/store/r.html")


@pytest.fixture
def fake_job(monkeypatch: pytest.MonkeyPatch) -> type[FakeJob]:
    monkeypatch.setattr("raycomp.distributed.job.CompressionJob", FakeJob)
    monkeypatch.setattr(FakeJob, "error", None)
    return FakeJob


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_run_hands_on_the_job_and_prints_how_it_ends(job: Path, fake_job: type[FakeJob]) -> None:
    result = _invoke("run", job)
    assert result.exit_code == 0, result.output
    assert fake_job.config.name == "small" and fake_job.base_dir == job.parent and fake_job.resume is False
    assert fake_job.source.locate(("training", "epochs")) == f"{job}:12 training.epochs"
    assert "run 1 on local Ray" in result.stderr
    lines = result.stdout.splitlines()
    assert "artifact  /store/small/artifacts/1" in lines
    assert "report    /store/r.html" in lines
    assert "load      import raycomp; model = raycomp.load('/store/small/artifacts/1')" in lines
    assert any("sped-up" in line and "int8" in line for line in lines)


def test_the_line_that_submission_looks_for_is_the_one_that_run_prints(job: Path, fake_job: type[FakeJob]) -> None:
    details = SimpleNamespace(status="SUCCEEDED", driver_exit_code=0, message="")
    assert jobs.outcome(details, _invoke("run", job).output).exit_code == 0


def test_settings_override_the_file_and_are_values_of_yaml(job: Path, fake_job: type[FakeJob]) -> None:
    overrides = ["training.epochs=null", "training.steps=7", "stages.0.compressors.0.config_list.0.sparse_ratio=0.25"]
    overrides += ["storage.uri=s3://bucket/a=b", "scaling.resources_per_worker={CPU: 0.5}"]
    overrides += ["speedup.tolerance=1e-3", "task.arguments.kind=no"]
    result = _invoke("run", job, "--resume", *[word for item in overrides for word in ("--set", item)])
    assert result.exit_code == 0, result.output
    config = fake_job.config
    assert (config.training.epochs, config.training.steps) == (None, 7)
    assert config.stages[0].compressors[0].config_list[0].sparse_ratio == 0.25
    assert config.storage.uri == "s3://bucket/a=b"
    assert config.scaling.resources_per_worker == {"CPU": 0.5}
    assert (config.speedup.tolerance, config.task.arguments) == (1e-3, {"kind": "no"})
    assert fake_job.resume is True


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.epochz=3", "did you mean 'epochs'"),
        ("training.epochs", "it has no '='"),
        ("training.epochs=two", "job.yaml:12 training.epochs: got 'two'"),
        ("training.epochs=[", "--set training.epochs=[: it is not YAML"),
    ],
)
def test_a_wrong_setting_is_refused(job: Path, fake_job: type[FakeJob], setting: str, message: str) -> None:
    result = _invoke("validate", job, "--set", setting)
    assert result.exit_code == 2
    assert message in result.stderr


def test_everything_wrong_with_a_file_comes_at_once_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(JOB.replace("epochs: 2", "epochs: 0").replace("sparse_ratio: 0.5", "sparse_ratio: 1.5"))
    result = _invoke("run", file)
    assert result.exit_code == 2
    assert "2 problems" in result.stderr
    assert "job.yaml:10 stages[0].compressors[0].config_list[0].sparse_ratio" in result.stderr
    assert "job.yaml:12 training.epochs" in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""


def test_what_the_model_lacks_is_told_with_its_line(job: Path, tmp_path: Path) -> None:
    text = JOB.replace("task.py:Task", "tests.contracts.tiny:Tiny").replace("[conv]", "[convv]")
    job.write_text(f"{text}storage: {{uri: '{tmp_path}'}}\n")
    where = "stages[0].compressors[0].config_list[0].op_names"
    for command in ("validate", "run"):
        result = _invoke(command, job)
        assert result.exit_code == 2
        assert f"job.yaml:9 {where}" in result.stderr and "'convv'" in result.stderr
        assert "      did you mean 'conv'?" in result.stderr.splitlines()
    with pytest.raises(ConfigError) as caught:
        CompressionJob(job).validate()
    assert caught.value.problems[0].where.startswith(f"{job}:9 {where}")


def test_validate_says_what_is_right(job: Path, fake_job: type[FakeJob]) -> None:
    result = _invoke("validate", job)
    assert result.exit_code == 0
    assert result.stdout == f"stage prune: fc will be masked\n{job} is right: prune: L1NormPruner\n"


def test_other_errors_are_told_in_lines_and_end_with_1(job: Path, fake_job: type[FakeJob]) -> None:
    fake_job.error = TaskError("train_data() raised ValueError: no [digits]", where="task.py:12", remedy="mend it")
    result = _invoke("run", job)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == [
        "error task.py:12: train_data() raised ValueError: no [digits]",
        "      mend it",
    ]


def test_debug_shows_the_traceback(job: Path, fake_job: type[FakeJob]) -> None:
    fake_job.error = TaskError("it broke")
    assert isinstance(_invoke("--debug", "run", job).exception, TaskError)
    assert isinstance(_invoke("run", job).exception, SystemExit)


def _stored(folder: Path, figures: dict[str, Any]) -> str:
    files = folder / "files"
    files.mkdir()
    (files / "model.onnx").write_bytes(b"0" * 2500)
    fields = {"job": "digits-fused", "run": "r1", "created": "2026-01-02T03:04:05+00:00", "figures": figures}
    return publish(open_store(str(folder / "store")), "r1", files, fields).uri


def test_show_lists_figures_and_files(tmp_path: Path) -> None:
    uri = _stored(tmp_path, summary().figures())
    result = _invoke("show", uri)
    assert result.exit_code == 0, result.output
    for shown in ("sped-up", "12.5×", "within the tolerance", "warning: the loader", "model.onnx", "2.50 kB"):
        assert shown in result.stdout
    assert f"load    import raycomp; model = raycomp.load({uri!r})" in result.stdout.splitlines()


def test_show_tells_how_near_int8_is_and_what_speaks_against_it(tmp_path: Path) -> None:
    int8 = summary().int8
    assert int8 is not None
    result = _invoke("show", _stored(tmp_path, replace(summary(), int8=replace(int8, sqnr_db=4.5)).figures()))
    assert "int8 against simulated: SQNR 4.5 dB; accuracy −0.001." in result.stdout
    assert "warning: the int8 model's outputs are not those of the simulated quantization: SQNR 4.5 dB" in result.stdout


def test_show_takes_an_artifact_without_figures(tmp_path: Path) -> None:
    result = _invoke("show", _stored(tmp_path, {}))
    assert result.exit_code == 0 and "digits-fused  r1" in result.stdout and "model.onnx" in result.stdout


def test_show_of_nothing_is_an_error(tmp_path: Path) -> None:
    result = _invoke("show", tmp_path)
    assert result.exit_code == 1
    assert "there is no artifact" in result.stderr


def test_export_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def export(uri: str, form: str, directory: Path) -> tuple[Path, ...]:
        asked.extend((uri, form, directory))
        return (directory / "model.onnx", directory / "int8.onnx")

    monkeypatch.setattr("raycomp.pipeline.ending.load.export", export)
    result = _invoke("export", "s3://b/a", "--to", "onnx", tmp_path)
    assert result.stdout.splitlines() == [str(tmp_path / "model.onnx"), str(tmp_path / "int8.onnx")]
    assert asked == ["s3://b/a", "onnx", tmp_path]
    assert _invoke("export", "s3://b/a", "--to", "pickle", tmp_path).exit_code == 2


@pytest.mark.parametrize(("failed", "exit_code"), [(1, 0), (2, 1)])
def test_sweep_prints_its_table_and_fails_where_all_trials_do(
    failed: int, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_sweep(path: Path, *, resume: bool, progress: object, resume_with: str) -> SimpleNamespace:
        table = Text(f"front of {path.name}, {resume}")
        return SimpleNamespace(
            table=lambda: table, uri="there", report_path="there/report.html", rows=[0, 1], failed=[0, 1][:failed]
        )

    monkeypatch.setitem(sys.modules, "raycomp.tune", SimpleNamespace(sweep=run_sweep))
    result = _invoke("sweep", tmp_path / "sweep.yaml", "--resume")
    assert result.stdout == "front of sweep.yaml, True\nsweep     there\nreport    there/report.html\n"
    assert result.exit_code == exit_code


def test_schema_is_one_that_takes_the_job_and_refuses_a_wrong_one() -> None:
    result = _invoke("schema")
    validator = jsonschema.Draft202012Validator(json.loads(result.stdout))
    job = yaml.safe_load(JOB)
    validator.validate(job)
    assert not validator.is_valid({**job, "trainin": {}})


class Cluster:
    """Stands in for Ray Jobs between `submit` and a cluster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, end: jobs.Outcome | BaseException) -> None:
        self.sent: list[jobs.Submission] = []
        self.address = ""

        @contextmanager
        def client(address: str) -> Iterator[str]:
            self.address = address
            yield "client"

        def send(client: str, plan: jobs.Submission) -> str:
            self.sent.append(plan)
            return "small-1"

        def follow(client: str, submission: str, write: Any) -> jobs.Outcome:
            write("a line of the log\n")
            if isinstance(end, BaseException):
                raise end
            return end

        for name, fake in (("jobs_client", client), ("send", send), ("follow", follow)):
            monkeypatch.setattr(jobs, name, fake)


SUBMIT = ("--address", "http://127.0.0.1:8265", "--set", "storage.uri=s3://bucket/x")


def test_submit_follows_and_ends_with_the_jobs_code(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, jobs.Outcome(3, "the job ended with exit code 3"))
    result = _invoke("submit", job, *SUBMIT, "--working-dir", job.parent, "--resume")
    assert result.exit_code == 3
    assert result.stdout == "a line of the log\n"
    assert "submitted small-1" in result.stderr and "error small-1: the job ended with exit code 3" in result.stderr
    assert cluster.address == "http://127.0.0.1:8265"
    assert cluster.sent[0].entrypoint == "python -m raycomp run job.yaml --resume --set storage.uri=s3://bucket/x"


def test_submit_of_a_job_that_succeeds_ends_with_0(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, jobs.Outcome(0))
    assert _invoke("submit", job, *SUBMIT, "--working-dir", job.parent).exit_code == 0


def test_submit_without_following_gives_the_id(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, AssertionError("must not be followed"))
    result = _invoke("submit", job, *SUBMIT, "--working-dir", job.parent, "--no-follow")
    assert (result.exit_code, result.stdout) == (0, "small-1\n")


def test_an_interrupted_submit_says_that_the_job_goes_on(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, KeyboardInterrupt())
    result = _invoke("submit", job, *SUBMIT, "--working-dir", job.parent)
    assert result.exit_code == 130
    assert "the job goes on" in result.stderr
    assert "ray job logs --follow --address http://127.0.0.1:8265 small-1" in result.stderr


@pytest.mark.parametrize(("error", "code"), [(ClusterError("gone"), 1), (ArtifactError("broken"), 1)])
def test_errors_of_the_cluster_end_with_1(
    job: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    Cluster(monkeypatch, error)
    result = _invoke("submit", job, *SUBMIT, "--working-dir", job.parent)
    assert result.exit_code == code and str(error) in result.stderr


def test_submit_of_a_relative_storage_is_refused_before_the_cluster(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, jobs.Outcome(0))
    result = _invoke("submit", job, *SUBMIT[:2], "--working-dir", job.parent)
    assert result.exit_code == 2 and cluster.sent == [] and cluster.address == ""


@pytest.mark.parametrize("command", [["-m", "raycomp", "run"], ["jobs/compress.py"], ["jobs/sweep.py"]])
def test_entry_points_run_as_programs(command: list[str], tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, *command, "--help"], cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout and ("JOB" in result.stdout or "SWEEP" in result.stdout)


def test_the_command_line_starts_without_torch_and_ray() -> None:
    code = "import sys, raycomp.cli; print([name for name in ('torch', 'ray') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.stdout == "[]\n", result.stderr


def test_stored_runs_are_listed_as_a_shell_takes_them(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "my store"))
    files = tmp_path / "files"
    files.mkdir()
    (files / "report.html").write_text("<p>report</p>")
    fields = {"job": "small", "run": "1", "lineage": {}, "versions": {}, "figures": {}}
    uri = publish(store.join("small", "artifacts"), "1", files, fields).uri
    sweep = store.join("small", "sweeps", "s1")
    of_trial = publish(sweep.join("jobs", "small-t1", "artifacts"), "2", files, fields).uri
    assert _invoke("list", sweep.uri).stdout.startswith(f"'{of_trial}'  20")
    for command, place in (("list", store.uri), ("list", f"{store.uri}/small"), ("show", f"{store.uri}/small")):
        result = _invoke(command, place)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"'{uri}'  20")
    own = _invoke("list", uri)
    assert own.stdout.startswith(f"'{uri}'  20") and own.stdout.count("\n") == 1
    assert own.stderr == f"this is a stored run itself; what it holds: raycomp show '{uri}'\n"
    assert _invoke("list", tmp_path / "files").exit_code == 1
    assert _invoke("export", uri, "--to", "report", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "report.html").read_text() == "<p>report</p>"


@pytest.fixture
def small_artifact(tmp_path: Path) -> str:
    files = tmp_path / "made"
    files.mkdir()
    (files / "report.html").write_text("<p>report</p>")
    fields = {"job": "small", "run": "1", "lineage": {}, "versions": {}, "figures": {}}
    return publish(open_store(str(tmp_path / "store")), "1", files, fields).uri


def _exported_to(uri: str, target: Path | str) -> str:
    """What is told of a target that can't be written, in words alone."""
    result = _invoke("export", uri, "--to", "report", target)
    assert result.exit_code == 1 and uri not in result.stderr and "damaged" not in result.stderr
    return " ".join(result.stderr.split())


def test_a_target_that_can_t_be_made_is_told_and_not_the_artifact(small_artifact: str, tmp_path: Path) -> None:
    told = _exported_to(small_artifact, "/proc/x")
    assert told.startswith("error /proc/x: it can't be written: ") and "choose" in told
    (tmp_path / "file").write_text("")
    told = _exported_to(small_artifact, tmp_path / "file" / "out")
    assert (
        told
        == f"error {tmp_path}/file/out: it can't be written: a file is where a folder should be choose another folder"
    )
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    assert f"{tmp_path}/out/report.html: it can't be written: a folder is where a file" in _exported_to(
        small_artifact, tmp_path / "out"
    )
    assert _invoke("export", small_artifact, "--to", "report", tmp_path / "a" / "b" / "c").exit_code == 0


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "the disk is full make room, or choose another disk"),
        (errno.EROFS, "the file system is read-only choose a folder that you may write"),
        (errno.EACCES, "permission denied choose a folder that you may write"),
        (errno.EIO, "[Errno 5] Input/output error choose a folder that you may write"),
    ],
)
def test_a_target_that_fails_while_it_is_written_is_told_and_left_empty(
    number: int, told: str, small_artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(_source: Path, target: Path) -> None:
        target.write_text("half of it")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("shutil.copy", copy)
    assert (
        _exported_to(small_artifact, tmp_path / "out")
        == f"error {tmp_path}/out/report.html: it can't be written: {told}"
    )
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_artifact_is_told_as_the_artifact(small_artifact: str, tmp_path: Path) -> None:
    (Path(small_artifact) / "report.html").write_text("<p>rapport</p>")
    result = _invoke("export", small_artifact, "--to", "report", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.startswith(f"error {small_artifact}: 'report.html' is not what was")


def test_the_schema_of_sweeps_is_printed() -> None:
    schema = json.loads(_invoke("schema", "--sweep").stdout)
    jsonschema.validate({"job": "job.yaml", "search": {"training.seed": {"grid": [0, 1]}}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"job": "job.yaml", "search": {}}, schema)
