"""What `trl-vpo evaluate` is told: names and defaults are those of training and `trl-vpo generate`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from trl_vpo.generate.config import GenerateConfig
from trl_vpo.models.config import AnsweringConfig

DAMAGES = ("shuffled", "masked", "blank")


@dataclass
class EvaluateConfig(AnsweringConfig):
    """Settings of a run of `trl-vpo evaluate`; `trl_vpo.evaluate.rows` says what the rows hold.

    Parameters:
        model_name_or_path, dataset_name: also `--model` and `--data` on the command line.
        adapters (`list[str]`): LoRA adapters to compare with the base, all on the same base.
        num_frames, fps, max_frames, max_pixels, video_start, video_end: by default those of the adapters' training,
            where their `run.json` tells; adapters with different ones are refused.
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
    dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows: a file, a folder or a Hub dataset.", "aliases": ["--data"]}
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split; test, unless the data are one file."})
    batch_size: int = field(default=8, metadata={"help": "Rows worked on, and sequences in a model call, at once."})
    seed: int = field(default=0, metadata={"help": "With a row's id, fixes how its media are damaged."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many rows."})
    adapters: list[str] = field(default_factory=list, metadata={"help": "LoRA adapters, all after one --adapters."})
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

    def generate_config(self) -> GenerateConfig:
        """What reads the inputs and loads the base.

        Raises:
            ValueError: settings that contradict each other.
        """
        file = self.dataset_name is not None and Path(self.dataset_name).is_file()
        values = {shared.name: getattr(self, shared.name) for shared in fields(AnsweringConfig)}
        values["dataset_split"] = self.dataset_split or ("train" if file else "test")
        return GenerateConfig(**values, temperature=0)
