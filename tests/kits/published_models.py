"""The models of the recipes as they are published: configs of their sizes, and processors that give as many tokens.

Nothing is downloaded. The tokenizers are tiny, so ids of media tokens are others; vocabularies have their sizes.
`PARAMETERS` says how many numbers each checkpoint holds.
"""

import transformers as T
from families import QWEN_TEMPLATE, QWEN_TOKENS, template, tokenizer

KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
KEYS += ("vocab_size", "tie_word_embeddings")
QWEN = {7: (3584, 18944, 28, 28, 4, 152064, False), 3: (2048, 11008, 36, 16, 2, 151936, True)}  # by billions
LLAMA = {7: (4096, 11008, 32, 32, 32, 32064, False), 13: (5120, 13824, 40, 40, 40, 32064, False)}
QWEN2 = (3584, 18944, 28, 28, 4, 152064, False)
MISTRAL = (4096, 14336, 32, 32, 8, 32003, False)
TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
CLIP = dict(zip(TOWER, (1024, 4096, 24, 16, 14, 336))) | {"model_type": "clip_vision_model", "projection_dim": 768}
SIGLIP = dict(zip(TOWER, (1152, 4304, 26, 16, 14, 384))) | {"model_type": "siglip_vision_model"}


def text(kind, sizes, **more):
    return {"model_type": kind, **dict(zip(KEYS, sizes)), "max_position_embeddings": 32768, **more}


# --- Qwen ---------------------------------------------------------------------------------------------------------


def _qwen(kind, billions, vision):
    tok = tokenizer(QWEN_TOKENS.values())
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    sizes = dict(zip(KEYS, QWEN[billions]))
    config = getattr(T, f"{kind}Config")(
        text_config={**sizes, "rope_parameters": rope},
        vision_config={"depth": 32, "num_heads": 16, "patch_size": 14, **vision},
        tie_word_embeddings=sizes["tie_word_embeddings"],
        architectures=[f"{kind}ForConditionalGeneration"],
        **{name: tok.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()},
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    images, videos = T.Qwen2VLImageProcessor(size=size), T.Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    return config, getattr(T, f"{kind}Processor")(images, tok, videos, chat_template=QWEN_TEMPLATE)


def qwen2_5_vl(billions):
    width = QWEN[billions][0]
    return _qwen("Qwen2_5_VL", billions, {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": width})


def qwen2_vl():
    return _qwen("Qwen2VL", 7, {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4})


# --- LLaVA, Idefics -----------------------------------------------------------------------------------------------

CLIP_SIZE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
CLIP_PROCESSOR = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}


def _llava(kind, tok, sizes, vision):
    ids = {f"{k}_token_index": tok.convert_tokens_to_ids(f"<{k}>") for k in ("image", "video")}
    if "<video>" not in tok.get_vocab():
        del ids["video_token_index"]
    config = getattr(T, f"{kind}Config")(text_config=sizes, vision_config=vision, **ids)
    config.architectures = [f"{kind}ForConditionalGeneration"]
    return config


def llava_1_5(billions):
    tok = tokenizer(["<image>"])
    processor = T.LlavaProcessor(
        T.LlavaImageProcessor(**CLIP_SIZE), tok, chat_template=template("<image>"), **CLIP_PROCESSOR
    )
    return _llava("Llava", tok, text("llama", LLAMA[billions]), CLIP), processor


def llava_next_video():
    tok = tokenizer(["<image>", "<video>"])
    config = _llava("LlavaNextVideo", tok, text("llama", LLAMA[7]), CLIP)
    processor = T.LlavaNextVideoProcessor(
        video_processor=T.LlavaNextVideoVideoProcessor(**CLIP_SIZE),
        image_processor=T.LlavaNextImageProcessor(**CLIP_SIZE, image_grid_pinpoints=config.image_grid_pinpoints),
        tokenizer=tok,
        chat_template=template("<image>", "<video>"),
        **CLIP_PROCESSOR,
    )
    return config, processor


def llava_onevision():
    tok = tokenizer(["<image>", "<video>"])
    config = _llava("LlavaOnevision", tok, text("qwen2", QWEN2), SIGLIP | {"vision_use_head": False})
    square = {"height": 384, "width": 384}
    processor = T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=config.image_grid_pinpoints),
        tok,
        T.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )
    return config, processor


def idefics2():
    tok = tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    config = T.Idefics2Config(
        text_config=text("mistral", MISTRAL),
        vision_config=dict(zip(TOWER, (1152, 4304, 27, 16, 14, 980))),
        perceiver_config={"hidden_size": 4096},  # 64 latents of an image; the other sizes are the class's
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        architectures=["Idefics2ForConditionalGeneration"],
    )
    size = {"shortest_edge": 378, "longest_edge": 980}
    images = T.Idefics2ImageProcessor(size=size, do_image_splitting=True)
    return config, T.Idefics2Processor(images, tok, image_seq_len=64, chat_template=template("<image>"))


# --- the tables ---------------------------------------------------------------------------------------------------

PARAMETERS = {  # of the checkpoints, as others counted or published them
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    # Not confirmed, but for the rounded numbers of the model cards: that is what the configs here have.
    "llava-hf/LLaVA-NeXT-Video-7B-hf": 7_063_431_168,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8_030_348_832,
    "llava-hf/llava-1.5-13b-hf": 13_351_494_656,
    "HuggingFaceM4/idefics2-8b": 8_402_768_112,
}
PUBLISHED = {  # as recipes name them
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda: qwen2_5_vl(3),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda: qwen2_5_vl(7),
    "Qwen/Qwen2-VL-7B-Instruct": qwen2_vl,
    "llava-hf/LLaVA-NeXT-Video-7B-hf": llava_next_video,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": llava_onevision,
    "llava-hf/llava-1.5-7b-hf": lambda: llava_1_5(7),
    "llava-hf/llava-1.5-13b-hf": lambda: llava_1_5(13),
    "HuggingFaceM4/idefics2-8b": idefics2,
}
