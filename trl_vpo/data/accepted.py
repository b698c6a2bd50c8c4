"""A row against a model's processor: media and placeholder tokens that it would misread are refused."""

from typing import Any

from trl_vpo.data.chat import place_in_string, placeholder_token
from trl_vpo.data.messages import MARKERS, response_text
from trl_vpo.data.rows import Row
from trl_vpo.errors import RowError
from trl_vpo.forward.families import UPSTREAM


def check_accepted(row: Row, processing_class: Any) -> None:
    """Raise RowError for media that the model cannot see, which some processors would drop, and misplaced tokens."""
    try:
        _check_media(row, processing_class)
        _check_tokens(row, processing_class)
    except RowError as error:
        raise RowError(f"{row.name}: {error}") from error


def _check_media(row: Row, processing_class: Any) -> None:
    name = type(processing_class).__name__
    text_model = getattr(processing_class, "tokenizer", None) is None
    kinds = [kind for kind in ("image", "video") if getattr(row, f"{kind}s")]
    for kind in kinds:
        if getattr(processing_class, f"{kind}_processor", None) is None:
            what = "is a tokenizer of a text model" if text_model else "takes none"
            raise RowError(
                f"has {kind}s, but {name} {what}. Train a model that sees {kind}s, with its processor "
                "(docs/models.md has a table), or leave these rows out."
            )
    if len(kinds) == 2:  # a processor that gives both one name would overwrite one with the other
        image, video = (set(getattr(processing_class, f"{kind}_processor").model_input_names) for kind in kinds)
        if image & video:
            raise RowError(
                f"has images and videos, but {name} takes one kind in a prompt: it gives both as "
                f"{', '.join(sorted(image & video))}. Give the image as a video of one frame, or leave the row out."
            )
    for what in (*kinds, " and ".join(kinds)):
        if reason := UPSTREAM.get((name, what)):
            raise RowError(
                f"has {what.replace(' ', 's ', 1)}s in its prompt, on which the model's own code in transformers "
                f"fails: {reason}. Leave the row out."
            )
    if row.forgotten and not text_model:
        kind = MARKERS[row.forgotten]
        raise RowError(
            f"the prompt has a `{row.forgotten}`, but the row has 0 {kind}(s). Put them into `{kind}s`. If these are "
            'words of the user, write the content as [{"type": "text", "text": "..."}].'
        )


def _check_tokens(row: Row, processing_class: Any) -> None:
    texts = {side: response_text(getattr(row, side)) for side in ("prompt", *row.sides)}
    if not row.conversational:
        place_in_string(processing_class, texts.pop("prompt"), {"image": len(row.images), "video": len(row.videos)})
    for side, text in texts.items():
        for kind in MARKERS.values():
            token = placeholder_token(processing_class, kind)
            if token and token in text:
                where = "the prompt" if side == "prompt" else f"the {side} response"
                raise RowError(
                    f"{where} holds {token!r} in its text, the model's own placeholder of {kind}s. Take it out: "
                    f'{{"type": "{kind}"}} in the prompt says where media stand.'
                )
