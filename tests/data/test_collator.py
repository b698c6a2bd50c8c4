"""Rows -> tree batch, against literal tokens and against the processor's own output."""

from types import SimpleNamespace

import pytest
import torch
from families import QWEN_TEMPLATE, QWEN_TOKENS, build, template, text_model, tokenizer
from helpers import message, row, write_clip, write_image
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    Cosmos3EdgeImageProcessor,
    Cosmos3EdgeProcessor,
    Cosmos3EdgeVideoProcessor,
    GitProcessor,
    UnlimitedOcrImageProcessor,
    UnlimitedOcrProcessor,
)

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.errors import RowError
from trl_vpo.forward.layouts import padded
from trl_vpo.media.load import VideoOptions, load_image
from trl_vpo.media.masking import masked_image_list

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
EIGHT = VideoOptions(num_frames=8)


@pytest.fixture(scope="module")
def qwen():
    return build("Qwen2.5-VL")[1]


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "a.mp4", frames=20)


@pytest.fixture
def picture(tmp_path):
    return write_image(tmp_path / "a.png", (100, 60))


def text_of(processor, ids):
    return processor.tokenizer.decode(ids)


def test_literal_tensors_of_a_text_batch():
    tok = text_model()[1]
    batch = PreferenceCollator(tok)([row(None, chosen="red", rejected="a red square"), row(None)])
    start = tok("<|im_start|>user\nWhat is in the picture?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert batch["trunk_ids"].tolist() == [start, start]
    answers = ["red", "a red square", "a red square moves left.", "a blue circle moves left."]
    ids = [tok(f"{a}<|im_end|>\n")["input_ids"] for a in answers]
    width = max(map(len, ids))
    assert batch["branch_ids"].tolist() == [i + [tok.pad_token_id] * (width - len(i)) for i in ids]
    assert batch["branch_mask"].tolist() == [[True] * len(i) + [False] * (width - len(i)) for i in ids]
    assert batch["branch_trunk"].tolist() == [0, 0, 1, 1]
    assert (batch["chosen"].tolist(), batch["rejected"].tolist()) == ([0, 2], [1, 3])
    assert "phrase_mask" not in batch and "image_branches" not in batch
    assert next(iter(batch.values())).shape[0] == 2  # the batch size that accelerate reads off


def test_strings_get_an_end_of_sequence_token():
    tok = text_model()[1]
    tree = PreferenceCollator(tok).encode({"prompt": "user", "chosen": " red", "rejected": " blue<|im_end|>"})
    assert [tok.decode(branch.ids) for branch in tree.branches] == [" red<|im_end|>", " blue<|im_end|>"]


def test_tokens_that_merge_across_the_seam_are_the_responses():
    tok = tokenizer(corpus=["ab abc abcd"] * 50, vocab_size=300)
    assert len(tok(" abc")["input_ids"]) == len(tok(" abcd")["input_ids"]) == 1  # " ab" + "c" is one token
    tree = PreferenceCollator(tok).encode({"prompt": "abc ab", "chosen": "c", "rejected": "cd"})
    whole = tree.trunks[0].ids + tree.branches[0].ids
    assert whole == tok("abc abc<|im_end|>")["input_ids"]
    assert tree.trunks[0].ids == tok("abc")["input_ids"]
    assert tree.trunks[0].ids + tree.branches[1].ids == tok("abc abcd<|im_end|>")["input_ids"]


def test_a_bos_token_is_added_as_in_generation(picture):
    """Templates of the LLaVA family carry no BOS; `apply_chat_template(tokenize=True)` adds it, and so do we."""
    processor = build("LLaVA-1.5")[1]
    tok = processor.tokenizer
    tok.bos_token = "<|im_start|>"  # the template begins with it: it must not come twice
    single = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tok.bos_token_id)])
    tok.backend_tokenizer.post_processor = single
    for written in (processor.chat_template, processor.chat_template.replace("<|im_start|>", "#")):
        processor.chat_template = written
        tree = PreferenceCollator(processor).encode(row("image", [picture]))
        messages = message("user", "<image>", "What is in the picture?")
        messages[0]["content"][0]["image"] = load_image(picture)
        want = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert tree.trunks[0].ids == want["input_ids"][0].tolist()
        assert tree.trunks[0].ids[0] == tok.bos_token_id != tree.trunks[0].ids[1]


def test_phrases_are_marked_on_their_tokens(qwen):
    batch = PreferenceCollator(qwen, phrases=True)([row(None)])
    ids, mask = batch["branch_ids"], batch["phrase_mask"]
    assert text_of(qwen, ids[0][mask[0]]) == " red square" and text_of(qwen, ids[1][mask[1]]) == " blue circle"
    assert not (mask & ~batch["branch_mask"]).any()


@pytest.fixture
def stripping(qwen, monkeypatch):
    """A processor whose template strips what messages say."""
    monkeypatch.setattr(qwen, "chat_template", qwen.chat_template.replace("{{ c['text'] }}", "{{ c['text'] | trim }}"))
    return qwen


def marked(processor, branch):
    return text_of(processor, [i for i, on in zip(branch.ids, branch.phrases) if on])


def test_phrases_end_where_a_stripped_response_does(stripping):
    example = row(None, chosen=" \n a red square. \n", rejected="a blue square.", rejected_phrases=[[2, 6]])
    collator = PreferenceCollator(stripping, phrases=True)
    for span, want in (([5, 8], " red"), ([5, 18], " red square."), ([0, 8], "a red"), ([0, 18], "a red square.")):
        branch = collator.encode(example | {"chosen_phrases": [span]}).branches[0]
        assert marked(stripping, branch) == want
    for span in ([0, 2], [16, 18]):
        with pytest.raises(RowError, match=rf"phrase at characters \[{span[0]}, {span[1]}\) of the chosen"):
            collator.encode(example | {"chosen_phrases": [span]})


def test_token_types_are_asked_for(picture):
    """Where a processor names them among its outputs, and gives them only then."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    images, videos = Cosmos3EdgeImageProcessor(size=size), Cosmos3EdgeVideoProcessor(size=size)
    tok = tokenizer(QWEN_TOKENS.values())
    processor = Cosmos3EdgeProcessor(images, tok, videos, chat_template=QWEN_TEMPLATE)
    batch = PreferenceCollator(processor)([row("image", [picture])])
    types = (batch["trunk_ids"] == processor.image_token_id).long()
    assert types.any() and torch.equal(batch["trunk_types"]["mm_token_type_ids"], types)


def test_media_in_lists_are_refused(picture):
    tok = tokenizer(["<image>"])
    processor = UnlimitedOcrProcessor(UnlimitedOcrImageProcessor(), tok, chat_template=template("<image>"))
    with pytest.raises(RowError, match="gives num_local_patches, patches_grid as lists"):
        PreferenceCollator(processor)([row("image", [picture])])


def test_images_are_scaled_to_max_pixels(qwen, picture):
    small = PreferenceCollator(qwen, max_pixels=30 * 50).encode(row("image", [picture])).trunks[0].media
    want = qwen.image_processor(images=[load_image(picture, max_pixels=1500)], return_tensors="pt")
    assert torch.equal(small["pixel_values"], want["pixel_values"])


def test_lpoi_draws_its_list_and_repeats_the_chosen_response(qwen, picture):
    collator = PreferenceCollator(qwen, media_form="ranking", num_images=4)
    box = [10, 20, 60, 50]
    listed = row("image", [], image_list=[picture, picture]) | {"prompt": message("user", "<image>", "What?")}
    batch = collator([row("image", [picture], critical_box=box), listed])
    assert batch["image_branches"].tolist() == [[0, 2, 3, 4], [5, 7, -1, -1]]
    assert batch["branch_trunk"].tolist() == [0, 0, 1, 2, 3, 4, 4, 5]
    ids = batch["branch_ids"]
    assert all(torch.equal(ids[0], ids[k]) for k in (2, 3, 4)) and not torch.equal(ids[0], ids[1])
    for k, item in enumerate(masked_image_list(load_image(picture), box, 4)):
        want = qwen.image_processor(images=[item], return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["media"][k]["pixel_values"], want)


def test_padded_rows_read_as_prompt_then_response(qwen, clip):
    batch = PreferenceCollator(qwen, video=EIGHT)(
        [row("video", [clip]), row(None, chosen="yes", rejected="no, never")]
    )
    backbone = SimpleNamespace(config=SimpleNamespace(model_type="qwen2_vl"))
    layout = padded(batch, backbone, pad_token_id=qwen.tokenizer.pad_token_id, pad_to_multiple_of=32)
    ids, mask = layout.inputs["input_ids"], layout.inputs["attention_mask"]
    assert ids.size(1) % 32 == 0
    for s, (trunk, branch) in enumerate(zip(batch["branch_trunk"], batch["branch_ids"])):
        prompt = batch["trunk_ids"][trunk][batch["trunk_mask"][trunk]]
        response = branch[batch["branch_mask"][s]]
        assert ids[s][mask[s].bool()].tolist() == torch.cat([prompt, response]).tolist()
        assert (ids[s][~mask[s].bool()] == qwen.tokenizer.pad_token_id).all()
        read = layout.positions[s][layout.mask[s]] + 1  # the next column holds the token that is predicted
        assert ids[s][read].tolist() == response.tolist()
    assert layout.inputs["video_grid_thw"].size(0) == 2  # the clip stands in both sequences of its pair
    types = layout.inputs["mm_token_type_ids"]
    assert types[0].sum() > 0 and types[2].sum() == 0


def test_a_row_over_max_length_is_an_error_with_its_count(qwen, clip):
    tree = PreferenceCollator(qwen, video=EIGHT).encode(row("video", [clip]))
    prompt, longest = len(tree.trunks[0].ids), max(len(b.ids) for b in tree.branches)
    PreferenceCollator(qwen, video=EIGHT, max_length=prompt + longest).encode(row("video", [clip]))
    tight = PreferenceCollator(qwen, video=EIGHT, max_length=prompt + longest - 1)
    with pytest.raises(RowError, match=rf"row 5: {prompt} prompt tokens and {longest} response tokens are more than"):
        tight.encode(row("video", [clip]) | {"_row_index": 5})


def test_bad_media_name_the_row_and_the_file(qwen, tmp_path):
    with pytest.raises(RowError, match=r"row 2 \(id 'v'\): .*gone\.mp4"):
        PreferenceCollator(qwen).encode(row("video", [str(tmp_path / "gone.mp4")], id="v") | {"_row_index": 2})


@pytest.mark.parametrize("prompt", ["What is it?", "<image>What is it?", VISION + "What is it?"])
def test_media_stand_in_string_prompts(qwen, picture, prompt):
    example = {"prompt": prompt, "chosen": "A", "rejected": "B", "images": [picture]}
    trunk = PreferenceCollator(qwen).encode(example).trunks[0]
    image = "<|image_pad|>" * (int(trunk.media["image_grid_thw"].prod()) // 4)
    assert text_of(qwen, trunk.ids) == f"<|vision_start|>{image}<|vision_end|>What is it?"


def test_placeholders_of_a_string_prompt_must_fit_its_media(qwen, picture):
    example = {"prompt": "<image> and <image>?", "chosen": "A", "rejected": "B", "images": [picture]}
    for prompt in (example["prompt"], VISION * 2):
        with pytest.raises(RowError, match=r"2 image placeholder\(s\) \('<\|vision_start\|>.*, but the row has 1"):
            PreferenceCollator(qwen).encode(example | {"prompt": prompt})


def test_a_video_for_a_family_without_videos_is_refused(clip):
    processor = build("LLaVA-1.5")[1]
    with pytest.raises(RowError, match="row 0: has videos, but LlavaProcessor takes none"):
        PreferenceCollator(processor).encode(row("video", [clip]) | {"_row_index": 0})


def test_a_string_needs_to_know_what_an_image_is(picture):
    """Of models that see an image beside their prompt."""
    processor = GitProcessor(CLIPImageProcessor(), tokenizer())
    with pytest.raises(RowError, match="GitProcessor has neither a chat template nor a token of images"):
        PreferenceCollator(processor)([{"prompt": "What?", "chosen": "a", "rejected": "b", "images": [picture]}])


def test_messages_need_a_chat_template():
    tok = text_model()[1]
    tok.chat_template = None
    with pytest.raises(RowError, match="has no chat template"):
        PreferenceCollator(tok).encode(row(None))


@pytest.mark.parametrize("trims, b", [(False, "b<|im_end|>"), (True, "b<|im_end|>"), (True, " b "), (True, None)])
def test_pairs_of_the_same_tokens_are_refused(trims, b):
    tok = text_model()[1]
    if trims:
        tok.chat_template = tok.chat_template.replace("m['content'] }}", "m['content'] | trim }}")
    example = row(None, chosen="b", rejected=b or "b")
    if b is None:
        example["rejected"][0]["reasoning_content"] = "It is b."
    same = r"^row: chosen and rejected have the same tokens.*'b<\|im_end\|>|`reasoning_content`"
    with pytest.raises(RowError, match=same):
        PreferenceCollator(tok).encode(example)


def test_strings_of_the_same_tokens_are_refused():
    with pytest.raises(RowError, match="chosen and rejected have the same tokens"):
        PreferenceCollator(text_model()[1]).encode({"prompt": "q ", "chosen": "b", "rejected": "b<|im_end|>"})


@pytest.mark.parametrize("header", ["Assistant: ", "<think>A or B?</think>\n", "ABBA "])
@pytest.mark.parametrize("text", ["A", "A<|im_end|>", "A A"])
def test_phrases_are_not_marked_in_what_a_template_adds(header, text):
    tok = text_model()[1]
    written = "{% if m['role'] == 'assistant' %}{{ 'HEADER' }}{% endif %}{{ m['content'] }}".replace("HEADER", header)
    tok.chat_template = tok.chat_template.replace("{{ m['content'] }}", written.replace("\n", "\\n"))
    example = row(None, chosen=text, rejected="B") | {"chosen_phrases": [[0, 1]], "rejected_phrases": [[0, 1]]}
    for branch, want in zip(PreferenceCollator(tok, phrases=True).encode(example).branches, (text, "B")):
        at = [i for i, on in enumerate(branch.phrases) if on]
        assert tok.decode(branch.ids[: at[0]]) == header
        assert tok.decode(branch.ids[at[0] :]) == want.removesuffix("<|im_end|>") + "<|im_end|>\n"
