"""Train an adapter with LeanPO on rows of your own, in Python.

    python examples/train_leanpo.py data/train.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct --held_out data/held_out.jsonl
    python examples/train_leanpo.py --small_world     # no data, no download: a CPU and a minute

The other methods differ in two names: RRPOTrainer and RRPOConfig, LPOITrainer and LPOIConfig, VisualDPOTrainer and
VisualDPOConfig.
"""

import argparse
from pathlib import Path

import small_world
from datasets import load_dataset
from peft import LoraConfig

from trl_vpo import EvaluationCallback, LeanPOConfig, LeanPOTrainer


def main(argv: list[str] | None = None) -> LeanPOTrainer:
    parser = argparse.ArgumentParser(description="Train an adapter with LeanPO.")
    parser.add_argument("data", nargs="?", help="rows, as docs/data.md describes them")
    parser.add_argument("--held_out", help="rows that are measured, not trained on")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct")
    parser.add_argument("--output_dir", default="outputs/leanpo-example")
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--small_world", action="store_true", help="use the small world's clips and base")
    options = parser.parse_args(argv)
    if not options.data and not options.small_world:
        parser.error("give a file of rows, or --small_world")

    settings = {"num_frames": 16, "learning_rate": 5e-6, "bf16": True, "gradient_checkpointing": True}
    if options.small_world:
        folder = small_world.write(Path(options.output_dir) / "data")
        options.data, options.held_out = str(folder / "train.jsonl"), str(folder / "held_out.jsonl")
        options.model = str(small_world.BASE)
        settings = {"num_frames": 8, "learning_rate": 1e-3, "use_cpu": True, "per_device_train_batch_size": 16}

    trainer = LeanPOTrainer(
        model=options.model,
        args=LeanPOConfig(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            **settings,
        ),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="language"),
    )
    if options.held_out:
        callback = EvaluationCallback(trainer, options.held_out, every=50, sensitivity=())
        trainer.add_callback(callback)
    trainer.train()
    trainer.save_model()
    if options.held_out:
        for name, value in sorted(callback.measure().items()):
            print(f"{name}: {value:.3f}")
    return trainer


if __name__ == "__main__":
    main()
