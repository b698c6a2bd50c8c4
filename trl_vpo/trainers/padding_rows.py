"""Padding rows: they keep ranks in step where one has less to compute than another (see `trl_vpo.forward.ranks`)."""

from dataclasses import replace
from typing import Any

from PIL import Image

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.forward.families import VISION_INPUTS
from trl_vpo.forward.tree import Branch, Tree, tree_batch
from trl_vpo.media.load import VideoOptions

PICTURE = Image.new("RGB", (56, 56))
MEDIA = {"image": {"images": [PICTURE]}, "video": {"videos": [[PICTURE, PICTURE]]}}


class PaddingRows:
    """The padding rows of a trainer, on its device; each is made when it is first needed."""

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._batches: dict[str | None, dict] = {}

    def __call__(self, vision_input: str | None) -> dict:
        """Return `padding_batch` of the trainer's own processor and settings, whatever its data collator."""
        if vision_input not in self._batches:
            trainer = self._trainer
            collator = trainer.make_collator(trainer.processing_class, trainer.args)
            self._batches[vision_input] = trainer._prepare_inputs(padding_batch(collator, vision_input))
        return self._batches[vision_input]


def padding_batch(collator: PreferenceCollator, vision_input: str | None) -> dict:
    """Return a tree batch of one prompt, with a small image or video or neither, and a response of one token."""
    kind = VISION_INPUTS.get(vision_input)
    if getattr(collator.processing_class, "chat_template", None):
        content = [{"type": kind}] if kind else [{"type": "text", "text": "?"}]
        row = {"prompt": [{"role": "user", "content": content}]}
        row |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    else:
        prompt = getattr(collator.processing_class, f"{kind}_token") if kind else "?"
        row = {"prompt": prompt, "chosen": "yes", "rejected": "no"}
    plain = replace(collator, video=VideoOptions(num_frames=2), phrases=False, num_images=None, max_length=None)
    tree = plain.encode({**row, **MEDIA.get(kind, {}), "id": "padding"})
    short = Tree(tree.name, tree.trunks, [Branch(tree.branches[0].ids[:1])])
    return tree_batch([short], plain.tokenizer.pad_token_id)
