"""Short real runs that train adapters of many kinds on the tiny VLM of the testbed, and ways to spoil an adapter."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from helpers import row
from PIL import Image
from safetensors.torch import load_file, save_file
from slow_kit import slow_logits
from trainer_kit import QUIET

from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.training.run import run_training

BASE = "trl_vpo/testbed/base"  # its LM head shares the weights of its embeddings
RECIPE = QUIET | {
    "model_name_or_path": BASE,
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": "language",
}


@cache
def workspace():
    """A folder with a recipe's rows, two pairs about an image, and room for runs. It goes when the tests end."""
    kept = tempfile.TemporaryDirectory(prefix="adapters-")
    folder, rows = Path(kept.name), []
    for i, (chosen, rejected) in enumerate([("a red square.", "a blue circle."), ("a circle.", "two squares.")]):
        image = folder / f"{i}.png"
        Image.new("RGB", (56, 56), (200, 90 * i, 0)).save(image)
        rows.append(row("image", [str(image)], chosen, rejected, id=f"r{i}"))
    write_jsonl(rows, folder / "train.jsonl")
    return kept


def recipe_of(out, method="rrpo", **keys):
    """The path of a recipe for a run into a folder, with keys of its own, and its method."""
    folder = Path(workspace().name)
    path = folder / "recipe.yaml"
    recipe = {**RECIPE, "dataset_name": str(folder / "train.jsonl"), "output_dir": str(out), **keys}
    path.write_text(yaml.safe_dump(recipe))
    return path, method


def train(out, **keys):
    path, method = recipe_of(out, **keys)
    return run_training(method, ["--config", str(path)])


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True, "method": "leanpo"},
    "dora": {"use_dora": True, "method": "dpo"},
    "head": {"lora_modules_to_save": ["lm_head"]},
    "merger": {"lora_modules_to_save": ["merger"], "method": "dpo"},
    "all": {"lora_target_modules": "all"},
}


@cache
def trained(name):
    """A run of `VARIANTS`, once: its folder, its rows, and its log-probs, policy's and reference's."""
    folder = Path(workspace().name) / name / "adapter"
    trainer = train(folder, **VARIANTS[name])
    rows = [trainer.train_dataset[i] for i in range(2)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.eval()
    with torch.no_grad():
        logps = trainer.concatenated_forward(trainer.model, batch).logps
        reference = trainer.reference_scores(batch).logps if trainer.needs_reference else None
    trees = [trainer.data_collator.encode(row) for row in rows]
    return SimpleNamespace(folder=folder, trees=trees, mask=batch["branch_mask"], logps=logps, reference=reference)


@torch.no_grad()
def logps_of(model, run):
    """Return what a plain model gives for the responses of a run, one sequence at a time, behind each other."""
    model.eval()
    branches = [(tree.trunks[branch.trunk], branch) for tree in run.trees for branch in tree.branches]
    rows = [slow_logits(model, trunk, branch).log_softmax(-1) for trunk, branch in branches]
    return torch.cat([r.gather(-1, torch.tensor(b.ids)[:, None])[:, 0] for r, (_, b) in zip(rows, branches)])


def adapted_modules(model):
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def changed(folder, tmp_path, **keys):
    copied = tmp_path / "changed"
    copied.mkdir()
    shutil.copy(folder / "adapter_model.safetensors", copied)
    config = json.loads((folder / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, **keys}))
    return copied


def edited(folder, tmp_path, change):
    """A copy of an adapter with other tensors: `change` takes and returns them by their names."""
    copied = changed(folder, tmp_path)
    path = copied / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return copied


def pickled(folder, tmp_path):
    copied = changed(folder, tmp_path)
    torch.save(load_file(copied / "adapter_model.safetensors"), copied / "adapter_model.bin")
    (copied / "adapter_model.safetensors").unlink()
    return copied


def hub_model(cache, **revisions):
    """me/base in a cache of the Hub: each revision has the testbed's weights, made larger."""
    weights = load_file(f"{BASE}/model.safetensors")
    for i, (name, factor) in enumerate(revisions.items()):
        folder = cache / "models--me--base" / "snapshots" / (str(i) * 40)
        shutil.copytree(BASE, folder)
        scaled = {key: tensor * factor for key, tensor in weights.items()}
        save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
        (cache / "models--me--base" / "refs").mkdir(exist_ok=True)
        (cache / "models--me--base" / "refs" / name).write_text(str(i) * 40)
    return weights
