"""`trl-vpo train METHOD --help`."""

from __future__ import annotations

from trl_vpo.runs.help import CONFIG, HELP_ALL, LAUNCH, help_page
from trl_vpo.training.methods import method_classes
from trl_vpo.training.run import make_parser

TEXTS = {  # in place of TRL's
    "lora_target_modules": (
        "Modules that LoRA adapts: language, language+projector or all (the vision tower, too), the same in every "
        "model family; PEFT's all-linear; or a regular expression of whole module names."
    ),
    "use_peft": "Train a LoRA adapter, not all weights.",
    "lora_r": "Rank of the adapter.",
    "lora_alpha": "Scale of the adapter: its change counts lora_alpha / lora_r times.",
    "model_name_or_path": "Model: a folder or a name on the Hub.",
    "dataset_name": "Rows: a .jsonl, .json or .parquet file, a folder of them, or a name on the Hub.",
    "output_dir": "Folder of the results and checkpoints.",
    "gradient_accumulation_steps": "Batches of each process that make one step.",
    "per_device_train_batch_size": "Pairs in a batch of each process.",
    "dataloader_num_workers": "Processes that load and decode media, on each rank.",
    "max_steps": "Stop after this many steps, whatever num_train_epochs says.",
    "resume_from_checkpoint": "true for the newest checkpoint in output_dir, or the folder of one.",
    "push_to_hub": "Push adapter or model, and checkpoints, to the Hub.",
    "hub_model_id": "Its name there; by default that of output_dir.",
    "report_to": "Reporters, such as tensorboard or wandb.",
    "dtype": "Dtype that the model is loaded in.",
    "eval_steps": "Steps between evaluations.",
    "per_device_eval_batch_size": "Pairs in an evaluation batch of each process.",
    "bf16": "Compute in bfloat16; on unless fp16 is set, on CPUs, too.",
    "use_cpu": "Train on the CPU, also where there is a GPU.",
    "seed": "Seed of row order and new weights.",
}


def method_help(method: str, everything: bool) -> str:
    """Return the help of a method: the keys of its recipes, without those that its config refuses."""
    config = method_classes(method)[0]
    hidden = {*config.refused, "enable_jit_checkpoint"}
    if "precompute_ref_log_probs" in hidden:
        hidden.add("precompute_cache_dir")
    return help_page(
        f"trl-vpo train {method} --config RECIPE [--key value ...]",
        make_parser(method, any_device=True).dataclass_types,
        (method, config),
        first=(CONFIG, *LAUNCH, HELP_ALL),
        hidden=hidden,
        texts=TEXTS,
        everything=everything,
    )
