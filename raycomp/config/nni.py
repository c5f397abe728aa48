"""What NNI's scripts write and raycomp lacks, with what to write instead: names, arguments, attributes, config keys.

A row goes when the project gets what it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")


def trace(target: _T) -> _T:
    """The same class or function: NNI's scripts wrap their optimizers by it, raycomp takes plain ones."""
    return target


def instead_of(name: str, choices: Iterable[str]) -> str:
    """What to write instead of one of NAMES; where nothing replaces it, the choices of its kind."""
    if NAMES[name]:
        return NAMES[name]
    kind = re.findall("[A-Z][a-z]+", name)[-1]
    return f"there are {', '.join(choice for choice in choices if choice.endswith(kind))}"


def _each(rows: Mapping[str, str]) -> Mapping[str, str]:
    """Name → what to write, from what to write → names."""
    return {name: instead for instead, names in rows.items() for name in names.split()}


NAMES = _each(
    {
        "": ""
        "NetAdaptPruner "
        "TransformerHeadPruner LsqQuantizer LsqPlusQuantizer DoReFaQuantizer BNNQuantizer NaiveQuantizer",
        "write L1NormPruner": "L1FilterPruner",
        "write L2NormPruner": "L2FilterPruner",
        "write AGPPruner around a pruner": "AGP_Pruner",
        "write TaylorPruner": "TaylorFOWeightPruner TaylorFOWeightFilterPruner",
        "write QATQuantizer": "QAT_Quantizer",
        "write PtqQuantizer": "ObserverQuantizer",
        "write TorchEvaluator(training_func, optimizer, training_step), or a Task": "TransformersEvaluator "
        "LightningEvaluator DeepspeedTorchEvaluator",
        "write raycomp.register_template('pruner', class_name, ['_output_']), and align in target_settings of the "
        "config list": "PruningSetting",
        "write raycomp.register_template('quantizer', class_name, targets)": "QuantizationSetting",
        "any class can be distilled: leave it out": "DistillatoinSetting",
        "attention and modules of your own are cut through the graph: leave it out": (
            "TransformersAttentionReplacer Replacer"
        ),
        "write a subclass of raycomp.speedup.Rule, and customized_rules={operator: rule}": "MaskUpdater",
        "auto_set_dependency_group_ids finds what goes together": "ChannelDependency GroupDependency fix_mask_conflict "
        "ChannelMaskConflict GroupMaskConflict",
        "write a sweep file over sparse_ratio, and run it by raycomp sweep": "SensitivityAnalysis",
        "write from raycomp.pruning import Pruner": "Pruner",
        "write from raycomp.quantization import Quantizer": "Quantizer",
        "write from raycomp.distillation import LayerwiseDistiller": "Distiller TeacherModelBasedDistiller",
        "write from raycomp.speedup import ModelSpeedup": "ModelSpeedup",
        "write from raycomp import TorchEvaluator": "TorchEvaluator",
        "write from raycomp import auto_set_denpendency_group_ids": "auto_set_denpendency_group_ids",
        "write a subclass of raycomp.pruning.Pruner with the method saliencies": "BasicPruner DataCollector "
        "MetricsCalculator SparsityAllocator",
        "write LinearPruner, AGPPruner or LotteryTicketPruner around a pruner": "PruningScheduler IterativePruner",
        "a job makes int8.onnx; raycomp.load(uri, int8=True) runs it": "ModelSpeedupTensorRT Calibrator CalibrateType",
        "parameters and MACs stand in a job's report": "count_flops_params",
        "write pruner.update_masks(masks) and pruner.unwrap_model()": "apply_compression_results",
        "write model.get_submodule(name)": "get_module_by_name get_nested_attr",
        "write from torch.optim.lr_scheduler import LRScheduler as SCHEDULER": "SCHEDULER",
        "write a sweep file, and run it by raycomp sweep": "get_next_parameter report_intermediate_result "
        "report_final_result AutoCompressionExperiment",
    }
)
"""What is imported; with an empty text: an algorithm that nothing here replaces."""

ARGUMENTS = _each(
    {
        "write NewCompressor.from_compressor(compressor, …)": "existed_wrappers",
        "write training_func: calibration takes its batches alone; evaluating_func gives the metric": "predicting_func",
        "write training_step(batch, model), which runs the model and gives the loss": "criterion",
        "write evaluator=TorchEvaluator(training_func, optimizer, training_step)": "trainer traced_optimizer optimizer",
        "write global_group_id or dependency_group_id in the config list": "mode",
        "write TorchEvaluator(…, dummy_input=…), or auto_set_dependency_group_ids(model, config_list, dummy_input)": (
            "dummy_input"
        ),
        "write the pruner first: AGPPruner(L1NormPruner(model, config_list, evaluator), interval_steps, total_times)": (
            "model config_list pruning_algorithm pruning_params"
        ),
        "write interval_steps and total_times": "total_iteration",
        "write training_steps": "training_batches training_epochs",
        "write regular_scale": "scale",
        "train the model after compress(): leave it out": "finetuner",
        "write ModelSpeedup(model, dummy_input, masks).speedup_model() after compress()": "speedup",
        "nothing is written beside the result: leave it out": "log_dir keep_intermediate_result",
        "there is none: leave it out": "is_bias_correction",
        "attention and modules of your own are cut through the graph: leave it out": "customized_replacers",
        "write customized_rules={operator: rule} for an operator that has no rule": "customized_mask_updaters",
        "write masks=masks; of a file, masks=torch.load(path, weights_only=True)": "masks_file masks_or_file",
        "write masks=torch.load(path, map_location=…, weights_only=True)": "map_location",
        "the batch is dimension 0: leave it out": "batch_dim",
        "it is read from dummy_input: leave it out": "batch_size",
        "outputs are compared at several batch sizes: leave it out": "confidence",
        "leave it out": "garbage_collect_values logger",
    }
)
"""What is given to a constructor."""

ATTRIBUTES = _each(
    {
        "write unwrap_model()": "_unwrap_model",
        "write wrap_model()": "_wrap_model",
        "write model": "bound_model",
        "write selection.entries": "config_list",
        "write teacher.model": "teacher_model",
        "write chain.members": "fused_compressors",
        "write example": "get_dummy_input",
        "write update_calibration_config(calibration)": "load_calibration_config",
        "write torch.save(compressor.model.state_dict(), path) after unwrap_model(); compress() gives the masks or the "
        "calibration": "export_model export_model_save export_model_simulated_quantization",
        "compress() gives the model and its masks": "get_best_result generate_masks",
        "get_masks() and get_calibration_config() give the values, selected the targets": "show_pruned_weights "
        "get_pruned_weights get_modules_wrapper _module_wrappers _target_spaces module_wrappers check_target",
        "within compressor.as_written() parameters have their names: leave it out": "_get_param_names_map "
        "get_origin2wrapped_parameter_name_map",
        "it is done when it is needed: leave it out": "wrap_teacher_model validate_config step_with_optimizer "
        "unbind_model update_sparse_goals compute_distill_loss",
        "write evaluator.evaluate(model)": "bind_model",
        "write training_func(model, optimizer, training_step, None, None, epochs)": "finetune",
        "write a compressor of your own: its methods are the moments of the training": "patch_loss revert_loss "
        "patch_optimizer_step revert_optimizer_step patch_optim_param_group patch_optimizer register_hooks "
        "remove_all_hooks get_all_hooks",
        "write raycomp.speedup.cut_calibration(calibration, speedup.plan); plan.surgeries tell what was cut": (
            "node_infos graph_module"
        ),
    }
)
"""What is asked of an object."""

PRUNING_KEYS: Mapping[str, str] = {
    "sparsity": "sparse_ratio",
    "sparsity_per_layer": "sparse_ratio",
    "total_sparsity": "sparse_ratio with a global_group_id",
    "max_sparsity_per_layer": "max_sparse_ratio",
}
QUANTIZING_KEYS: Mapping[str, str] = {
    "quant_types": "target_names: ['_input_', 'weight', '_output_']",
    "quant_bits": "quant_dtype: 'int8' (for single targets in target_settings)",
}
SELECTING_KEYS: Mapping[str, str] = {
    "op_partial_names": "op_names_re: ['.*part of a name.*']",
    "exclude": "exclude_op_names or exclude_op_types in the entry that selects too much, instead of an entry",
}
"""Keys of config lists before NNI 3.0, and what to write."""
