"""The config under those of all methods: how media are read, and which of TRL's options are refused."""

import copy
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from typing import Any

from trl import DPOConfig

from trl_vpo.media.load import VideoOptions
from trl_vpo.models.config import option
from trl_vpo.runs.secrets import scrub
from trl_vpo.runs.values import check_bounds
from trl_vpo.trainers.row_groups import sp_size

WHOLE = "the KL needs the reference's whole next-token distributions, not log-probs only"
# Options of trl.DPOConfig that none of the methods has. A value other than TRL's default is refused with the reason.
NEVER = {
    "padding_free": "rows are packed without padding wherever the model can; it is not an option",
    "truncation_mode": "sequences are never truncated: cutting one may cut its video or its response",
    "label_smoothing_factor": "it belongs to a cross-entropy; the smoothing of preferences is `label_smoothing`",
    "include_num_input_tokens_seen": "every log line has `num_tokens`",
}
DPO_ONLY = "it belongs to the losses of `VisualDPOTrainer`"
REFUSED = NEVER | {  # by all methods but DPO
    "loss_type": f"{DPO_ONLY}; each other trainer has one loss, and is chosen by its name",
    "loss_weights": f"{DPO_ONLY}; each other trainer has one loss, with weights of its own",
    "f_divergence_type": f"{DPO_ONLY}; the other methods are defined for the reverse KL",
    **dict.fromkeys(("ld_alpha", "f_alpha_divergence_coef", "use_weighting", "discopop_tau"), DPO_ONLY),
}
_TRL_FIELDS = fields(DPOConfig)
_BOUNDED = {"beta", "label_smoothing", "loss_weights", "discopop_tau", "f_alpha_divergence_coef", "weight_decay"}
_PRECOMPUTING = ("precompute_ref_log_probs", "precompute_ref_batch_size")
_REFERENCE = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", *_PRECOMPUTING)


def without_reference(method: str) -> dict[str, str]:
    """Return the options that a method without a reference refuses, with the reason."""
    return dict.fromkeys(_REFERENCE, f"{method} has no reference model")


def without_precomputing(reason: str = WHOLE) -> dict[str, str]:
    """Return the options that a method refuses for which summed log-probs of the reference are not enough."""
    return dict.fromkeys(_PRECOMPUTING, reason)


@dataclass(repr=False)
class VisualPreferenceConfig(DPOConfig):
    """[`trl.DPOConfig`] plus how images and videos are read; `trl-vpo train METHOD --help` lists all fields.

    Tokens and passwords stay in memory: neither `training_args.bin` (a pickle) nor `to_dict` and `repr`, which logs
    show, have them.
    """

    max_length: int | None = option(
        None, "A prompt and response longer than this are an error: nothing is ever cut. Default: no limit."
    )
    beta: float = option(0.1, "Scale of the rewards: how strongly the policy is held to the reference.")
    precompute_ref_log_probs: bool = option(
        False,
        "Run the reference once over all rows before training and keep its log-probs on disk. Full fine-tuning then "
        "holds one model, not two.",
    )
    dataset_num_proc: int | None = option(
        None, "Processes, on each rank, that check the rows before training; `dataloader_num_workers` by default."
    )
    precompute_cache_dir: str | None = option(
        None,
        "Folder of precomputed reference log-probs, where interrupted and later runs find them; in `output_dir` by "
        "default. Runs with the same rows, media settings, processor and reference can share it.",
    )
    layout: str = option(
        "auto",
        "Share one copy of the prompt between the responses of a pair. `auto` does if the model can be packed, which "
        "is proven before the first step; otherwise the log says why not.",
        choices=["auto", "shared", "separate"],
    )
    vision_learning_rate: float | None = option(
        None,
        "Learning rate of what trains in the vision tower, in LoRA or full fine-tuning; `learning_rate` by default. "
        "The schedule is the same.",
    )
    projector_learning_rate: float | None = option(
        None, "The same for the layers between vision tower and language model."
    )
    num_frames: int | None = option(None, "Frames sampled uniformly from each video; 16 unless `fps` is given.")
    fps: float | None = option(None, "Sample this many frames a second instead of `num_frames`, at most `max_frames`.")
    max_frames: int = option(64, "Most frames of a video when `fps` is given.")
    max_pixels: int | None = option(
        None,
        "Scale larger images and frames down to this many pixels (width * height). By default Qwen's videos have the "
        "size that qwen-vl-utils gives them; else the processor decides.",
    )
    video_start: float | None = option(
        None,
        "Start of the window in every video, in seconds. A row may set its own: `{path, video_start, video_end}`.",
    )
    video_end: float | None = option(None, "End of the window in every video, in seconds.")
    media_root: str | None = option(
        None, "Folder that relative media paths start from. Paths that lead outside of it are refused."
    )
    frame_cache: str | None = option(
        None,
        "Folder that keeps the sampled frames of video files. They are not compressed, later epochs and runs decode "
        "nothing, and it may be deleted at any time.",
    )
    displacement_warning: float | None = option(
        10.0, "Warn once when chosen responses have lost this many nats of log-prob, at a good accuracy. null: never."
    )
    eval_divergence: bool = option(
        False,
        "Evaluations also log displacement and exact KL, whatever the method, so that runs compare. It takes one more "
        "pass, of the model without its adapter.",
    )
    check_media: str = option(
        "header",
        "Check of the media before training. `header` opens every file, `decode` reads it as training will (exact, "
        "and as slow as one epoch of loading), `off` skips it.",
        choices=["header", "decode", "off"],
    )
    on_bad_media: str = option(
        "error",
        "Treatment of rows with unreadable media. `skip` decodes every file up front, leaves these rows out and lists "
        "them in `<output_dir>/skipped_rows.jsonl`.",
        choices=["error", "skip"],
    )

    # No annotations: these are no fields.
    refused = REFUSED
    scores = None  # columns that rows must have, see `ScoreMarginConfig`
    media_form = None  # what else responses are scored behind, see `trl_vpo.data.row_media`
    media_contrast, num_images, visual_prompt = None, 5, True  # of the media that the collator draws
    kl_sides = ("chosen",)  # the responses whose KL is trained, where a method needs one; the others' is a metric

    def __post_init__(self):
        super().__post_init__()
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in _TRL_FIELDS}
        for name, reason in self.refused.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{type(self).__name__} does not take {name}={getattr(self, name)!r}: {reason}. "
                    f"Leave `{name}` out of the recipe."
                )
        for own in fields(self):
            value, ours = getattr(self, own.name), own.name not in defaults
            if ours or own.name in _BOUNDED or (isinstance(value, float) and not isfinite(value)):
                check_bounds(own.name, value)
            if ours and isinstance(value, float) and "int" in str(own.type) and "float" not in str(own.type):
                raise ValueError(f"{own.name} is {value}: give a whole number.")
            choices = own.metadata.get("choices") if ours else None
            if choices and value not in (own.default, *choices):
                raise ValueError(f"{own.name}={value!r} is not one of {', '.join(choices)}.")
        if "inputs" in self.include_for_metrics:
            raise ValueError("include_for_metrics cannot have 'inputs': a batch is a tree of prompts and responses.")
        if self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r}: the length of a row is known only once it "
                "is collated. Use 'random' or 'sequential'."
            )
        if self.precompute_cache_dir is not None and "precompute_ref_log_probs" in self.refused:
            raise ValueError(f"precompute_cache_dir: {self.refused['precompute_ref_log_probs']}. Leave it out.")
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise ValueError("precompute_ref_log_probs needs a reference that stays, but sync_ref_model moves it.")
        if self.accelerator_config.dispatch_batches:
            raise ValueError("accelerator_config.dispatch_batches: batches cannot be cut and sent. Leave it out.")
        if not self.accelerator_config.even_batches:
            raise ValueError(
                "accelerator_config.even_batches=False: a process with a batch less than the others would leave them "
                "waiting. Leave it out; rows that are repeated to fill a last batch count once when a Dataset is "
                "evaluated (of a stream, twice)."
            )
        sp_size(self)  # refuses what cannot be
        self.accelerator_config.dispatch_batches = False  # the default for streams would be True
        if self.on_bad_media == "skip":
            self.check_media = "decode"  # rows can only be left out up front if every file was read
        self.num_frames = self.video_options().num_frames  # also says what is wrong, before anything is loaded

    @property
    def n_gpu(self) -> int:
        """Of this process: one, also where more are visible. `nn.DataParallel` would tear a tree batch apart."""
        return min(super().n_gpu, 1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"hub_token": None, "model_init_kwargs": _tokenless(self.model_init_kwargs)}

    def __copy__(self):
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = copy.copy(self)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return values | {"model_init_kwargs": _tokenless(values["model_init_kwargs"])}

    def __str__(self) -> str:
        shown = copy.copy(self)
        shown.model_init_kwargs = _tokenless(self.model_init_kwargs)
        return super(VisualPreferenceConfig, shown).__str__()

    __repr__ = __str__  # each config's own @dataclass would make one that shows everything, hence repr=False

    def video_options(self) -> VideoOptions:
        """Return how videos are sampled; options that contradict each other raise ValueError."""
        return VideoOptions(**{f.name: getattr(self, f.name) for f in fields(VideoOptions)})


def _tokenless(model_init_kwargs: Any) -> Any:
    return scrub(model_init_kwargs) if isinstance(model_init_kwargs, dict) else model_init_kwargs
