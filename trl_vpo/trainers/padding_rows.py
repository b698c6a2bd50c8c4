"""Padding rows: they keep ranks in step where one has less to compute than another (see `trl_vpo.forward.ranks`)."""

from dataclasses import replace
from typing import Any

from PIL import Image

from trl_vpo.forward.families import VISION_INPUTS
from trl_vpo.forward.tree import Branch, Tree, tree_batch
from trl_vpo.media.load import VideoOptions

PICTURE = Image.new("RGB", (56, 56))
MEDIA = {"image": {"images": [PICTURE]}, "video": {"videos": [[PICTURE, PICTURE]]}}


def padding_row(trainer: Any, vision_input: str | None) -> dict:
    """Return a tree batch of one prompt, with a small image or video or neither, and a response of one token.

    It has the trainer's own processor and settings, whatever its data collator, and lies on the trainer's device.
    """
    kind = VISION_INPUTS.get(vision_input)
    collator = trainer.make_collator(trainer.processing_class, trainer.args)
    if getattr(collator.processing_class, "chat_template", None):
        content = [{"type": kind}] if kind else [{"type": "text", "text": "?"}]
        row = {"prompt": [{"role": "user", "content": content}]}
        row |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    else:
        prompt = getattr(collator.processing_class, f"{kind}_token") if kind else "?"
        row = {"prompt": prompt, "chosen": "yes", "rejected": "no"}
    short = {"video": VideoOptions(num_frames=2), "max_pixels": PICTURE.width * PICTURE.height, "max_length": None}
    short["pixel_dtype"] = trainer.scorer.pixel_dtype
    plain = replace(collator, **short, phrases=False, media_form=None, media_contrast=None, scores=None)
    tree = plain.encode({**row, **MEDIA.get(kind, {}), "id": "padding"})
    short = Tree(tree.name, tree.trunks, [Branch(tree.branches[0].ids[:1])])
    return trainer._prepare_inputs(tree_batch([short], plain.tokenizer.pad_token_id))
