#!/usr/bin/env bash
# A model makes its own preference data, and trains on it: generate -> view -> train -> evaluate.
#
#   examples/self_training.sh QUESTIONS HELD_OUT [OUT]    annotated questions and held-out pairs (docs/data.md), a GPU
#   examples/self_training.sh                             the small world: a CPU, some minutes, no download
#
# Give the same command again after an interruption: it goes on where it was, training from its last checkpoint.
set -euo pipefail
here=$(dirname "$0")

if [ $# -ge 2 ]; then
  questions=$1 held_out=$2 out=${3:-outputs/self-training}
  model=Qwen/Qwen2.5-VL-7B-Instruct
  generate=(--config leanpo/generate) train=(--config leanpo/qwen2_5_vl_7b)
else
  out=${1:-outputs/self-training}
  python "$here/small_world.py" "$out/data" "${COUNT:-64}"
  questions=$out/data/questions.jsonl held_out=$out/data/held_out.jsonl
  model=$(cd "$here" && python -c "import small_world; print(small_world.BASE)")
  generate=(--config quickstart/leanpo-generate --model_name_or_path "$model")
  train=(--config quickstart/leanpo --model_name_or_path "$model")
fi

trl-vpo generate leanpo "${generate[@]}" --dataset_name "$questions" --output_dir "$out/made"
trl-vpo view "$out/made" -o "$out/made.html"
trl-vpo train leanpo "${train[@]}" --dataset_name "$out/made/rows.jsonl" --output_dir "$out/adapter" \
  --resume_from_checkpoint true
trl-vpo evaluate --model "$model" --adapters "$out/adapter" --data "$held_out" --output_dir "$out/evaluation"
trl-vpo plot "$out/adapter" -o "$out/curves.html"
