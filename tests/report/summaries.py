"""A summary such as a fused run leaves, with figures that tests can work out by hand."""

from __future__ import annotations

import math

from raycomp.results.progress import ProgressEvent
from raycomp.results.summary import (
    Int8Figures,
    LayerFigures,
    ModelFigures,
    RunSummary,
    TrialFigures,
    Unpruned,
    Verification,
)

JOB = """\
name: digits-fused
task: {entrypoint: "digits.py:Digits"}
training: {epochs: 4, global_batch_size: 128, seed: 7}
stages:
  - name: prune
    compressors:
      - type: AGPPruner
        interval_steps: 10
        total_times: 5
        pruner: {type: TaylorPruner, training_steps: 10, config_list: [{op_types: [Conv2d], sparse_ratio: 0.5}]}
      - {type: QATQuantizer, config_list: [{op_types: [Conv2d], target_settings: {weight: {quant_dtype: int8}}}]}
  - name: distil
    compressors:
      - {type: DynamicLayerwiseDistiller, config_list: [{op_types: [Linear]}]}
"""


def history() -> tuple[ProgressEvent, ...]:
    events = []
    for index, stage in enumerate(("prune", "distil")):
        for step in range(5, 101, 5):
            done = step + 100 * index
            loss = math.nan if done == 50 else 2.3 * math.exp(-done / 40) + 0.1 + 0.03 * math.sin(done)
            metrics = {"accuracy": 1 - 0.8 * math.exp(-done / 30)} if step % 50 == 0 else {}
            events.append(
                ProgressEvent(
                    stage, (step + 49) // 50, 2, step, 100, loss, metrics, min(0.5, done / 160), 2, done * 0.3
                )
            )
    return tuple(events)


def summary() -> RunSummary:
    return RunSummary(
        job="digits-fused",
        run="20260102-030405-ab12",
        created="2026-01-02T03:04:05Z",
        models=(
            ModelFigures("dense", {"accuracy": 0.99}, 80_000, 4_000_000, 400_000, {"1": 0.0008, "32": 0.010}),
            ModelFigures("simulated", {"accuracy": 0.985}, 80_000, 4_000_000, 400_000, {"1": 0.0016, "32": 0.020}),
            ModelFigures("sped-up", {"accuracy": 0.985}, 20_000, 1_000_000, 100_000, {"1": 0.0004, "32": 0.004}),
            ModelFigures("int8", {"accuracy": 0.984}, 20_000, 1_000_000, 32_000, {"1": 0.0002, "32": 0.002}),
        ),
        verification=Verification(3e-6, 20.0, 1.5e-7, 1e-4, (1, 8), True),
        int8=Int8Figures(38.25, -0.001, 20_000, 80_000, False, True, layers=4),
        layers=(
            LayerFigures("stem.conv", "Conv2d", (16, 1, 3, 3), (8, 1, 3, 3), 0.5, "int8"),
            LayerFigures("block1.residual.0.conv1", "Conv2d", (32, 16, 3, 3), (15, 8, 3, 3), 0.53, "int8"),
            LayerFigures("up", "ConvTranspose2d", (32, 24, 2, 2), (15, 12, 2, 2), 0.5),
            LayerFigures("head", "Linear", (10, 64), (10, 32), 0.0),
        ),
        unpruned=(Unpruned("block2.norm", 0, 3, "a padded convolution reads its constant <0.25>"),),
        history=history(),
        timings={"start Ray": 8.1, "build the task": 2.25, "train": 63.0, "speedup": 1.9, "publish": 0.75},
        environment={"Python": "3.11.7", "torch": "2.13.0", "Ray": "2.60.0", "processor": "a & b <c>, 2 threads"},
        warnings=("the loader is the user's own: batches depend on the number of workers",),
        config_yaml=JOB,
        artifact_uri="s3://models/digits-fused/artifacts/20260102-030405-ab12",
    )


def trials() -> tuple[TrialFigures, ...]:
    key = "stages.0.compressors.0.pruner.config_list.0.sparse_ratio"
    return (
        TrialFigures("t1", {key: 0.25, "training.seed": 0}, 0.99, 3_000_000, 90_000, True, "artifacts/t1"),
        TrialFigures("t2", {key: 0.5, "training.seed": 0}, 0.98, 1_000_000, 40_000, True, "artifacts/t2"),
        TrialFigures("t3", {key: 0.5, "training.seed": 1}, 0.97, 1_500_000, 45_000, False, "artifacts/t3"),
        TrialFigures("t4", {key: 0.9, "training.seed": 0}, None, None, error="loss is not finite at step 12"),
    )
