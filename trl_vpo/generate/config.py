"""The settings of generation shared by all methods: the answering model, sampling."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

from trl_vpo.models.config import AnsweringConfig, option
from trl_vpo.models.requests import Sampling


@dataclass
class GenerateConfig(AnsweringConfig):
    """Settings of a run of `trl-vpo generate`. Each method's file adds its own."""

    from_adapter: str | None = option(None, "LoRA adapter to answer with.")
    server_url: str | None = option(
        None, "OpenAI-compatible server that answers instead of this process, as http://HOST:PORT/v1."
    )
    server_media: str = option(
        "video", "Form in which a clip is sent: one mp4 (vLLM), or frames (any server).", choices=["video", "frames"]
    )
    api_key_env: str = option("OPENAI_API_KEY", "Environment variable with the server's API key.")
    timeout: float = option(120.0, "Seconds without data after which a request is retried.")
    max_retries: int = option(5, "Attempts after the first, with growing pauses.")
    max_requests: int | None = option(None, "Stop after this many requests to servers.")
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(0.9, "Nucleus sampling threshold.")
    dry_run: bool = option(False, "Show the requests of three rows; load no weights.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.server_url and (self.from_adapter or self.load_in_4bit or self.load_in_8bit):
            raise ValueError("server_url: adapters and quantization are the server's own settings; leave them out.")

    def sampling(self, **changes) -> Sampling:
        """Return the run's sampling, or a variant of it."""
        values = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return Sampling(**(values | changes))


def check_template(name: str, template: str, expected: set[str]) -> None:
    """Raise ValueError unless the template has these placeholders and no others, each written plainly."""
    remedy = f"Use {', '.join(f'{{{key}}}' for key in sorted(expected))}, and {{{{ and }}}} for braces of your own."
    try:
        parts = [(key, spec or conversion) for _, key, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"{name} is not a template ({error}). {remedy}") from error
    unknown = sorted({key for key, extra in parts if key is not None and (key not in expected or extra)})
    missing = sorted(expected - {key for key, _ in parts})
    if unknown or missing:
        raise ValueError(f"{name}: unknown placeholders {unknown}, missing placeholders {missing}. {remedy}")
