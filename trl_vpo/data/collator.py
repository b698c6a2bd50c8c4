"""Rows -> tree batch: chat template, tokens, phrases, frames. Runs in the data-loader workers."""

from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.video_utils import VideoMetadata

from trl_vpo.data.masking import check_box, masked_image_list
from trl_vpo.data.media import Clip, MediaError, VideoOptions, load_image, load_video
from trl_vpo.data.phrases import PhraseError, Span, spans_to_token_mask
from trl_vpo.data.rows import REF_SUMS, Row, RowError, check_accepted, read_row, response_text
from trl_vpo.forward.tree import Branch, Tree, Trunk, tree_batch

SIDES = ("chosen", "rejected")


@dataclass
class PreferenceCollator:
    """Turns rows of preference data into a tree batch (see `trl_vpo.forward.tree`).

    The prompt goes through the processor once per image list item, not once per response: each video is decoded
    and preprocessed once per pair. Responses are tokenized behind their prompt, so that tokens merge as they would
    in generation, and never carry tags or new special tokens.

    Args:
        processing_class: processor of a vision-language model, or tokenizer of a text model.
        video: how videos are sampled.
        max_pixels: larger images are scaled down to this many pixels.
        max_length: prompts with a response longer than this raise an error; nothing is cut.
        phrases: RRPO: mark the tokens of the phrases that differ.
        num_images: LPOI: length of the image list drawn from `critical_box`. None: no list.
        visual_prompt: LPOI: draw the red ellipse.
        media_root: folder of the media.
        frame_cache: folder that keeps decoded clips (see `trl_vpo.data.frame_cache`). None: no cache.

    Raises:
        RowError: a row breaks the contract, does not fit, or its media cannot be read. The message names the row.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    video: VideoOptions = field(default_factory=VideoOptions)
    max_pixels: int | None = None
    max_length: int | None = None
    phrases: bool = False
    num_images: int | None = None
    visual_prompt: bool = True
    media_root: str | None = None
    frame_cache: str | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def is_vlm(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

    def __call__(self, examples: list[dict]) -> dict:
        return tree_batch([self.encode(example) for example in examples], self.tokenizer.pad_token_id)

    def encode(self, example: dict) -> Tree:
        """One row as a tree: trunk of each image list item, branches chosen, rejected, chosen on images 2 to N."""
        row = read_row(example, phrases=self.phrases, image_list=self.num_images is not None)
        return replace(self.encode_row(row), ref_sums=example.get(REF_SUMS))

    def encode_row(self, row: Row, sides: tuple[str, ...] = SIDES) -> Tree:
        """A row that was read, with some of its responses. `sides=()`: the prompt alone, as for generation."""
        check_accepted(row, self.processing_class)
        try:
            trunks, branches = self._tokenize(row, sides)
        except (RowError, MediaError, PhraseError) as error:
            raise RowError(f"{row.name}: {error}") from error
        branches += [replace(branches[0], trunk=k) for k in range(1, len(trunks))]
        tree = Tree(row.name, trunks, branches)
        self._check_length(tree)
        return tree

    # --- text -----------------------------------------------------------------------------------------------------

    def _tokenize(self, row: Row, sides: tuple[str, ...]) -> tuple[list[Trunk], list[Branch]]:
        prompt, responses = self._render(row, sides)
        kwargs = {"add_special_tokens": self._adds_special_tokens(row, prompt)}
        alone = self.tokenizer(prompt, **kwargs)["input_ids"]
        whole = [self.tokenizer(prompt + r, return_offsets_mapping=True, **kwargs) for r in responses]
        # Tokens may merge across the end of the prompt: a response starts where its tokens leave the prompt's.
        common = min((_common(alone, w["input_ids"]) for w in whole), default=len(alone))
        tail = len(alone) - common
        trunks = [self._trunk(row, prompt, images, alone, tail) for images in self._image_lists(row)]
        return trunks, [self._branch(row, side, w, common, prompt, r) for side, w, r in zip(sides, whole, responses)]

    def _render(self, row: Row, sides: tuple[str, ...]) -> tuple[str, list[str]]:
        """Prompt and responses as the model's chat template writes them, cut where prompt and conversation part."""
        if not row.conversational:
            eos = self.tokenizer.eos_token or ""
            texts = [getattr(row, side) for side in sides]
            return row.prompt, [text if text.endswith(eos) else text + eos for text in texts]
        continues = row.prompt[-1]["role"] == "assistant"
        prompt = self._template(row, row.prompt, add_generation_prompt=not continues, continue_final_message=continues)
        whole = [self._template(row, row.prompt + getattr(row, side)) for side in sides]
        for text in whole:
            prompt = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text)))
        return prompt, [text[len(prompt) :] for text in whole]

    def _template(self, row: Row, messages: list[dict], **kwargs) -> str:
        if not self.is_vlm:
            messages = [{**m, "content": response_text([m])} for m in messages]
        # Passed explicitly: some processors (SmolVLM) swap in a template of their own when the messages hold a video.
        template = getattr(self.processing_class, "chat_template", None)
        if template is None:
            raise RowError(
                f"has messages, but {type(self.processing_class).__name__} has no chat template. Set "
                "`processing_class.chat_template`, or give prompt and responses as strings."
            )
        try:
            return self.processing_class.apply_chat_template(
                messages, tokenize=False, chat_template=template, **row.template_kwargs, **kwargs
            )
        except TemplateError as error:  # "roles must alternate", "no system role"
            raise RowError(
                f"the chat template refuses its messages: {error}. Rewrite them, or drop the row."
            ) from error

    def _adds_special_tokens(self, row: Row, prompt: str) -> bool:
        """As in generation: a template of a text model is complete; otherwise BOS is added unless it is there."""
        if row.conversational and not self.is_vlm:
            return False
        bos = self.tokenizer.bos_token
        return not (bos and prompt.startswith(bos))

    def _branch(self, row: Row, side: str, whole: dict, start: int, prompt: str, response: str) -> Branch:
        ids = whole["input_ids"][start:]
        if not ids:
            raise RowError(f"the {side} response has no tokens of its own behind the prompt.")
        if not self.phrases:
            return Branch(ids)
        text = response_text(getattr(row, side))
        spans, begin, at = getattr(row, f"{side}_phrases"), 0, response.find(text)
        if at < 0:  # some templates strip a response: its offsets shift by what is gone
            begin, at = len(text) - len(text.lstrip()), response.find(text.strip())
            if at < 0:
                raise RowError(
                    f"the chat template changes the text of the {side} response; phrases cannot be located."
                )
            spans = [_without_margins(span, text, side) for span in spans]
        mask = spans_to_token_mask(
            spans,
            whole["offset_mapping"][start:],
            shift=len(prompt) + at - begin,
            text=prompt + response,
        )
        return Branch(ids, phrases=mask)

    # --- media ----------------------------------------------------------------------------------------------------

    def _image_lists(self, row: Row) -> list[list]:
        """The images of each trunk: the row's own, or for LPOI one image of the list each."""
        load = lambda source: load_image(source, max_pixels=self.max_pixels, media_root=self.media_root)  # noqa: E731
        if self.num_images is None:
            return [[load(source) for source in row.images]]
        if row.image_list is not None:
            return [[load(source)] for source in row.image_list]
        # The box is in pixels of the image as stored, so the list is drawn before anything is scaled.
        image = load_image(row.images[0], media_root=self.media_root)
        try:
            check_box(row.critical_box, image.size)
        except ValueError as error:
            raise RowError(str(error)) from error
        items = masked_image_list(image, row.critical_box, self.num_images, visual_prompt=self.visual_prompt)
        return [[load(item)] for item in items]

    def _trunk(self, row: Row, prompt: str, images: list, alone: list[int], tail: int) -> Trunk:
        if not self.is_vlm:
            return Trunk(alone[: len(alone) - tail])
        where = {"media_root": self.media_root, "cache": self.frame_cache}
        clips = [v if isinstance(v, Clip) else load_video(v, self.video, **where) for v in row.videos]
        kwargs = {"images": [images]} if images else {}
        if clips:
            kwargs |= {
                "videos": [self._frames(clip) for clip in clips],
                "video_metadata": [_metadata(c) for c in clips],
            }
            kwargs |= {"do_sample_frames": False}
        special = self._adds_special_tokens(row, prompt)
        try:
            out = self.processing_class(text=[prompt], return_tensors="pt", add_special_tokens=special, **kwargs)
        except (ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            raise RowError(f"{type(self.processing_class).__name__} refuses its prompt and media: {error}") from error
        return self._split(out, alone, tail)

    def _frames(self, clip: Clip) -> np.ndarray:
        """A clip's frames; a single one is repeated for towers that take two at a time. Qwen3-VL would refuse it."""
        missing = (getattr(self.processing_class.video_processor, "temporal_patch_size", None) or 1) - len(clip.frames)
        return clip.frames if missing <= 0 else np.concatenate([clip.frames, clip.frames[-1:].repeat(missing, axis=0)])

    def _split(self, out: dict, alone: list[int], tail: int) -> Trunk:
        """The processor's output for one prompt: token ids, token types, media."""
        ids = out.pop("input_ids")[0].tolist()
        out.pop("attention_mask", None)
        end = len(ids) - tail
        if ids[end:] != alone[len(alone) - tail :]:
            raise RowError("the processor ends the prompt differently from its tokenizer; the response has no start.")
        types = {k: v for k, v in out.items() if torch.is_tensor(v) and v.shape == (1, len(ids))}
        media = {k: v for k, v in out.items() if torch.is_tensor(v) and k not in types}
        return Trunk(ids[:end], {k: v[0, :end].tolist() for k, v in types.items()}, media)

    def _check_length(self, tree: Tree) -> None:
        if self.max_length is None:
            return
        for branch in tree.branches:
            prompt = len(tree.trunks[branch.trunk].ids)
            if prompt + len(branch.ids) > self.max_length:
                media = {k: tuple(v.shape) for k, v in tree.trunks[branch.trunk].media.items()}
                raise RowError(
                    f"{tree.name}: {prompt} prompt tokens and {len(branch.ids)} response tokens are more than "
                    f"max_length={self.max_length} (media: {media or 'none'}). Nothing is cut: raise max_length, or "
                    "lower num_frames or max_pixels."
                )


def _common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def _without_margins(span: Span, text: str, side: str) -> Span:
    """The part of a phrase that is left when the text is stripped: behind it stands the end of the turn."""
    start, end = max(span[0], len(text) - len(text.lstrip())), min(span[1], len(text.rstrip()))
    if start >= end:
        raise PhraseError(
            f"the phrase at characters [{span[0]}, {span[1]}) of the {side} response is white space that the chat "
            "template strips. Leave it out."
        )
    return start, end


def _metadata(clip: Clip) -> VideoMetadata:
    """The clip's real times in the processors' terms: `frames_indices / fps` are its timestamps in seconds.

    At a constant rate that is a whole number or NTSC's, `fps` is that rate, as if the processor had sampled the
    frames itself; otherwise the indices count milliseconds. `total_num_frames / fps` is the time that the frames stand
    for: Qwen2.5-VL divides it by their number, and rounds positions down, so that it has to be exact.
    """

    def off(rate: float) -> float:
        return float(np.abs(clip.timestamps - np.round(clip.timestamps * rate) / rate).max())

    rate = min((max(1, round(clip.fps)), max(1, round(clip.fps * 1.001)) / 1.001), key=off)
    if off(rate) > 1e-3:  # more than containers round
        rate = 1000
    total = round((clip.duration if clip.span is None else clip.span) * rate, 6)
    height, width = clip.frames.shape[1:3]
    return VideoMetadata(
        total_num_frames=int(total) if total == int(total) else total,
        fps=rate,
        frames_indices=np.round(clip.timestamps * rate).astype(int).tolist(),
        duration=round(clip.duration, 3),
        height=height,
        width=width,
        video_backend="pyav",
    )
