"""`--dry-run`: what the models would be asked about a few inputs, in words and pictures. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape

from trl_vpo.data.chat import render_chat
from trl_vpo.data.hub_names import check_on_hub
from trl_vpo.data.inputs import InputRow, load_media
from trl_vpo.errors import GenerateError, InputError, MediaError, RowError
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.generate.pipeline import Pipeline
from trl_vpo.media.load import Media
from trl_vpo.models.load import LOAD_ERRORS
from trl_vpo.models.requests import Request

TILE = 160  # pixels, height of a frame on a sheet


def show(pipeline: Pipeline, rows: Sequence[InputRow], config: GenerateConfig) -> Path:
    """Print each request and write its pictures as sheets below `<output_dir>/dry_run/`; returns that folder.

    Raises:
        GenerateError: the model has no processor or no chat template.
    """
    console = Console()
    folder = Path(config.output_dir) / "dry_run"
    folder.mkdir(parents=True, exist_ok=True)
    processor = _processor(pipeline, config)
    for number, row in enumerate(rows):
        console.rule(f"{escape(row.id)}")
        try:
            pipeline.check(row)
            requests = pipeline.preview(row, load_media(row, config.video_options(), config.max_pixels))
        except (InputError, MediaError) as error:
            console.print(f"[yellow]rejected:[/yellow] {escape(str(error))}", highlight=False)
            continue
        for step, (title, request) in enumerate(requests):
            console.print(f"[bold]{escape(title)}[/bold]")
            console.print(escape(_text(request, processor)), highlight=False, soft_wrap=True)
            for at, picture in enumerate(sheets(request.media)):
                path = folder / f"{number}-{step}-{at}.png"
                picture.save(path)
                console.print(f"[dim]{escape(str(path))}[/dim]", highlight=False, soft_wrap=True)
    console.print(f"Nothing was generated. The pictures are in {folder}.", highlight=False, soft_wrap=True)
    return folder


def _processor(pipeline: Pipeline, config: GenerateConfig):
    """The processor of a model in this process, whose chat template the requests are shown in; else None."""
    if config.server_url or not pipeline.needs_model(config):
        return None
    from transformers import AutoProcessor

    name = config.model_name_or_path
    try:
        if not Path(name).exists():
            check_on_hub(name, key="model_name_or_path", revision=config.model_revision)
        processor = AutoProcessor.from_pretrained(
            name, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except LOAD_ERRORS as error:
        raise GenerateError(f"the processor of {name} cannot be loaded: {error}") from error
    if getattr(processor, "chat_template", None) is None:
        raise GenerateError(f"{name} has no chat template, so it cannot be asked anything: use its chat version.")
    return processor


def _text(request: Request, processor) -> str:
    if processor is not None:
        try:
            return render_chat(processor, request.messages, [], {})[0].strip()
        except RowError as error:
            raise GenerateError(f"the model cannot be asked this: {error}") from error
    lines = []
    for message in request.messages:
        parts = [part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in message["content"]]
        lines.append(f"{message['role']}: {' '.join(parts)}")
    return "\n".join(lines)


def sheets(media: Media) -> list[Image.Image]:
    """One picture for each clip (its frames side by side) and each image."""
    clips = [[Image.fromarray(frame) for frame in clip.frames] for clip in media.videos]
    return [_sheet(frames) for frames in clips] + [_sheet([image.convert("RGB")]) for image in media.images]


def _sheet(frames: list[Image.Image]) -> Image.Image:
    """Frames of one size in rows of eight, each TILE pixels high."""
    width = max(1, round(frames[0].width * TILE / frames[0].height))
    columns = min(8, len(frames))
    sheet = Image.new("RGB", (columns * (width + 4), -(-len(frames) // columns) * (TILE + 4)), "white")
    for at, frame in enumerate(frames):
        place = (at % columns * (width + 4), at // columns * (TILE + 4))
        sheet.paste(frame.resize((width, TILE)), place)
    return sheet
