"""The model card of a trained adapter or model."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from transformers import ProcessorMixin
from trl.trainer.utils import get_config_model_id

from trl_vpo.data.identity import package_version, versions
from trl_vpo.models.source import hub_name
from trl_vpo.trainers.config import VisualPreferenceConfig

CARD = """\
# {name}

{kind} of {base_link} trained with **{method}**{dataset}, by
TRL-VPO {version}.

## {heading}

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

TEXT_SNIPPET = """\
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

{load}
tokenizer = AutoTokenizer.from_pretrained("{name}")

inputs = tokenizer("What happens here?", return_tensors="pt").to(model.device)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=128), skip_special_tokens=True)[0])"""

SNIPPET = """\
{imports}from transformers import AutoModelForImageTextToText, AutoProcessor
{media_import}
{load}
processor = AutoProcessor.from_pretrained("{name}")

question = [{{"type": "{medium}"}}, {{"type": "text", "text": "What happens here?"}}]
prompt = processor.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True, tokenize=False
)
{media_load}
inputs = processor(
    text=[prompt], {media_kwargs}, return_tensors="pt"
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])"""

MEDIA = {  # medium: (import, load, processor's arguments)
    "video": (
        "from transformers.video_utils import load_video\n",
        'frames, metadata = load_video("clip.mp4", {sampling})',
        "videos=[frames], video_metadata=[metadata], do_sample_frames=False",
    ),
    "image": (
        "from transformers.image_utils import load_image\n",
        'image = load_image("photo.jpg")',
        "images=[image]",
    ),
}
PEFT_LOAD = """\
model = AutoModelForImageTextToText.from_pretrained("{base}", {revision}dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, "{name}")"""
FULL_LOAD = 'model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", device_map="auto")'

PIPELINES = {"video": "video-text-to-text", "image": "image-text-to-text", "text": "text-generation"}
HEADINGS = {"video": "Ask it about a video", "image": "Ask it about an image", "text": "Ask it"}
SETTINGS = ("learning_rate", "num_train_epochs", "max_steps", "beta", "seed")


def write_model_card(trainer: Any, model_name: str | None, dataset_name: str | None, tags: Any) -> Path:
    """Write `README.md` into the trainer's output folder and give its path."""
    peft = is_peft_model(trainer.model)
    base = get_config_model_id(trainer.model.config) or "a model without a name"
    base = hub_name(base) or base
    local = Path(base).exists()
    if Path(base).is_absolute() and trainer.args.push_to_hub:  # a folder that nobody else has
        base = f"path/to/{Path(base).name}"
    name, medium = model_name or Path(trainer.args.output_dir).name, _medium(trainer)
    data = ModelCardData(
        base_model=None if local else base,  # the Hub refuses what is no name of a model on it
        library_name="peft" if peft else "transformers",
        pipeline_tag=PIPELINES[medium],
        datasets=[d for d in (dataset_name or "").split(", ") if d and not Path(d).exists()] or None,
        tags=[*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        model_name=name,
    )
    text = CARD.format(
        name=name,
        kind="A LoRA adapter" if peft else "A fine-tuned version",
        base_link=f"`{base}`" if local else f"[{base}](https://huggingface.co/{base})",
        method=trainer._name,
        dataset=f" on `{Path(dataset_name).name if Path(dataset_name).exists() else dataset_name}`"
        if dataset_name
        else "",
        heading=HEADINGS[medium],
        snippet=_snippet(trainer, name, base, medium, peft),
        title=trainer._paper["title"],
        paper=trainer._paper["id"],
        settings=_settings(trainer),
        version=package_version(),
        versions=", ".join(f"{k} {v}" for k, v in versions().items() if k != "trl_vpo"),
        citation=trainer._paper["citation"].strip(),
    )
    path = Path(trainer.args.output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
    return path


def _medium(trainer: Any) -> str:
    if not isinstance(trainer.processing_class, ProcessorMixin):
        return "text"
    rows = trainer.train_dataset
    columns = rows.column_names or next(iter(rows), {})  # a stream often knows no columns
    return "video" if {"video", "videos"} & set(columns) else "image"


def _snippet(trainer: Any, name: str, base: str, medium: str, peft: bool) -> str:
    revision = next(iter(trainer.model.peft_config.values())).revision if peft else None
    revision = f'revision="{revision}", ' if revision else ""
    loaded = (PEFT_LOAD if peft else FULL_LOAD).format(base=base, name=name, revision=revision)
    imports = "from peft import PeftModel\n" if peft else ""
    if medium == "text":
        load = loaded.replace("AutoModelForImageTextToText", "AutoModelForCausalLM")
        return TEXT_SNIPPET.format(imports=imports, load=load, name=name)
    media_import, media_load, media_kwargs = MEDIA[medium]
    return SNIPPET.format(
        imports=imports,
        load=loaded,
        name=name,
        medium=medium,
        media_import=media_import,
        media_load=media_load.format(sampling=_sampling(trainer.args)),
        media_kwargs=media_kwargs,
    )


def _sampling(args: Any) -> str:
    return f"fps={args.fps}" if args.fps is not None else f"num_frames={args.num_frames}"


def _settings(trainer: Any) -> str:
    common = {f.name for f in fields(VisualPreferenceConfig)}
    own = [f.name for f in fields(trainer.args) if f.name not in common]
    idle = "num_train_epochs" if trainer.args.max_steps > 0 else "max_steps"
    names = [name for name in (*SETTINGS, *own) if name != idle]
    return "\n".join(f"| `{name}` | {getattr(trainer.args, name)} |" for name in names)
