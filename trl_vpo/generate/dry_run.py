"""Show the requests for a few inputs, as text and pictures (`--dry_run`). Loads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from rich.text import Text

from trl_vpo.data.chat import render_chat
from trl_vpo.data.hub_names import check_on_hub
from trl_vpo.data.inputs import load_media, read_inputs
from trl_vpo.errors import GenerateError, InputError, MediaError, RowError
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.generate.pipeline import Pipeline
from trl_vpo.models.load import LOAD_ERRORS
from trl_vpo.models.requests import Request
from trl_vpo.runs.console import make_console

TILE = 160  # pixels, height of a frame on a sheet
COLUMNS, GAP = 8, 4  # frames in a row of a sheet, pixels between them


def show(pipeline: Pipeline, config: GenerateConfig) -> None:
    """Print the first rows' requests in the model's chat template (for a server: as turns); write their pictures."""
    processor, inputs = None, read_inputs(**config.input_options() | {"media_folder": None})
    if pipeline.needs_model(config) and not config.server_url:
        processor = _load_processor(config)
    console, folder = make_console(soft_wrap=True), Path(config.output_dir) / "dry_run"
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(inputs[: min(3, config.limit or 3)]):
        console.rule(row.id)
        try:
            media = load_media(row, config.video_options())
            pipeline.check(row)
            requests = pipeline.preview(row, media)
        except (InputError, MediaError) as error:
            console.print(Text("rejected:", style="yellow"), str(error))
            continue
        for step, (title, request) in enumerate(requests):
            console.print(title, style="bold")
            console.print(_text(request, processor))
            clips = [[Image.fromarray(frame) for frame in clip.frames] for clip in request.media.videos]
            images = [[image.convert("RGB")] for image in request.media.images]
            for place, frames in enumerate(clips + images):
                path = folder / f"{number}-{step}-{place}.png"
                _sheet(frames).save(path)
                console.print(str(path), style="dim")
    console.print(f"Nothing was generated. The pictures are in {folder}.")


def _load_processor(config: GenerateConfig) -> Any:
    from transformers import AutoProcessor

    name, options = config.model_name_or_path, {"revision": config.model_revision}
    try:
        if not Path(name).exists():
            check_on_hub(name, key="model_name_or_path", **options)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=config.trust_remote_code, **options)
    except LOAD_ERRORS as error:
        raise GenerateError(f"the processor of {name} cannot be loaded: {error}") from error
    if getattr(processor, "chat_template", None) is None:
        raise GenerateError(f"{name} has no chat template, so it cannot answer: use its chat version.")
    return processor


def _text(request: Request, processor: Any) -> str:
    if processor is not None:
        try:
            return render_chat(processor, request.messages, [], {})[0].strip()
        except RowError as error:
            raise GenerateError(f"the model's chat template refuses the request: {error}") from error
    lines = []
    for message in request.messages:
        parts = [part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in message["content"]]
        lines.append(f"{message['role']}: {' '.join(parts)}")
    return "\n".join(lines)


def _sheet(frames: list[Image.Image]) -> Image.Image:
    """Arrange frames of one size in rows."""
    width = max(1, round(frames[0].width * TILE / frames[0].height))
    columns, rows = min(COLUMNS, len(frames)), -(-len(frames) // COLUMNS)
    sheet = Image.new("RGB", (columns * (width + GAP), rows * (TILE + GAP)), "white")
    for place, frame in enumerate(frames):
        row, column = divmod(place, COLUMNS)
        sheet.paste(frame.resize((width, TILE)), (column * (width + GAP), row * (TILE + GAP)))
    return sheet
