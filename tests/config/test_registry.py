"""The register of algorithms: what one registration ties together, and what comes of it."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any, Literal

import pytest

from raycomp import distillation, pruning, quantization
from raycomp.config import COMPRESSORS, CompressorSettings, Need, PruneEntry, job_schema
from raycomp.config.compressors import L1NormPrunerConfig, PrunerSettings, ScheduleSettings, TaylorPrunerConfig
from raycomp.config.registry import compressor

ENTRY = PruneEntry(op_types=("Conv2d",), sparse_ratio=0.5)


def test_a_registration_ties_settings_class_kind_and_needs() -> None:
    taylor = COMPRESSORS["TaylorPruner"]
    assert taylor.settings is TaylorPrunerConfig
    assert (taylor.name, taylor.kind, taylor.schedulable) == ("TaylorPruner", "pruner", True)
    assert taylor.needs == {Need.TRAINING}
    assert taylor.load() is pruning.taylor.TaylorPruner
    assert TaylorPrunerConfig(config_list=(ENTRY,), training_steps=2).registration is taylor
    assert COMPRESSORS["DynamicLayerwiseDistiller"].needs == {Need.TRAINING, Need.TEACHER}


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("L1NormPruner", set()),
        ("SlimPruner", {Need.TRAINING}),
        ("LotteryTicketPruner", {Need.TRAINING, Need.ROUNDS}),
        ("PtqQuantizer", {Need.CALIBRATION}),
        ("Adaptive1dLayerwiseDistiller", {Need.TRAINING, Need.TEACHER}),
    ],
)
def test_what_algorithms_need(name: str, needs: set[Need]) -> None:
    assert COMPRESSORS[name].needs == needs


def test_a_name_is_registered_once() -> None:
    class Again(PrunerSettings):
        type: Literal["L1NormPruner"] = "L1NormPruner"

    with pytest.raises(
        ValueError, match=r"'L1NormPruner': raycomp\.pruning\.l1_norm:L1NormPruner and other:L1NormPruner"
    ):
        compressor("other:L1NormPruner")(Again)
    assert COMPRESSORS["L1NormPruner"].settings is L1NormPrunerConfig


def test_a_type_is_the_name_of_the_class() -> None:
    class Odd(PrunerSettings):
        type: Literal["Odd"] = "Odd"

    with pytest.raises(AssertionError, match=r"Odd\.type is not 'Even'"):
        compressor("other:Even")(Odd)


@pytest.mark.parametrize("abstract", [CompressorSettings, PrunerSettings, ScheduleSettings])
def test_settings_of_no_algorithm_are_abstract(abstract: type[CompressorSettings]) -> None:
    values: dict[str, Any] = {
        "type": "X",
        "config_list": (ENTRY,),
        "pruner": L1NormPrunerConfig(config_list=(ENTRY,)),
        "interval_steps": 1,
        "total_times": 1,
    }
    given = {key: value for key, value in values.items() if key in abstract.model_fields}
    with pytest.raises(TypeError, match=f"abstract class {abstract.__name__}"):
        abstract(**given)
    with pytest.raises(TypeError, match=f"abstract class {abstract.__name__}"):
        abstract.model_validate(given)


@pytest.mark.parametrize(
    ("package", "base"), [(pruning, "Pruner"), (quantization, "Quantizer"), (distillation, "LayerwiseDistiller")]
)
def test_packages_export_their_algorithms(package: ModuleType, base: str) -> None:
    kind = base.lower().removeprefix("layerwise")
    assert sorted(package.__all__) == sorted([base, *(name for name in COMPRESSORS if COMPRESSORS[name].kind == kind)])
    assert dir(package) == sorted(package.__all__)


def test_a_misspelt_algorithm_names_the_nearest_or_all() -> None:
    with pytest.raises(AttributeError, match=r"'raycomp\.pruning' has no attribute 'TailorPruner' .*'TaylorPruner'"):
        _ = pruning.TailorPruner
    with pytest.raises(AttributeError, match="choose from Quantizer, QATQuantizer"):
        _ = quantization.unheard
    with pytest.raises(ImportError, match=r"write from raycomp\.quantization import QATQuantizer"):
        _ = pruning.QATQuantizer


def test_an_algorithm_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, raycomp.pruning; seen = 'raycomp.pruning.taylor' in sys.modules;"
        "from raycomp.pruning import TaylorPruner; print(seen, TaylorPruner.__module__)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "raycomp.pruning.taylor"]


def test_the_schema_holds_every_algorithm_and_what_goes_under_a_schedule() -> None:
    definitions = job_schema()["$defs"]
    compressors = definitions["StageConfig"]["properties"]["compressors"]["items"]
    assert compressors["discriminator"]["mapping"].keys() == COMPRESSORS.keys()
    under = definitions["AGPPrunerConfig"]["properties"]["pruner"]
    assert under["discriminator"]["mapping"].keys() == {name for name in COMPRESSORS if COMPRESSORS[name].schedulable}
