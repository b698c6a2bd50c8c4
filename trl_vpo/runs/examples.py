"""The examples that `trl-vpo COMMAND --help` shows."""

TRAIN_EXAMPLE = """\
example:
  trl-vpo train rrpo --config rrpo/qwen2_5_vl_7b --dataset_name train.jsonl

--config takes a file, or a name that `trl-vpo recipes` lists. Every key of a
recipe is also an option and wins over it: `trl-vpo train rrpo --help` lists
them. Paths start from the working directory. On several GPUs:

  trl-vpo train rrpo --config RECIPE --accelerate_config zero2 --num_processes 8
  accelerate launch --num_processes 8 -m trl_vpo train rrpo --config RECIPE

--accelerate_config takes a file, or a name: ddp, zero2, zero3, zero3_offload,
fsdp2, multi_node, single_gpu, cpu2, or one of TRL's. Both launch options may
also stand in the recipe."""
GENERATE_EXAMPLE = """\
example:
  trl-vpo generate leanpo --config leanpo/generate --dataset_name in.jsonl
  trl-vpo train leanpo --config leanpo/qwen2_5_vl_7b \\
    --dataset_name outputs/leanpo-data/rows.jsonl

--dry-run shows the first requests and loads no weights. Every key of a recipe
is also an option: `trl-vpo generate leanpo --help` lists them. An interrupted
run continues where it stopped when the same command is given again.
--num_processes 8 gives each of 8 GPUs a copy of the model."""
COMPARE_EXAMPLE = """\
example:
  trl-vpo compare --config dpo/qwen2_5_vl_7b leanpo/qwen2_5_vl_7b \\
    --dataset_name train.jsonl --held_out held_out.jsonl

RECIPE is that of a training, several times, or one of a comparison, which
lists them. Further options are for every training; those that `trl-vpo
evaluate` alone has are for the evaluation. All trainings are of LoRA adapters
on one base. The same command continues an interrupted comparison."""
PLOT_EXAMPLE = """\
example:
  trl-vpo plot outputs/dpo outputs/leanpo -o curves.html"""
MERGE_EXAMPLE = """\
example:
  trl-vpo merge outputs/rrpo merged/rrpo --dtype bfloat16"""
VIEW_EXAMPLE = """\
example:
  trl-vpo view data/train.jsonl -o page.html
  trl-vpo view outputs/leanpo-data -o page.html --limit 500

DATASET is what a recipe's `dataset_name` is, or the folder of a run of
`trl-vpo generate`."""
IMPORT_EXAMPLE = """\
example:
  trl-vpo import rrpo self_alignment.json train.jsonl --media_root /data/videos"""
DOCTOR_EXAMPLE = """\
example:
  trl-vpo doctor rrpo/qwen2_5_vl_7b --dataset_name train.jsonl --out bad.jsonl

Recipe keys given as options win over the recipe, as in `trl-vpo train`. Loads
the processor and the model's config, no weights. Exit code 1: something would
stop the training."""
