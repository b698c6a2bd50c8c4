"""What the generation configs of all methods share: inputs, who answers, how, and where the run is kept.

`AnsweringConfig` is the part of it that `trl-vpo evaluate` has, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from string import Formatter

from trl_vpo.data.media import VideoOptions
from trl_vpo.generate.base import Sampling


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

    def video_options(self) -> VideoOptions:
        return VideoOptions(
            num_frames=self.num_frames,
            fps=self.fps,
            max_frames=self.max_frames,
            max_pixels=self.max_pixels,
            video_start=self.video_start,
            video_end=self.video_end,
        )


@dataclass
class GenerateConfig(AnsweringConfig):
    """Settings of a run of `trl-vpo generate`. Each method's file adds its own.

    Parameters:
        dataset_name (`str`): the inputs, a Hub dataset or a local file or folder as in training.
        dataset_config, dataset_split: of a dataset with several.
        output_dir (`str`): the run's folder; the same command continues it.
        model_name_or_path (`str`): the model that answers, in this process or (with `server_url`) by its server name.
        batch_size (`int`, defaults to 8): inputs worked on at once; behind a server, the requests in flight.
        seed (`int`, defaults to 0): with a row's id it fixes every random choice about that row.
        from_adapter (`str`, *optional*): a LoRA adapter to answer with, that of the last round for instance.
        server_url (`str`, *optional*): an OpenAI-compatible server that answers instead of this process.
        judge_model, judge_url: who judges open-ended answers; a model behind an OpenAI-compatible server.
    """

    from_adapter: str | None = field(default=None, metadata={"help": "LoRA adapter to answer with."})
    server_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible server, as http://HOST:PORT/v1."}
    )
    server_media: str = field(
        default="video",
        metadata={
            "help": "How a clip is sent: as one mp4 (vLLM), or as frames (any).",
            "choices": ["video", "frames"],
        },
    )
    api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "Environment variable with the API key."})
    judge_model: str | None = field(default=None, metadata={"help": "Model name of the judge, behind judge_url."})
    judge_url: str | None = field(default=None, metadata={"help": "OpenAI-compatible server of the judge."})
    judge_api_key_env: str = field(default="OPENAI_API_KEY", metadata={"help": "The judge's API key variable."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds without a byte that end an attempt."})
    max_retries: int = field(default=5, metadata={"help": "Attempts after the first, with growing pauses."})
    max_requests: int | None = field(default=None, metadata={"help": "Stop after so many requests to servers."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 is greedy."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus of sampling."})
    dry_run: bool = field(default=False, metadata={"help": "Show what three rows would be asked; load no weights."})

    def __post_init__(self) -> None:
        self.video_options()
        counts = {"batch_size": 1, "max_new_tokens": 1, "max_retries": 0, "max_requests": 1, "limit": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: give a whole number of at least {least}.")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}: give seconds above 0.")
        if self.server_media not in ("video", "frames"):
            raise ValueError(f"server_media is {self.server_media!r}: give video or frames.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature} and top_p {self.top_p}: give at least 0, and above 0 up to 1."
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both set: keep one.")
        if bool(self.judge_url) != bool(self.judge_model):
            raise ValueError("a judge needs both judge_url and judge_model.")
        if self.server_url and (self.from_adapter or self.load_in_4bit or self.load_in_8bit):
            raise ValueError(
                "server_url: adapters and quantization are the server's own settings. Leave them out here."
            )

    def sampling(self, **changes) -> Sampling:
        """The run's sampling, or a variant of it."""
        values = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return Sampling(**(values | changes))


def check_template(name: str, template: str, expected: set[str]) -> None:
    """Raises ValueError unless the template has these placeholders and no others, each written plainly."""
    remedy = f"Use {', '.join(f'{{{key}}}' for key in sorted(expected))}, and {{{{ and }}}} for braces of your own."
    try:
        found = [
            (key, spec or conversion) for _, key, spec, conversion in Formatter().parse(template) if key is not None
        ]
    except ValueError as error:
        raise ValueError(f"{name} is no template ({error}). {remedy}") from error
    unknown = sorted({key for key, extra in found if key not in expected or extra})
    missing = sorted(expected - {key for key, _ in found})
    if unknown or missing:
        raise ValueError(f"{name}: unknown placeholders {unknown}, missing placeholders {missing}. {remedy}")
