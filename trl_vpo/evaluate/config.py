"""The settings of `trl-vpo evaluate`, with the names and defaults of training and `trl-vpo generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_vpo.models.config import AnsweringConfig, option

DAMAGES = ("shuffled", "masked", "blank")


@dataclass
class EvaluateConfig(AnsweringConfig):
    """Settings of a run of `trl-vpo evaluate`; for the rows see docs/data.md.

    Video settings default to those of the training of the adapters, or of the model, if their `run.json` has them.
    """

    model_name_or_path: str | None = option(None, "Base model: a Hub model or a folder.", aliases=["--model"])
    dataset_name: str | None = option(None, "Held-out rows: a file, a folder or a Hub dataset.", aliases=["--data"])
    dataset_split: str | None = option(None, "Split; unset: test, or train if the data are one file.")
    adapters: list[str] = option(list, "LoRA adapters on this base, all after one --adapters.")
    sensitivity: list[str] = option(
        lambda: list(DAMAGES),
        "Kinds of damage to the media of preference rows: shuffled (the frames of a clip), masked (a square), blank "
        "(black); or none.",
    )
    num_images: int = option(5, "Images of the list drawn from a row's critical_box, as in LPOI; at least 2.")
    visual_prompt: bool = option(True, "Draw a red ellipse around the hidden part.")
    answer_preferences: bool = option(
        False, "Also answer the prompts of preference rows, for the length of the answers."
    )
    yes_no_rule: str = option("videohallucer", "Rule for reading yes/no answers.", choices=["videohallucer", "strict"])
    synonyms: str | None = option(None, "File with objects and their synonyms, one object per line.")
    judge_prompt: str | None = option(
        None,
        "File with another prompt to judge `rated` rows: {contents}, {question}, {reference}, {response}.",
    )
    level: float = option(0.95, "Confidence level of the intervals.")
    resamples: int = option(2000, "Number of bootstrap resamples.")
    on_bad: str = option(
        "error",
        "Treatment of a row with unusable media or prompt: an error, or skip it and list it in rejected.jsonl.",
        choices=["error", "skip"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.damages()

    def damages(self) -> tuple[str, ...]:
        """Return the kinds of damaged media; raise ValueError at an unknown kind."""
        if list(self.sensitivity) == ["none"]:
            return ()
        unknown = [kind for kind in self.sensitivity if kind not in DAMAGES]
        if unknown:
            raise ValueError(f"sensitivity: {unknown[0]!r} is not one of {', '.join(DAMAGES)}; or give none alone.")
        return tuple(kind for kind in DAMAGES if kind in self.sensitivity)

    def input_options(self) -> dict[str, Any]:
        """Return the arguments of `read_inputs`. By default the split is "test"; a single file has only "train"."""
        split = self.dataset_split or ("train" if Path(self.dataset_name).is_file() else "test")
        return super().input_options() | {"split": split}
