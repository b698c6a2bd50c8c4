"""The settings shared by `trl-vpo generate` and `trl-vpo evaluate`: inputs, model, media, judge, folder."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl_vpo.data.paths import check_output_dir
from trl_vpo.errors import RecipeError
from trl_vpo.media.load import VideoOptions
from trl_vpo.runs.values import check_bounds


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a config's field with its default or what makes it, its text in `--help`, and perhaps its `choices`."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, **metadata})


@dataclass
class AnsweringConfig:
    """Inputs, the model in this process, its media, a judge, and the run's folder."""

    dataset_name: str | None = option(None, "Inputs: a Hub dataset, a file or a folder.")
    dataset_config: str | None = option(None, "Name of the dataset's configuration.")
    dataset_split: str | None = option("train", "Split of the dataset.")
    media_root: str | None = option(None, "Folder that relative media paths start from.")
    output_dir: str | None = option(None, "The run's folder. The same command continues it.")
    model_name_or_path: str | None = option(None, "The model that answers.")
    model_revision: str = option("main", "Revision of the model.")
    dtype: str = option("auto", "auto, bfloat16, float16 or float32.")
    attn_implementation: str | None = option(None, "Attention implementation to load with.")
    device: str | None = option(None, "cpu, cuda or auto (spread over GPUs); unset: the best available.")
    load_in_4bit: bool = option(False, "Load 4-bit weights (bitsandbytes).")
    load_in_8bit: bool = option(False, "Load 8-bit weights (bitsandbytes).")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    batch_size: int = option(8, "Inputs per batch, and sequences per model call.")
    max_new_tokens: int = option(256, "Maximum length of an answer in tokens; a longer one is cut off.")
    num_frames: int | None = option(None, "Frames of each video; 16 unless fps is given.")
    fps: float | None = option(None, "Sample this many frames a second instead.")
    max_frames: int = option(64, "Maximum frames of a video if fps is given.")
    max_pixels: int | None = option(None, "Scale larger images and frames down; see `trl-vpo train`.")
    video_start: float | None = option(None, "Start of the window in every video, in seconds.")
    video_end: float | None = option(None, "End of the window in every video, in seconds.")
    judge_model: str | None = option(None, "Model name of the judge, behind judge_url.")
    judge_url: str | None = option(None, "OpenAI-compatible server of the judge, as http://HOST:PORT/v1.")
    judge_api_key_env: str = option("OPENAI_API_KEY", "Environment variable with the judge's API key.")
    seed: int = option(0, "With a row's id, fixes every random choice about the row.")
    limit: int | None = option(None, "Use only the first N inputs.")

    def __post_init__(self) -> None:
        self.video_options()
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata.get("choices")
            check_bounds(setting.name, value)
            if choices and value not in choices:
                raise ValueError(f"{setting.name} is {value!r}: give one of {', '.join(choices)}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both set: keep one.")
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError("a judge needs both judge_url and judge_model.")

    def check_can_start(self, **required: str) -> None:
        """Raise RecipeError if one of these settings is not set, or `output_dir` is a file."""
        for name, text in required.items():
            if not getattr(self, name):
                raise RecipeError(f"`{name}` is not set: give {text}.")
        check_output_dir(self.output_dir)

    def video_options(self) -> VideoOptions:
        """Return the options by which frames of a video are chosen."""
        return VideoOptions(**{setting.name: getattr(self, setting.name) for setting in fields(VideoOptions)})

    def model_options(self) -> dict[str, Any]:
        """Return the arguments of `trl_vpo.models.load.load_model` by name, except the adapter."""
        names = (
            "dtype", "attn_implementation", "device", "load_in_4bit", "load_in_8bit", "trust_remote_code",
            "batch_size", "max_pixels",
        )  # fmt: skip
        weights = {"name": self.model_name_or_path, "revision": self.model_revision}
        return weights | {name: getattr(self, name) for name in names}

    def input_options(self) -> dict[str, Any]:
        """Return the arguments of `trl_vpo.data.inputs.read_inputs` by name."""
        return {
            "name": self.dataset_name,
            "subset": self.dataset_config,
            "split": self.dataset_split,
            "media_root": self.media_root,
            "media_folder": Path(self.output_dir).absolute() / "media" if self.output_dir else None,
        }
