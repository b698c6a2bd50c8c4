"""Options that `trl-vpo generate` and `trl-vpo evaluate` share: inputs, the model, media, the folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    batch_size: int = field(default=8, metadata={"help": "Inputs worked on at once."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens; a longer one is cut off."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of each video; 16 unless fps is given."})
    fps: float | None = field(default=None, metadata={"help": "Sample this many frames a second instead."})
    max_frames: int = field(default=64, metadata={"help": "Most frames of a video when fps is given."})
    max_pixels: int | None = field(default=None, metadata={"help": "Scale larger images and frames down."})
    video_start: float | None = field(default=None, metadata={"help": "Where every video begins, in seconds."})
    video_end: float | None = field(default=None, metadata={"help": "Where every video ends, in seconds."})
    seed: int = field(default=0, metadata={"help": "With a row's id, fixes every random choice about the row."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many inputs."})

    def model_options(self) -> dict[str, Any]:
        """The arguments of `trl_vpo.models.load.load_model`, but for an adapter."""
        names = (
            "dtype", "attn_implementation", "device", "load_in_4bit", "load_in_8bit", "trust_remote_code",
            "batch_size", "max_pixels",
        )  # fmt: skip
        options = {name: getattr(self, name) for name in names}
        return options | {"name": self.model_name_or_path, "revision": self.model_revision}

    def video_options(self) -> VideoOptions:
        return VideoOptions(
            num_frames=self.num_frames,
            fps=self.fps,
            max_frames=self.max_frames,
            max_pixels=self.max_pixels,
            video_start=self.video_start,
            video_end=self.video_end,
        )
