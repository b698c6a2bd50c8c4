"""The settings that `trl-vpo generate` and `trl-vpo evaluate` share: inputs, the model, media, the folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_vpo.errors import RecipeError
from trl_vpo.media.load import VideoOptions


@dataclass
class AnsweringConfig:
    """Inputs, the model in this process, its media, and the run's folder."""

    dataset_name: str | None = field(default=None, metadata={"help": "Inputs: a Hub dataset, a file or a folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Name of the dataset's configuration."})
    dataset_split: str | None = field(default="train", metadata={"help": "Split of the dataset."})
    media_root: str | None = field(default=None, metadata={"help": "Folder that relative media paths start from."})
    output_dir: str | None = field(default=None, metadata={"help": "The run's folder. The same command continues it."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The model that answers."})
    model_revision: str = field(default="main", metadata={"help": "Revision of the model."})
    dtype: str = field(default="auto", metadata={"help": "auto, bfloat16, float16 or float32."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation to load with."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda or auto (spread over GPUs). Default: best."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load 4-bit weights (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load 8-bit weights (bitsandbytes)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    batch_size: int = field(default=8, metadata={"help": "Inputs worked on, and sequences in a model call, at once."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens; a longer one is cut off."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of each video; 16 unless fps is given."})
    fps: float | None = field(default=None, metadata={"help": "Sample this many frames a second instead."})
    max_frames: int = field(default=64, metadata={"help": "Most frames of a video when fps is given."})
    max_pixels: int | None = field(default=None, metadata={"help": "Scale larger images and frames down."})
    video_start: float | None = field(default=None, metadata={"help": "Where every video begins, in seconds."})
    video_end: float | None = field(default=None, metadata={"help": "Where every video ends, in seconds."})
    seed: int = field(default=0, metadata={"help": "With a row's id, fixes every random choice about the row."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many inputs."})

    def __post_init__(self) -> None:
        self.video_options()
        self.check_at_least(batch_size=1, max_new_tokens=1, limit=1)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both set: keep one.")

    def check_at_least(self, **least: int) -> None:
        """Raise ValueError where a setting is smaller than this."""
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}: give a whole number of at least {minimum}.")

    def check_can_start(self, **what: str) -> None:
        """Raise RecipeError where one of these settings is not set, or `output_dir` is a file."""
        for name, text in what.items():
            if not getattr(self, name):
                raise RecipeError(f"`{name}` is not set: give {text}.")
        folder = Path(self.output_dir)
        if folder.exists() and not folder.is_dir():
            raise RecipeError(f"output_dir: {folder} is a file. Name a folder; it is created if it does not exist.")

    def video_options(self) -> VideoOptions:
        """Return which frames of a video are used."""
        names = ("num_frames", "fps", "max_frames", "max_pixels", "video_start", "video_end")
        return VideoOptions(**{name: getattr(self, name) for name in names})

    def model_options(self) -> dict[str, Any]:
        """Return the arguments of `trl_vpo.models.load.load_model` by name, except the adapter."""
        names = (
            "dtype", "attn_implementation", "device", "load_in_4bit", "load_in_8bit", "trust_remote_code",
            "batch_size", "max_pixels",
        )  # fmt: skip
        own = {"name": self.model_name_or_path, "revision": self.model_revision}
        return own | {name: getattr(self, name) for name in names}

    def media_folder(self) -> Path | None:
        """Return the folder for media that have no path of their own; None without a run's folder."""
        return Path(self.output_dir).absolute() / "media" if self.output_dir else None
