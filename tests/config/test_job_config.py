"""The settings of a job: defaults, what belongs together, round trips, and the same from Python."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from raycomp.config import (
    COMPRESSORS,
    Int8Config,
    JobConfig,
    PruneEntry,
    QuantizeEntry,
    ScalingConfig,
    StageConfig,
    StorageConfig,
    TaskConfig,
    TrainingConfig,
    TrainingOverrides,
    load_job,
    parse_job,
)
from raycomp.config.compressors import AGPPrunerConfig, L1NormPrunerConfig, QATQuantizerConfig, TaylorPrunerConfig
from raycomp.errors import ConfigError, Problem

PRUNER = {"type": "L1NormPruner", "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]}
QUANTIZER = {"type": "QATQuantizer", "config_list": [{"op_types": ["Conv2d"]}]}


def job(**changes: Any) -> dict[str, Any]:
    return {
        "name": "digits",
        "task": {"entrypoint": "task.py:Digits"},
        "training": {"epochs": 3},
        "stages": [{"name": "prune", "compressors": [PRUNER]}],
        **changes,
    }


def problems(**changes: Any) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse_job(job(**changes))
    return list(caught.value.problems)


def test_defaults() -> None:
    parsed = parse_job(job())
    training = parsed.training
    assert (training.global_batch_size, training.epochs, training.steps, training.seed) == (128, 3, None, 0)
    assert (training.precision, training.gradient_accumulation, training.sync_batch_norm) == ("float32", 1, False)
    assert (training.checkpoint_every_epochs, training.num_data_workers) == (1, 0)
    scaling = parsed.scaling
    assert (scaling.num_workers, scaling.resources_per_worker, scaling.use_gpu) == (1, {"CPU": 1.0}, "auto")
    assert (scaling.threads_per_worker, scaling.max_failures) == (1, 3)
    assert (parsed.storage.uri, parsed.storage.endpoint, parsed.storage.region) == ("artifacts", None, None)
    speedup = parsed.speedup
    assert (speedup.enabled, speedup.exact, speedup.align, speedup.dependency_groups) == (True, True, True, True)
    assert speedup.tolerance == 1e-4
    assert (parsed.int8.enabled, parsed.int8.reduce_range) == ("auto", "auto")
    evaluation = parsed.evaluation
    assert (evaluation.batch_size, evaluation.max_samples) == (256, None)
    assert (evaluation.latency_batch_size, evaluation.latency_runs) == (32, 50)
    assert (parsed.cluster.address, parsed.cluster.num_cpus) == (None, None)
    assert parsed.stages[0].speedup is True


def test_python_objects_are_the_same_job() -> None:
    built = JobConfig(
        name="digits",
        task=TaskConfig(entrypoint="task.py:Digits"),
        training=TrainingConfig(epochs=3),
        stages=(
            StageConfig(
                name="prune",
                compressors=(L1NormPrunerConfig(config_list=(PruneEntry(op_types=("Conv2d",), sparse_ratio=0.5),)),),
            ),
        ),
    )
    assert built == parse_job(job())
    assert built.digest() == parse_job(job()).digest()


def test_construction_in_python_raises_every_problem_at_once() -> None:
    wrong: dict[str, Any] = {"epoch": 3, "seed": "x"}
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**wrong)
    assert [problem.where for problem in caught.value.problems] == [
        "TrainingConfig.seed",
        "TrainingConfig.epoch",
        "TrainingConfig",
    ]


def test_nested_wrong_values_do_not_hide_each_other() -> None:
    found = problems(name="my job", training={"epochs": "three"}, scaling={"num_workers": 0}, evaluation={"batch": 1})
    assert [problem.where for problem in found] == [
        "job.name",
        "job.training.epochs",
        "job.scaling.num_workers",
        "job.evaluation.batch",
    ]


@pytest.mark.parametrize(
    ("training", "where"),
    [
        ({}, "job.training"),
        ({"epochs": 1, "steps": 5}, "job.training.steps"),
        ({"epochs": 1, "global_batch_size": 10, "gradient_accumulation": 4}, "job.training.gradient_accumulation"),
        ({"epochs": 1, "precision": "fp16"}, "job.training.precision"),
        ({"epochs": 1, "sync_batch_norm": "yes"}, "job.training.sync_batch_norm"),
        ({"epochs": 1.0}, "job.training.epochs"),
        ({"epochs": True}, "job.training.epochs"),
        ({"epochs": 0}, "job.training.epochs"),
        ({"steps": 5, "seed": -1}, "job.training.seed"),
    ],
)
def test_training_refuses(training: dict[str, Any], where: str) -> None:
    assert [problem.where for problem in problems(training=training)] == [where]


def test_training_is_needed() -> None:
    incomplete = job()
    del incomplete["training"]
    with pytest.raises(ConfigError, match=r"job\.training: the key 'training' is missing"):
        parse_job(incomplete)


def test_a_stage_overrides_training() -> None:
    stages = [
        {"name": "a", "compressors": [PRUNER], "training": {"steps": 7, "precision": "bf16"}},
        {"name": "b", "compressors": [PRUNER]},
        {"name": "c", "compressors": [PRUNER], "training": {"global_batch_size": 64}},
    ]
    parsed = parse_job(job(stages=stages, training={"epochs": 3, "seed": 5}))
    first, second, third = (parsed.training_for(stage) for stage in parsed.stages)
    assert (first.steps, first.epochs, first.precision, first.seed) == (7, None, "bf16", 5)
    assert second == parsed.training
    assert (third.epochs, third.global_batch_size) == (3, 64)


def test_overrides_cover_every_key_of_training() -> None:
    assert set(TrainingOverrides.model_fields) == set(TrainingConfig.model_fields)


def test_an_override_that_does_not_fit_the_job_is_refused_in_the_stage() -> None:
    stage = {"name": "a", "compressors": [PRUNER], "training": {"global_batch_size": 30}}
    found = problems(stages=[stage], training={"epochs": 1, "gradient_accumulation": 4})
    assert [str(problem) for problem in found] == [
        "job.stages[0].training: a global batch of 30 samples does not split into 4 equal micro-batches "
        "(gradient_accumulation should divide 30)"
    ]


def test_stage_names_are_unique_even_where_stages_are_wrong() -> None:
    stage = {"name": "a", "compressors": [{"type": "L1NormPruner"}]}
    assert [p.where for p in problems(stages=[stage, stage])] == [
        "job.stages[0].compressors[0].config_list",
        "job.stages[1].compressors[0].config_list",
        "job.stages[1].name",
    ]


@pytest.mark.parametrize("compressor", [{"type": "Unheard"}, {"type": 3}, {"type": ["x"]}, {}])
def test_an_unknown_compressor_lists_the_choices_and_is_judged_by_none_of_them(compressor: dict[str, Any]) -> None:
    (problem,) = problems(stages=[{"name": "a", "compressors": [{**compressor, "total_times": 0}]}])
    assert problem.where == "job.stages[0].compressors[0].type"
    assert problem.message == (
        f"there is no {str(compressor['type'])!r}" if compressor else "the key 'type' is missing"
    )
    assert problem.remedy == f"choose from {', '.join(COMPRESSORS)}"


def test_a_misspelt_compressor_names_the_nearest_one() -> None:
    compressor = {"type": "AGPPrunner", "interval_steps": 0}
    (problem,) = problems(stages=[{"name": "a", "compressors": [compressor]}])
    assert (problem.where, problem.message, problem.remedy) == (
        "job.stages[0].compressors[0].type",
        "there is no 'AGPPrunner'",
        f"did you mean 'AGPPruner'? There are {', '.join(COMPRESSORS)}",
    )


@pytest.mark.parametrize("inner", ["AGPPruner", "LotteryTicketPruner", "QATQuantizer"])
def test_a_schedule_goes_around_schedulable_pruners_alone(inner: str) -> None:
    schedule = {"type": "LinearPruner", "interval_steps": 2, "total_times": 3, "pruner": {**PRUNER, "type": inner}}
    (problem,) = problems(stages=[{"name": "a", "compressors": [schedule]}])
    assert problem.where == "job.stages[0].compressors[0].pruner.type"
    assert inner not in problem.remedy


@pytest.mark.parametrize("compressor", [None, "L1NormPruner", 3])
def test_a_compressor_is_a_mapping(compressor: object) -> None:
    (problem,) = problems(stages=[{"name": "a", "compressors": [compressor]}])
    assert problem.where == "job.stages[0].compressors[0]"
    assert problem.remedy == "should be a mapping of keys to values"


def test_a_pruner_under_a_schedule_has_time_to_gather() -> None:
    taylor = {**PRUNER, "type": "TaylorPruner", "training_steps": 30}
    schedule = {"type": "LinearPruner", "pruner": taylor, "interval_steps": 20, "total_times": 3}
    (problem,) = problems(stages=[{"name": "a", "compressors": [schedule]}])
    assert problem.where == "job.stages[0].compressors[0].pruner.training_steps"
    assert problem.remedy == "should be at most interval_steps, 20"
    schedule["interval_steps"] = 30
    parsed = parse_job(job(stages=[{"name": "a", "compressors": [schedule]}]))
    assert parsed.stages[0].compressors[0].kind == "pruner"


SLIM = {**PRUNER, "type": "SlimPruner", "training_steps": 30}


@pytest.mark.parametrize(
    ("compressor", "least_steps", "defaults"),
    [
        (SLIM, 30, {"regular_scale": 1.0}),
        ({"type": "LotteryTicketPruner", "pruner": SLIM, "total_iteration": 4}, 30, {"reset_weight": True}),
        ({"type": "LotteryTicketPruner", "pruner": PRUNER, "total_iteration": 4}, 0, {}),
        ({"type": "LinearPruner", "pruner": SLIM, "interval_steps": 30, "total_times": 2}, 60, {}),
        ({**QUANTIZER, "type": "PtqQuantizer"}, 0, {"calibration_steps": None}),
        (
            {"type": "Adaptive1dLayerwiseDistiller", "config_list": [{"op_names": ["fc"], "lambda": 0.5}]},
            0,
            {"origin_loss_lambda": 1.0},
        ),
    ],
)
def test_compressors_say_how_long_they_need(
    compressor: dict[str, Any], least_steps: int, defaults: dict[str, Any]
) -> None:
    parsed = parse_job(job(stages=[{"name": "a", "compressors": [compressor]}]))
    (settings,) = parsed.stages[0].compressors
    assert (settings.type, settings.least_steps) == (compressor["type"], least_steps)
    assert {key: getattr(settings, key) for key in defaults} == defaults
    assert parse_job(parsed.model_dump(mode="json")) == parsed


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({**SLIM, "regular_scale": -1.0}, "regular_scale"),
        ({**SLIM, "training_steps": 0}, "training_steps"),
        ({"type": "LotteryTicketPruner", "pruner": SLIM, "total_iteration": 0}, "total_iteration"),
        ({"type": "LotteryTicketPruner", "pruner": SLIM, "total_iteration": 2, "interval_steps": 9}, "interval_steps"),
        ({**QUANTIZER, "type": "PtqQuantizer", "calibration_steps": 0}, "calibration_steps"),
    ],
)
def test_compressors_refuse(wrong: dict[str, Any], where: str) -> None:
    (problem,) = problems(stages=[{"name": "a", "compressors": [wrong]}])
    assert problem.where == f"job.stages[0].compressors[0].{where}"


@pytest.mark.parametrize("entrypoint", ["task.py", "task:", ":Task", "a b:Task", "pkg.mod:Task()", "task.py:1T", ""])
def test_an_entrypoint_names_a_class(entrypoint: str) -> None:
    (problem,) = problems(task={"entrypoint": entrypoint})
    assert problem.where == "job.task.entrypoint"


@pytest.mark.parametrize("entrypoint", ["pkg.module:Task", "task:Task", "task.py:Task", "../my tasks/task.py:Task"])
def test_entrypoints(entrypoint: str) -> None:
    assert parse_job(job(task={"entrypoint": entrypoint})).task.entrypoint == entrypoint


def test_task_arguments_are_plain_data() -> None:
    arguments = {"width": 16, "layers": [1, {"a": None}], "rate": 0.5}
    assert parse_job(job(task={"entrypoint": "t:T", "arguments": arguments})).task.arguments == arguments
    (problem,) = problems(task={"entrypoint": "t:T", "arguments": {"device": object()}})
    assert problem.where == "job.task.arguments.device"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://KEY:VERYSECRET@bucket/x", "credentials"),
        ("s3://bucket/x?secret_key=VERYSECRET", "credentials"),
        ("s4://bucket/x", "s4"),
        ("s3:///x", "no bucket"),
        ("s3://bucket/x?regoin=eu", "regoin"),
        ("s3://bucket/x?endpoint_override=http://u:VERYSECRET@host", "credentials"),
        ("s3://bucket/x?secretkye=VERYSECRET", "credentials"),
        ("s3://bucket/x?pwd=VERYSECRET", "unknown option 'pwd'"),
        ("s3://bucket:99999999/x", "no bucket's name"),
        ("s3://[::1/x", "Invalid IPv6 URL"),
        ("s3:/bucket/x", "neither a URI nor a folder"),
        ("FILE:x", "neither a URI nor a folder"),
        ("", "''"),
    ],
)
def test_storage_uris_refused(uri: str, told: str) -> None:
    (problem,) = problems(storage={"uri": uri})
    assert problem.where == "job.storage.uri"
    assert told in problem.message
    assert "VERYSECRET" not in str(problem)


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:80", "s3://host", "http://", "http://u:VERYSECRET@host", "http://h/path", "http://[::1"]
)
def test_endpoints_refused(endpoint: str) -> None:
    (problem,) = problems(storage={"uri": "s3://bucket", "endpoint": endpoint})
    assert problem.where == "job.storage.endpoint"
    assert "VERYSECRET" not in str(problem)


def test_an_endpoint_needs_an_s3_uri_and_stands_once() -> None:
    (problem,) = problems(storage={"uri": "folder", "endpoint": "http://h:1"})
    assert "s3://" in problem.message
    twice = {"uri": "s3://b/x?endpoint_override=h:1&scheme=http&region=eu", "endpoint": "http://h:1", "region": "eu"}
    assert [p.where for p in problems(storage=twice)] == ["job.storage.endpoint", "job.storage.region"]
    StorageConfig(uri="s3://b/x?endpoint_override=h:1&scheme=http", region="eu")


def test_gpus_can_not_be_asked_for_and_refused() -> None:
    with pytest.raises(ConfigError, match=r"resources_per_worker\.GPU"):
        ScalingConfig(use_gpu=False, resources_per_worker={"CPU": 1, "GPU": 1})
    ScalingConfig(use_gpu=False, resources_per_worker={"CPU": 1, "GPU": 0})


def test_conflicts_are_found_between_objects_as_well() -> None:
    pruner = L1NormPrunerConfig(config_list=(PruneEntry(op_types=("Conv2d",), sparse_ratio=0.5),))
    quantizer = QATQuantizerConfig(config_list=(QuantizeEntry(op_types=("Conv2d",)),))
    task, training = TaskConfig(entrypoint="task:Task"), TrainingConfig(epochs=1, gradient_accumulation=4)
    first = StageConfig(name="a", compressors=(pruner, quantizer), training=TrainingOverrides(precision="bf16"))
    JobConfig(name="x", task=task, training=training, stages=(first,), int8=Int8Config(enabled=True))
    second = StageConfig(name="a", compressors=(pruner,), training=TrainingOverrides(global_batch_size=6))
    with pytest.raises(ConfigError) as caught:
        JobConfig(name="x", task=task, training=training, stages=(first, second))
    assert [(problem.where, problem.remedy) for problem in caught.value.problems] == [
        ("JobConfig.stages[1].name", "names are unique"),
        ("JobConfig.stages[1].training.gradient_accumulation", "gradient_accumulation should divide 6"),
    ]
    with pytest.raises(ConfigError, match="no stage has a quantizer"):
        JobConfig(
            name="x",
            task=task,
            training=training,
            stages=(StageConfig(name="a", compressors=(pruner,)),),
            int8=Int8Config(enabled=True),
        )
    taylor = TaylorPrunerConfig(config_list=pruner.config_list, training_steps=3)
    with pytest.raises(ConfigError, match="do not fit between two decisions"):
        AGPPrunerConfig(pruner=taylor, interval_steps=2, total_times=1)


def test_int8_needs_a_quantizer() -> None:
    assert [problem.where for problem in problems(int8={"enabled": True})] == ["job.int8.enabled"]
    quantized = [{"name": "a", "compressors": [PRUNER, QUANTIZER]}]
    assert not parse_job(job()).wants_int8
    assert parse_job(job(stages=quantized)).wants_int8
    assert parse_job(job(stages=quantized, int8={"enabled": True})).wants_int8
    assert not parse_job(job(stages=quantized, int8={"enabled": False})).wants_int8


def test_yaml_round_trip_keeps_the_job_and_what_was_explicit(tmp_path: Any) -> None:
    texts = [
        "1e-4",
        "on",
        "no",
        "~",
        "null",
        "0o17",
        "010",
        "1_000",
        "2024-01-01",
        "12:30",
        "# x",
        "é",
        "<<",
        "",
        ".inf",
    ]
    stages = [
        {
            "name": "a",
            "training": {"steps": 3},
            "compressors": [
                {"type": "AGPPruner", "interval_steps": 4, "total_times": 2, "pruner": PRUNER},
                {
                    "type": "QATQuantizer",
                    "config_list": [
                        {
                            "op_names": [text for text in texts if text],
                            "granularity": [[2, 2], "front", 1],
                            "target_settings": {"weight": {"quant_dtype": "int4"}},
                            "fuse_names": [["c", "b"]],
                        }
                    ],
                },
                {"type": "DynamicLayerwiseDistiller", "config_list": [{"op_names": ["x"], "lambda": 1e-05}]},
            ],
        }
    ]
    arguments = {"texts": texts, "numbers": [1, 1.0, 1e-07, 1e22, -0.0], "on": {"1": None}}
    parsed = parse_job(job(stages=stages, task={"entrypoint": "t:T", "arguments": arguments}))
    file = tmp_path / "job.yaml"
    file.write_text(parsed.to_yaml(), encoding="utf-8")
    again = load_job(file)
    assert again == parsed
    assert again.digest() == parsed.digest()
    assert again.to_yaml() == parsed.to_yaml()
    assert again.task.arguments["texts"] == texts
    quantizer = again.stages[0].compressors[1]
    assert isinstance(quantizer, QATQuantizerConfig)
    entry = quantizer.config_list[0]
    assert entry.settings_for("weight").model_fields_set == {"granularity", "quant_dtype"}


def test_the_digest_tells_jobs_apart() -> None:
    digests = {parse_job(job(**change)).digest() for change in ({}, {"name": "x"}, {"training": {"epochs": 4}})}
    assert len(digests) == 3
    assert parse_job(job(speedup={"exact": True})).digest() == parse_job(job()).digest()


def test_jobs_survive_pickling() -> None:
    parsed = parse_job(job())
    assert pickle.loads(pickle.dumps(parsed)) == parsed


def test_compressors_know_their_kind() -> None:
    assert (AGPPrunerConfig.kind, QATQuantizerConfig.kind) == ("pruner", "quantizer")


def test_importing_config_imports_no_torch_and_no_ray() -> None:
    code = "import sys, raycomp.config; print([m for m in ('torch', 'ray', 'numpy', 'pyarrow') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
