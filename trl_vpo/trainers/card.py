"""The model card of a trained adapter or model; its text is `card.md.j2`."""

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import ProcessorMixin
from trl.trainer.utils import get_config_model_id

from trl_vpo.data.identity import package_version, versions
from trl_vpo.media.budget import budget_of_run
from trl_vpo.models.source import hub_name
from trl_vpo.trainers.config import VisualPreferenceConfig

PIPELINES = {"video": "video-text-to-text", "image": "image-text-to-text", "text": "text-generation"}
SETTINGS = ("learning_rate", "num_train_epochs", "max_steps", "beta", "seed")


def write_model_card(trainer: Any, model_name: str | None, dataset_name: str | None, tags: Any) -> Path:
    """Write `README.md` into the trainer's output folder and return its path."""
    args, peft, rows = trainer.args, is_peft_model(trainer.model), trainer.train_dataset
    columns = rows.column_names or next(iter(rows), {})  # a stream often knows no columns
    medium = "video" if {"video", "videos"} & set(columns) else "image"
    medium = medium if isinstance(trainer.processing_class, ProcessorMixin) else "text"
    base = get_config_model_id(trainer.model.config) or "a model without a name"
    base = hub_name(base) or base
    local = Path(base).exists()
    if Path(base).is_absolute() and args.push_to_hub:  # a folder that nobody else has
        base = f"path/to/{Path(base).name}"
    budget = budget_of_run(trainer)
    name, dataset = model_name or Path(args.output_dir).name, dataset_name or ""
    data = ModelCardData(
        base_model=None if local else base,  # the Hub refuses anything but the name of one of its models
        library_name="peft" if peft else "transformers",
        pipeline_tag=PIPELINES[medium],
        datasets=[d for d in dataset.split(", ") if d and not Path(d).exists()] or None,
        tags=[*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        model_name=name,
    )
    environment = Environment(
        loader=PackageLoader("trl_vpo.trainers", ""), undefined=StrictUndefined, keep_trailing_newline=True
    )
    text = environment.get_template("card.md.j2").render(
        name=name,
        where=model_name or (name if Path(args.output_dir).is_absolute() else args.output_dir),
        base=base,
        local=local,
        peft=peft,
        revision=next(iter(trainer.model.peft_config.values())).revision if peft else None,
        dataset=Path(dataset).name if dataset and Path(dataset).exists() else dataset,
        medium=medium,
        video_size=budget.processor_size(args.num_frames or args.max_frames) if budget else None,
        sampling=f"fps={args.fps}" if args.fps is not None else f"num_frames={args.num_frames}",
        method=trainer._name,
        paper=trainer._paper,
        settings=_settings(trainer),
        version=package_version(),
        versions={name: version for name, version in versions().items() if name != "trl_vpo"},
    )
    path = Path(args.output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(path)
    return path


def _settings(trainer: Any) -> dict[str, Any]:
    args, model = trainer.args, trainer.model
    own = [field.name for field in fields(args) if _is_own(field, args)]
    idle = "num_train_epochs" if args.max_steps > 0 else "max_steps"
    settings = {name: getattr(args, name) for name in (*SETTINGS, *own) if name != idle}
    settings["pairs per step"] = trainer.get_total_train_batch_size(args)
    adapter = next(iter(model.peft_config.values())) if is_peft_model(model) else None
    return settings | {name: getattr(adapter, name) for name in ("r", "lora_alpha") if hasattr(adapter, name)}


def _is_own(field: Field, args: VisualPreferenceConfig) -> bool:
    """Tell whether an option is the method's own, or one of TRL's to which it or the run gives another value."""
    common = {other.name: other for other in fields(VisualPreferenceConfig)}.get(field.name)
    if common is None or field is common:
        return common is None
    return not getattr(args, field.name) == _default(field) == _default(common)


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
