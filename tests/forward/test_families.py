"""How media of several sequences become one call, what a response adds to its prompt, and what no call takes."""

from types import SimpleNamespace

import families
import pytest
import torch
import transformers as T
from accelerate import init_empty_weights
from families_newer import NEWER, build
from helpers import row
from peft import LoraConfig, get_peft_model
from trainer_kit import trainer_of

from trl_vpo import PreferenceCollator
from trl_vpo.data.accepted import check_accepted
from trl_vpo.data.blank import blank_encoder
from trl_vpo.data.rows import read_row
from trl_vpo.errors import ModelError, RowError
from trl_vpo.forward import families as table
from trl_vpo.forward.families import merge_media
from trl_vpo.forward.layouts import padded
from trl_vpo.forward.mixed import unlike_images
from trl_vpo.forward.scoring import ScoreRequest, attach_scoring
from trl_vpo.forward.vision import vision_features
from trl_vpo.models.adapters import preset_targets
from trl_vpo.models.model_size import own_class


def backbone(model_type):
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type))


def numbers(*shape, start=0):
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def test_patches_in_the_last_dimension_are_joined_there():
    first, second = numbers(1, 2, 1, 2), numbers(1, 2, 1, 3, start=4)
    merged = merge_media([{"pixel_values": first}, {}, {"pixel_values": second}], backbone("minicpmv4_6"))
    assert merged["pixel_values"].tolist() == [[[[0, 1, 4, 5, 6]], [[2, 3, 7, 8, 9]]]]


def test_tiles_are_joined_without_padding():
    """Perception LM makes features of every tile."""
    first, second = numbers(1, 2, 1), numbers(2, 3, 1, start=2)
    merged = merge_media([{"pixel_values": first}, {"pixel_values": second}], backbone("perception_lm"))
    assert merged["pixel_values"].tolist() == [[[0], [1], [2], [3], [4], [5], [6], [7]]]


def test_indices_count_from_the_own_media():
    """Molmo2's pooling: crops of two patches; -1 is no patch."""
    items = [
        {"pixel_values": numbers(2, 2, 1), "image_token_pooling": torch.tensor([[0, 3]])},
        {},
        {"pixel_values": numbers(1, 2, 1), "image_token_pooling": torch.tensor([[1, -1]])},
        {"pixel_values": numbers(1, 2, 1), "image_token_pooling": torch.tensor([[0, 1]])},
    ]
    merged = merge_media(items, backbone("molmo2"))
    assert merged["image_token_pooling"].tolist() == [[0, 3], [5, -1], [6, 7]]


@pytest.mark.parametrize(("family", "rows"), [("idefics3", 2), ("smolvlm", 2), ("lfm2_vl", 1)])
def test_only_idefics_has_a_row_for_each_sequence(family, rows):
    shape = (1, 1, 3, 4, 4) if rows == 2 else (1, 4, 8)
    media = {"pixel_values": numbers(*shape), "pixel_attention_mask": torch.ones(shape[:2])}
    assert len(merge_media([{}, media], backbone(family))["pixel_values"]) == rows


def test_a_response_sees_the_images_of_its_prompt():
    """Mllama's mask (1, tokens, images, tiles) repeats its last entry, in sequences of unlike lengths, too."""
    masks = [{"cross_attention_mask": torch.tensor(x).reshape(1, -1, 1, 1)} for x in ([0, 1], [0, 1, 1])]
    merged = merge_media(masks, backbone("mllama"), length=5)
    assert merged["cross_attention_mask"].flatten(1).tolist() == [[0, 1, 1, 1, 1]] * 2


def test_unlike_images_are_computed_apart():
    one, two = ({"pixel_values": torch.zeros(1, n, 4, 3, 2, 2)} for n in (1, 2))
    assert unlike_images([one, one], backbone("mllama")) is unlike_images([one, {}], backbone("qwen2_vl")) is None
    split, calls = unlike_images([two, {}, one, {}], backbone("mllama")), []

    def compute(**kwargs):
        calls.append({name: values.flatten().tolist() for name, values in kwargs.items()})
        return kwargs["input_ids"].unsqueeze(-1)

    ids, pixels = torch.tensor([[1], [2], [3], [4]]), numbers(4, 2)
    hidden = split.in_parts(torch.nn.Linear(1, 1), compute, input_ids=ids, pixel_values=pixels)
    assert hidden.flatten().tolist() == [1, 2, 3, 4]
    assert calls == [
        {"input_ids": [2, 4]},
        {"input_ids": [3], "pixel_values": [4]},
        {"input_ids": [1], "pixel_values": [0, 1]},
    ]
    sharded = torch.nn.Linear(1, 1)
    sharded.weight.ds_id = 0
    with pytest.raises(RowError, match=r"these have \[0, 1, 2\]. Set per_device_train_batch_size"):
        split.in_parts(sharded, compute, input_ids=ids)


def test_responses_are_no_prefix(media):
    """PaliGemma's tokens of type 0 see each other in both directions."""
    model, processor = build("PaliGemma")
    made = {"images": media["image"][:1], "prompt": "<image>What is it?", "chosen": "a red square.", "rejected": "a."}
    batch = PreferenceCollator(processor)([made])
    assert list(batch["trunk_types"]) == ["token_type_ids"]  # not its labels
    layout = padded(batch, model.base_model, pad_token_id=0)
    prompt = int(batch["trunk_mask"].sum())
    assert not layout.inputs["token_type_ids"][:, :prompt].any() and layout.inputs["token_type_ids"][:, prompt:].all()


def test_a_prompt_mask_follows_the_tokens_in_front(media):
    """A prompt that is a string gets its BOS from us: the mask begins with a token that sees no image."""
    _, processor = build("Mllama")
    made = {
        "images": media["image"][:1],
        "prompt": "<|image|>What is it?",
        "chosen": "a red square.",
        "rejected": "a.",
    }
    trunk = PreferenceCollator(processor).encode(made).trunks[0]
    assert trunk.ids[0] == processor.tokenizer.bos_token_id
    mask = trunk.media["cross_attention_mask"]
    assert mask.size(1) == len(trunk.ids) and not mask[0, 0].any() and mask[0, -1].any()


def test_no_bos_where_the_processor_asks_for_none(media):
    _, processor = build("LFM2-VL")
    made = {"images": media["image"][:1], "prompt": "<image>What is it?", "chosen": "a red square.", "rejected": "a."}
    trunk = PreferenceCollator(processor).encode(made).trunks[0]
    assert processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id not in trunk.ids


def test_blank_rows_of_a_processor_that_names_its_images(media):
    """Nemotron-H-Omni's calls its image processor by keyword."""
    collator, made = PreferenceCollator(build("Nemotron-H Omni")[1]), read_row(row("image", media["image"][:1]))
    assert blank_encoder(collator)(made).trunks[0].ids == collator.encode_row(made).trunks[0].ids


def test_frames_get_the_size_of_their_model(media):
    """MiniMax-M3's processor resizes none by itself, and its patches need sides that are multiples of 28."""
    trunk = PreferenceCollator(build("MiniMax-M3-VL")[1]).encode(row("video", media["video"][:1])).trunks[0]
    assert not (trunk.media["video_grid_thw"][:, 1:] % 2).any()


PROMPTS = {
    "Kimi K2.5": ["video"],
    "Nemotron-H Omni": ["video"],
    "GLM-4.6V": ["image", "video"],
    "Molmo2": ["image", "video"],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_fail_upstream_are_refused(name, media):
    made = row(PROMPTS[name][-1], media[PROMPTS[name][-1]][:1])
    if len(PROMPTS[name]) == 2:
        made |= {"images": media["image"][:1]}
        made["prompt"][0]["content"].insert(0, {"type": "image"})
    with pytest.raises(RowError, match=r"has (images and )?videos in its prompt, on which the model's own"):
        check_accepted(read_row(made), NEWER[name].build()[1])


@pytest.mark.parametrize(
    ("name", "preset", "trained"),
    [
        ("Mllama", "language", True),
        ("Phi-4-multimodal", "language", False),
        ("Phi-4-multimodal", "language+projector", True),
        ("Llama 4", "language", False),
        ("Llama 4", "language+projector", True),
    ],
)
def test_what_rows_without_images_do_not_pass(name, preset, trained):
    """Ranks whose rows have no images are given one, where others would wait for its gradients."""
    model, _ = build(name)
    get_peft_model(model, LoraConfig(target_modules=preset_targets(model, preset)[0]))
    assert vision_features(model.base_model).trained == trained


def test_encoder_decoders_are_refused():
    config = T.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is not supported: it has an encoder"):
        attach_scoring(T.T5ForConditionalGeneration(config))


def test_models_that_write_nothing_are_refused(tmp_path):
    """Before TRL is called, which fails at their missing `generation_config`."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = T.Qwen2ForSequenceClassification(T.Qwen2Config(vocab_size=360, **sizes, pad_token_id=0))
    with pytest.raises(ModelError, match="Qwen2ForSequenceClassification is not supported: it generates no text"):
        trainer_of("dpo", tmp_path, model=model, processor=families.tokenizer())


def test_models_that_prepend_their_images_are_refused():
    """GIT puts images in front of the tokens: all scores would be those of other places."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    model = T.GitForCausalLM(T.GitConfig(vision_config=vision, vocab_size=16, **sizes, pad_token_id=0))
    attach_scoring(model)
    ids, mask = torch.ones(1, 4).long(), torch.ones(1, 1).bool()
    request = ScoreRequest(torch.zeros(1).long(), torch.zeros(1, 1).long(), mask, torch.zeros(1, 1).long())
    with pytest.raises(ModelError, match="GitForCausalLM is not supported: it computes 9 positions for 4 tokens"):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8), score=request)


def test_models_that_need_images_are_refused():
    text = {"model_type": "opt", "hidden_size": 8, "num_hidden_layers": 1, "ffn_dim": 8, "num_attention_heads": 1}
    config = T.Blip2Config(text_config=text)
    with init_empty_weights():
        model = T.Blip2ForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"Blip2ForConditionalGeneration is not supported: .*pixel_values"):
        attach_scoring(model)


def test_parts_that_write_are_named():
    """Qwen-Omni speaks, too."""
    config = T.Qwen2_5OmniConfig(architectures=["Qwen2_5OmniModel"])
    with pytest.raises(ModelError, match=r"a whole qwen2_5_omni .* Qwen2_5OmniThinker\w+\.from_pretrained"):
        own_class(config)
    with pytest.raises(ModelError, match="DiffusionGemmaForBlockDiffusion is not supported: it writes blocks"):
        own_class(T.DiffusionGemmaConfig(architectures=["DiffusionGemmaForBlockDiffusion"]))


def test_every_entry_is_a_type_of_transformers():
    assert set(table.FAMILIES) <= set(T.CONFIG_MAPPING)
    assert {processor for processor, _ in table.UPSTREAM} <= set(dir(T))
    assert families.FAMILIES.keys().isdisjoint(NEWER)
