"""What `trl-vpo evaluate` is told: names and defaults are those of training and `trl-vpo generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trl_vpo.data.media import VideoOptions
from trl_vpo.generate.config import GenerateConfig

DAMAGES = ("shuffled", "masked", "blank")


@dataclass
class EvaluateConfig:
    """Settings of a run of `trl-vpo evaluate`; `trl_vpo.evaluate.rows` says what the rows hold.

    Parameters:
        model_name_or_path, dataset_name: also `--model` and `--data` on the command line.
        adapters (`list[str]`): LoRA adapters to compare with the base, all on the same base.
        dataset_split (`str`, *optional*): of a folder or a Hub dataset; "test" by default. A single file is its own.
        sensitivity (`list[str]`): how the media of preference rows are damaged: shuffled (the frames of a clip),
            masked (a square), blank (black); or "none".
        num_images, visual_prompt: of the list drawn from a row's `critical_box`, as in LPOI.
        answer_preferences (`bool`): also answer the prompts of preference rows, for the length of the answers.
        synonyms (`str`, *optional*): table of objects for rows with the task "chair", see `chair.read_synonyms`.
        on_bad (`"error"` or `"skip"`): "skip" leaves out rows whose media or prompt cannot be used, and lists them in
            `rejected.jsonl`.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "The base.", "aliases": ["--model"]})
    model_revision: str = field(default="main", metadata={"help": "Revision of the model."})
    adapters: list[str] = field(default_factory=list, metadata={"help": "LoRA adapters, all after one --adapters."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows: a file, a folder or a Hub dataset.", "aliases": ["--data"]}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Name of the dataset's configuration."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; test, unless the data are one file."})
    media_root: str | None = field(default=None, metadata={"help": "Folder that relative media paths start from."})
    output_dir: str | None = field(default=None, metadata={"help": "The run's folder. The same command continues it."})
    dtype: str = field(default="auto", metadata={"help": "auto, bfloat16, float16 or float32."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention implementation to load with."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda or auto (spread over GPUs). Default: best."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load 4-bit weights (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load 8-bit weights (bitsandbytes)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    batch_size: int = field(default=8, metadata={"help": "Rows worked on, and sequences in a model call, at once."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens; a longer one is cut off."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of each video; 16 unless fps is given."})
    fps: float | None = field(default=None, metadata={"help": "Sample this many frames a second instead."})
    max_frames: int = field(default=64, metadata={"help": "Most frames of a video when fps is given."})
    max_pixels: int | None = field(default=None, metadata={"help": "Scale larger images and frames down."})
    sensitivity: list[str] = field(
        default_factory=lambda: list(DAMAGES), metadata={"help": f"Damaged media: {', '.join(DAMAGES)}; or none."}
    )
    num_images: int = field(default=5, metadata={"help": "Images of a list drawn from a box, at least 2."})
    visual_prompt: bool = field(default=True, metadata={"help": "Draw a red ellipse around the hidden part."})
    answer_preferences: bool = field(default=False, metadata={"help": "Also answer the prompts of preference rows."})
    yes_no_rule: str = field(
        default="videohallucer",
        metadata={"help": "How a yes or a no is read.", "choices": ["videohallucer", "strict"]},
    )
    synonyms: str | None = field(default=None, metadata={"help": "Objects and their synonyms, one object a line."})
    level: float = field(default=0.95, metadata={"help": "Level of the confidence intervals."})
    resamples: int = field(default=2000, metadata={"help": "Draws of the bootstrap."})
    seed: int = field(default=0, metadata={"help": "With a row's id, fixes how its media are damaged."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many rows."})
    on_bad: str = field(
        default="error",
        metadata={"help": "A row that cannot be used: an error, or skip and list it.", "choices": ["error", "skip"]},
    )

    def __post_init__(self) -> None:
        self.generate_config()  # checks what both have
        for name, least in (("num_images", 2), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give a whole number of at least {least}.")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}: give a number above 0 and below 1.")
        self.damages()

    def damages(self) -> tuple[str, ...]:
        """The kinds of damaged media.

        Raises:
            ValueError: an unknown kind.
        """
        if list(self.sensitivity) == ["none"]:
            return ()
        unknown = [kind for kind in self.sensitivity if kind not in DAMAGES]
        if unknown:
            raise ValueError(f"sensitivity: {unknown[0]!r} is not one of {', '.join(DAMAGES)}; or give none alone.")
        return tuple(kind for kind in DAMAGES if kind in self.sensitivity)

    def video_options(self) -> VideoOptions:
        return self.generate_config().video_options()

    def generate_config(self) -> GenerateConfig:
        """What reads the inputs and loads the base.

        Raises:
            ValueError: settings that contradict each other.
        """
        file = self.dataset_name is not None and Path(self.dataset_name).is_file()
        shared = (
            "model_name_or_path", "model_revision", "dataset_name", "dataset_config", "media_root", "output_dir",
            "dtype", "attn_implementation", "device", "load_in_4bit", "load_in_8bit", "trust_remote_code",
            "batch_size", "max_new_tokens", "num_frames", "fps", "max_frames", "max_pixels", "seed", "limit",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in shared}
        return GenerateConfig(
            **values, dataset_split=self.dataset_split or ("train" if file else "test"), temperature=0
        )
