"""The model card of a trained adapter or model."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import get_config_model_id

import trl_vpo
from trl_vpo.trainers.config import VisualPreferenceConfig

CARD = """\
# {name}

{kind} of [{base}](https://huggingface.co/{base}) trained with **{method}**{dataset}, by
TRL-VPO {version}.

## Ask it about a {medium}

```python
{snippet}
```

## Training

{method}: [{title}](https://arxiv.org/abs/{paper}) (arXiv {paper}).

| setting | value |
| --- | --- |
{settings}

Versions: TRL-VPO {version}, {versions}.

## Citation

```bibtex
{citation}
```
"""

SNIPPET = """\
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor

{load}
processor = AutoProcessor.from_pretrained("{name}")

messages = [{{"role": "user", "content": [
    {{"type": "{medium}", "{medium}": "{file}"}},
    {{"type": "text", "text": "What happens here?"}},
]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"{video_kwargs}
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])"""

PEFT_LOAD = """\
model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, "{name}")"""
FULL_LOAD = 'model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", device_map="auto")'

SETTINGS = ("learning_rate", "num_train_epochs", "max_steps", "beta", "seed")


def write_model_card(trainer: Any, model_name: str | None, dataset_name: str | None, tags: Any) -> Path:
    """Write `README.md` into the trainer's output folder and give its path."""
    peft = is_peft_model(trainer.model)
    base = get_config_model_id(trainer.model.config) or "a model without a name"
    if Path(base).exists():
        base = Path(base).name
    name = model_name or Path(trainer.args.output_dir).name
    data = ModelCardData(
        base_model=base,
        library_name="peft" if peft else "transformers",
        pipeline_tag="video-text-to-text" if _medium(trainer) == "video" else "image-text-to-text",
        datasets=dataset_name if dataset_name and not Path(dataset_name).exists() else None,
        tags=[*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        model_name=name,
    )
    text = CARD.format(
        name=name,
        kind="A LoRA adapter" if peft else "A fine-tuned version",
        base=base,
        method=trainer._name,
        dataset=f" on `{Path(dataset_name).name if Path(dataset_name).exists() else dataset_name}`"
        if dataset_name
        else "",
        medium=_medium(trainer),
        snippet=_snippet(trainer, name, base, peft),
        title=trainer._paper["title"],
        paper=trainer._paper["id"],
        settings=_settings(trainer),
        version=trl_vpo.__version__,
        versions=", ".join(f"{k} {v}" for k, v in trl_vpo.versions().items() if k != "trl_vpo"),
        citation=trainer._paper["citation"].strip(),
    )
    path = Path(trainer.args.output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
    return path


def _medium(trainer: Any) -> str:
    columns = trainer.train_dataset.column_names or []
    return "video" if {"video", "videos"} & set(columns) else "image"


def _snippet(trainer: Any, name: str, base: str, peft: bool) -> str:
    medium = _medium(trainer)
    return SNIPPET.format(
        imports="from peft import PeftModel\n" if peft else "",
        load=(PEFT_LOAD if peft else FULL_LOAD).format(base=base, name=name),
        name=name,
        medium=medium,
        file="clip.mp4" if medium == "video" else "photo.jpg",
        video_kwargs=_sampling(trainer.args) if medium == "video" else "",
    )


def _sampling(args: Any) -> str:
    return f", fps={args.fps}" if args.fps is not None else f", num_frames={args.num_frames}"


def _settings(trainer: Any) -> str:
    common = {f.name for f in fields(VisualPreferenceConfig)}
    own = [f.name for f in fields(trainer.args) if f.name not in common]
    return "\n".join(f"| `{name}` | {getattr(trainer.args, name)} |" for name in (*SETTINGS, *own))
