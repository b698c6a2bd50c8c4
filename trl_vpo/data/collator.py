"""Rows -> tree batch: chat template, tokens, phrases, frames. Runs in the data-loader workers."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from trl_vpo.data.accepted import check_accepted
from trl_vpo.data.chat import WHOLE, WORD, ended, place_in_string, render_chat, same_start, without_ends
from trl_vpo.data.columns import REF_SUMS
from trl_vpo.data.messages import response_text, with_text
from trl_vpo.data.proof_rows import proof_rows
from trl_vpo.data.rows import Row, read_row
from trl_vpo.data.trunk_media import trunk_media, video_metadata
from trl_vpo.errors import MediaError, PhraseError, RowError
from trl_vpo.forward.families import PROMPT_MASKS
from trl_vpo.forward.tree import Branch, Tree, Trunk, tree_batch
from trl_vpo.media.budget import PixelBudget, video_budget
from trl_vpo.media.load import Clip, Media, VideoOptions
from trl_vpo.text.phrases import Span, spans_to_token_ids

REFUSALS = (ValueError, TypeError, LookupError, RuntimeError, AttributeError, ArithmeticError, AssertionError)


@dataclass
class PreferenceCollator:
    """Turns rows of preference data into a tree batch (see `trl_vpo.forward.tree`).

    The prompt goes through the processor once for each of the media that a row compares, not once per response: each
    video is decoded and preprocessed once per pair. Responses are tokenized behind their prompt, so that tokens merge
    as they would in generation, and never carry tags or new special tokens.

    Example:
        >>> collator = PreferenceCollator(AutoProcessor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct"))
        >>> row = {"prompt": [{"role": "user", "content": "<video>What happens?"}], "videos": ["clip.mp4"],
        ...        "chosen": [{"role": "assistant", "content": "A dog runs."}],
        ...        "rejected": [{"role": "assistant", "content": "A cat runs."}]}
        >>> batch = collator([row])  # one trunk, two branches
        >>> DataLoader(rows, batch_size=2, collate_fn=collator)

    Args:
        processing_class: processor of a vision-language model, or tokenizer of a text model.
        video: how videos are sampled.
        max_pixels: larger images are scaled down to this many pixels. None: videos have their model's own budget (see
            `trl_vpo.media.budget`).
        max_length: prompts with a response longer than this raise an error; nothing is cut.
        phrases: RRPO: mark the tokens of the phrases that differ. "paired": DPA's, as many on both sides.
        media_form: what else responses are scored behind, see `trl_vpo.data.row_media`. None: the row's own media.
        media_contrast: corruption that is the second of the media where a row gives none, of
            `trl_vpo.media.corruptions.CONTRASTS`.
        num_images: LPOI: length of the list drawn from `critical_box` or `critical_span`.
        visual_prompt: LPOI: draw the red ellipse.
        scores: the columns of scores that rows must have, "score" or "trust". None: none.
        media_root: folder of the media.
        frame_cache: folder that keeps decoded clips (see `trl_vpo.media.frame_cache`). None: no cache.
        pixel_dtype: dtype of pixels; a trainer sets that of its vision tower. None: the processor's.
        proven: kinds of rows of which it gave a short row for the proof of the model. None: none are wanted.

    Raises RowError: a row breaks the contract, does not fit, or its media cannot be read. The message names the row.
    """

    processing_class: ProcessorMixin | PreTrainedTokenizerBase
    video: VideoOptions = field(default_factory=VideoOptions)
    max_pixels: int | None = None
    max_length: int | None = None
    phrases: bool | str = False
    media_form: str | None = None
    media_contrast: str | None = None
    num_images: int = 5
    visual_prompt: bool = True
    scores: str | None = None
    media_root: str | None = None
    frame_cache: str | None = None
    pixel_dtype: torch.dtype | None = None
    proven: set[str] | None = field(default_factory=set)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def is_vlm(self) -> bool:
        return isinstance(self.processing_class, ProcessorMixin)

    @property
    def budget(self) -> PixelBudget | None:
        """The pixels of a video; None: its processor, or `max_pixels`, decides."""
        return video_budget(self.processing_class, self.max_pixels)

    def __call__(self, examples: list[dict]) -> dict:
        batch = tree_batch([self.encode(example) for example in examples], self.tokenizer.pad_token_id)
        if self.proven is not None:
            batch["proof_rows"] = proof_rows(self, examples)
        return batch

    def encode(self, example: dict) -> Tree:
        """Return a row's tree: a trunk for each of its media; branches chosen, rejected, then those on the others."""
        return replace(self.encode_row(self.read(example)), ref_sums=example.get(REF_SUMS))

    def read(self, example: dict) -> Row:
        """Return a row as its method reads it."""
        how = {"media_form": self.media_form, "drawn": self.media_contrast is not None, "scores": self.scores}
        return read_row(example, phrases=self.phrases, **how)

    def encode_row(self, row: Row, sides: tuple[str, ...] | None = None) -> Tree:
        """Return the tree of a row with some of its responses. `sides=()`: the prompt alone, as for generation."""
        sides = row.sides if sides is None else sides
        check_accepted(row, self.processing_class)
        try:
            trunks, branches = self._tokenize(row, sides)
        except (RowError, MediaError, PhraseError) as error:
            raise RowError(f"{row.name}: {error}") from error
        if not all(trunk.ids for trunk in trunks):  # nothing would predict the first token of a response
            raise RowError(
                f"{row.name}: the prompt has no token of its own. It merges with the responses, or is empty."
            )
        compared = [(b.ids, b.trunk) for b in branches[: len(sides)]] if len(sides) == 2 or sides == row.sides else []
        if compared[:1] and compared[0] in compared[1:]:
            raise RowError(
                f"{row.name}: {' and '.join(sides)} have the same tokens, so there is no preference in them: "
                f"{self.tokenizer.decode(branches[0].ids)[:300]!r}. The chat template or the tokenizer leaves out "
                "what differs (white space, an end of turn, tool calls, thoughts). Choose a template that writes it "
                "(`processing_class.chat_template`), or drop the row."
            )
        for branch in branches:
            prompt, media = len(trunks[branch.trunk].ids), trunks[branch.trunk].media
            if self.max_length is not None and prompt + len(branch.ids) > self.max_length:
                shapes = {k: tuple(v.shape) for k, v in media.items()}
                raise RowError(
                    f"{row.name}: {prompt} prompt tokens and {len(branch.ids)} response tokens are more than "
                    f"max_length={self.max_length} (media: {shapes or 'none'}). Nothing is cut: raise max_length, or "
                    "lower num_frames or max_pixels."
                )
        return Tree(row.name, trunks, branches, weight=row.weight, score_margin=row.score_margin)

    def _tokenize(self, row: Row, sides: tuple[str, ...]) -> tuple[list[Trunk], list[Branch]]:
        prompt, responses = self._render(row, sides)
        alone = self._tokens(prompt)["input_ids"]
        # The prompt keeps the tokens that generation is given. In a string, tokens may merge across its end, as in
        # TRL: the responses start where their tokens leave the prompt's.
        start = alone
        if not row.conversational:
            merged = [same_start(alone, self._tokens(prompt + response)["input_ids"]) for response in responses]
            start = alone[: min(merged, default=len(alone))]
        tail = len(alone) - len(start)
        trunks = [self._trunk(row, prompt, media, alone, tail) for media in trunk_media(row, self)]
        branches = [self._branch(row, side, prompt, start, r) for side, r in zip(sides, responses)]
        return trunks, self._placed(branches, len(trunks))

    def _placed(self, branches: list[Branch], trunks: int) -> list[Branch]:
        """Return the branches with their copies on the second trunk and those behind it."""
        if not branches or trunks == 1:
            return branches
        chosen, *others = branches
        if self.media_form == "pair":
            return [chosen, *(replace(branch, trunk=1) for branch in others)]
        repeated = [chosen, *others[1:]]  # `other_chosen` is scored on both
        return branches + [replace(branch, trunk=k) for k in range(1, trunks) for branch in repeated]

    def _render(self, row: Row, sides: tuple[str, ...]) -> tuple[str, list[str]]:
        responses = [getattr(row, side) for side in sides]
        if row.conversational:
            return render_chat(self.processing_class, row.prompt, responses, row.template_kwargs)
        counts = {"image": len(row.images), "video": len(row.videos)}
        prompt = place_in_string(self.processing_class, row.prompt, counts)
        return prompt, [ended(response, self.processing_class) for response in responses]

    def _tokens(self, text: str) -> dict:
        return self.tokenizer(text, **WHOLE, return_offsets_mapping=bool(self.phrases))

    def _first_tokens(self, row: Row, prompt: str) -> list[int]:
        """Return what the tokenizer puts in front, as in generation; not what it puts behind (EOS), to end the prompt.

        That is nothing where a text model's template is complete, where the prompt begins with BOS, or where the
        processor asks for nothing (LFM2-VL, Hunyuan-VL).
        """
        bos, defaults = self.tokenizer.bos_token, getattr(type(self.processing_class), "text_kwargs", {})
        if not defaults.get("add_special_tokens", True):
            return []
        if (row.conversational and not self.is_vlm) or (bos and prompt.startswith(bos)):
            return []
        ids = self.tokenizer("a", **WHOLE | {"add_special_tokens": True})["input_ids"]
        return ids[: ids.index(self._tokens("a")["input_ids"][0])]

    def _branch(self, row: Row, side: str, prompt: str, start: list[int], response: str) -> Branch:
        text, whole = prompt + response, self._tokens(prompt + response)
        shift, skip = len(prompt), len(start)
        if whole["input_ids"][:skip] != start:  # a token lies across the end of the prompt
            text, whole, shift, skip = response, self._tokens(response), 0, 0
        ids = whole["input_ids"][skip:]
        if not ids:
            raise RowError(f"the {side} response has no tokens of its own after the prompt. Drop the row.")
        if not self.phrases:
            return Branch(ids, side=side)
        tail = self._render(replace(row, **{side: with_text(getattr(row, side), WORD)}), (side,))[1][0]
        spans, moved = _spans_in(response, row, side, tail.rpartition(WORD)[2].strip(), self.tokenizer)
        offsets = whole["offset_mapping"][skip:]
        numbers = spans_to_token_ids(spans, offsets, shift=shift + moved, text=text)
        if self.phrases == "paired" and set(numbers) - {0} != set(range(1, len(spans) + 1)):
            raise PhraseError(f"two phrases of the {side} response share a token. Make them one, on both sides.")
        return Branch(ids, phrases=numbers, side=side)

    def _trunk(self, row: Row, prompt: str, media: Media, alone: list[int], tail: int) -> Trunk:
        if not self.is_vlm:
            return Trunk(self._first_tokens(row, prompt) + alone[: len(alone) - tail])
        out = self._processed(prompt, media)
        ids, first = out.pop("input_ids")[0].tolist(), self._first_tokens(row, prompt)
        out.pop("attention_mask", None)
        end = len(ids) - tail
        if len(ids) < len(alone) or ids[end:] != alone[len(alone) - tail :]:
            raise RowError(
                "the processor and its tokenizer end the prompt differently: the response has no beginning."
            )
        tensors = {k: v for k, v in out.items() if torch.is_tensor(v)}
        for name in PROMPT_MASKS & tensors.keys():
            tensors[name] = F.pad(tensors[name][:, :end].transpose(1, -1), (len(first), 0)).transpose(1, -1)
        tensors.pop("labels", None)  # PaliGemma's
        types = {k: tensors.pop(k)[0, :end].tolist() for k in [*tensors] if k.endswith("token_type_ids")}
        return Trunk(first + ids[:end], {k: [0] * len(first) + v for k, v in types.items()}, tensors)

    def _processed(self, text: str, media: Media) -> dict:
        """Return what the processor makes of a text with its media."""
        budget, clips = self.budget, media.videos
        images = list(media.images)
        # GOT-OCR takes a list inside a list for the pages of one placeholder.
        kwargs = {"images": images if hasattr(self.processing_class, "multi_page") else [images]} if images else {}
        if "mm_token_type_ids" in self.processing_class.model_input_names:  # Cosmos3-Edge does not ask for them
            kwargs["return_mm_token_type_ids"] = True
        if clips:
            kwargs["videos"] = [self._frames(clip) for clip in clips]
            kwargs |= {"video_metadata": [video_metadata(clip) for clip in clips], "do_sample_frames": False}
            videos_kwargs = {"do_resize": False} if budget else {}
            # Without it the processor warns of its sizes, which are not used.
            if budget and hasattr(self.processing_class.video_processor, "cap_pixels_per_frame"):
                videos_kwargs["cap_pixels_per_frame"] = False
            if getattr(type(self.processing_class), "videos_kwargs", {}).get("do_resize") is False:
                videos_kwargs["do_resize"] = True  # MiniMax-M3 leaves it to others, and fails on other sizes
            # Muse writes times into its prompts, and does not ask for them.
            if type(self.processing_class).__call__ is ProcessorMixin.__call__:
                videos_kwargs["return_metadata"] = True
            if videos_kwargs:
                kwargs["videos_kwargs"] = videos_kwargs
        try:
            out = self.processing_class(text=[text], return_tensors="pt", text_kwargs=WHOLE, **kwargs)
        except REFUSALS as error:
            name = type(self.processing_class).__name__
            raise RowError(f"{name} refuses its prompt and media: {type(error).__name__}: {error}") from error
        skipped = getattr(getattr(self.processing_class, "image_processor", None), "skip_tensor_conversion", None)
        if lists := [name for name in skipped or () if name in out]:  # of Unlimited-OCR, and no batch could hold them
            name = type(self.processing_class).__name__
            raise RowError(f"{name} gives {', '.join(lists)} as lists, and only tensors reach the model.")
        pixels = [k for k, v in out.items() if "pixel_values" in k and torch.is_tensor(v)]
        floats = {k: out[k].to(self.pixel_dtype or out[k].dtype) for k in pixels if out[k].is_floating_point()}
        return {**out, **floats}

    def whole(self, row: Row) -> dict[str, torch.Tensor]:
        """Return what the processor makes of the prompt and the chosen response together, as inputs of the model."""
        prompt, (chosen,) = self._render(row, ("chosen",))
        first = self._first_tokens(row, prompt)
        if self.is_vlm:
            out = self._processed(prompt + chosen, trunk_media(row, self)[0])
        else:
            out = self.tokenizer(prompt + chosen, return_tensors="pt", **WHOLE)
        out = {name: value for name, value in out.items() if torch.is_tensor(value) and name != "labels"}
        shape = out["input_ids"].shape
        for name, value in out.items() if first else ():  # as in a trunk
            if value.shape[:2] == shape:
                front = value.new_zeros(1, len(first), *value.shape[2:]) + (name == "attention_mask")
                out[name] = torch.cat([front, value], dim=1)
        out["input_ids"][0, : len(first)] = torch.tensor(first, dtype=torch.long)
        return out

    def _frames(self, clip: Clip) -> np.ndarray:
        """Return a clip's frames; one alone is repeated for towers that take two at a time: Qwen3-VL refuses it."""
        missing = (getattr(self.processing_class.video_processor, "temporal_patch_size", None) or 1) - len(clip.frames)
        return clip.frames if missing <= 0 else np.concatenate([clip.frames, clip.frames[-1:].repeat(missing, axis=0)])


def _spans_in(
    response: str, row: Row, side: str, tail: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Span], int]:
    """Return the phrases, and how far the template moves them: some strip a response, or put thoughts in front.

    What a template puts in front may say the same: the text is what ends where the template's end of turn begins.
    """
    text, spans = response_text(getattr(row, side)), getattr(row, f"{side}_phrases")
    head, body = response.rstrip().removesuffix(tail).rstrip(), text.strip()
    if not head.endswith(body):  # the data bring the end of turn
        body = without_ends(body, tail, tokenizer).rstrip()
    if not head.endswith(body):
        raise RowError(
            f"the chat template changes the text of the {side} response; phrases cannot be located. The text: "
            f"{text[:300]!r}; the template's: {response[:300]!r}."
        )
    low, high = len(text) - len(text.lstrip()), len(text.rstrip())
    moved = len(head) - len(body) - low
    if moved >= 0 and response[moved : moved + len(text)] == text:
        return spans, moved
    # The part of each phrase that is left when the text is stripped: behind it stands the end of the turn.
    for start, end in spans:
        if max(start, low) >= min(end, high):
            raise PhraseError(
                f"the phrase at characters [{start}, {end}) of the {side} response is white space that the chat "
                "template strips. Leave it out."
            )
    return [(max(start, low), min(end, high)) for start, end in spans], moved
