"""Tiny models of families that cut large images into tiles: Cohere's, LFM2-VL, Ovis2, MiniCPM-V, Molmo2, Phi-4."""

import transformers as T
from families import SQUARE, ids, template, text_of, tokenizer, tower
from families_parts import SIGLIP, WINDOWS, Family, bos_template, bos_tokenizer, number, numbers
from families_qwen import LINEAR

COHERE = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
COHERE |= {"img_line_break_token": "<|IMG_LINE_BREAK|>"}
COHERE_TEXT = WINDOWS | {"logit_scale": 0.25}


def aya_vision():
    marks = ["<image>", *COHERE.values(), "TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 5))]
    tok = bos_tokenizer(marks, bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>")
    images = T.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    config = T.AyaVisionConfig(
        vision_config=tower("siglip_vision_model", **SIGLIP),
        text_config=text_of(tok, "cohere2", **COHERE_TEXT),
        downsample_factor=2,
        **numbers(tok, "index", image="<|IMG_PATCH|>"),
        **ids(tok),
    )
    sizes = {"patch_size": 14, "img_size": 56, "downsample_factor": 2}
    processor = T.AyaVisionProcessor(images, tok, **sizes, chat_template=bos_template("<image>"))
    return T.AyaVisionForConditionalGeneration(config), processor


def cohere2_vision():
    """Its processor writes `patch_size` squared tokens for a tile, which is then the side of a tile's grid."""
    tok = bos_tokenizer(named=COHERE, bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>")
    images = T.Cohere2VisionImageProcessor(size={"height": 64, "width": 64}, patch_size=4, max_patches=4)
    config = T.Cohere2VisionConfig(
        vision_config=tower("siglip_vision_model", **SIGLIP, image_size=64, patch_size=8),
        text_config=text_of(tok, "cohere2", **COHERE_TEXT),
        downsample_factor=2,
        alignment_intermediate_size=64,
        **numbers(tok, image="<|IMG_PATCH|>"),
    )
    processor = T.Cohere2VisionProcessor(images, tok, chat_template=bos_template("<|IMG_PATCH|>"))
    return T.Cohere2VisionForConditionalGeneration(config), processor


def lfm2_vl():
    grid = [f"<|img_row_{r}_col_{c}|>" for r in range(1, 4) for c in range(1, 4)]
    marks = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *grid]
    tok = bos_tokenizer(marks, bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>")
    images = T.Lfm2VlImageProcessor(
        downsample_factor=2,
        do_image_splitting=False,
        min_image_tokens=1,
        max_image_tokens=8,
        encoder_patch_size=14,
        tile_size=56,
        size=SQUARE,
    )
    vision = tower("siglip2_vision_model", **SIGLIP, num_patches=16)
    del vision["image_size"]
    config = T.Lfm2VlConfig(
        vision_config=vision,
        text_config=text_of(tok, "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        downsample_factor=2,
        projector_hidden_size=32,
        **numbers(tok, image="<image>"),
        **ids(tok),
    )
    processor = T.Lfm2VlProcessor(images, tok, chat_template=bos_template("<image>"))
    return T.Lfm2VlForConditionalGeneration(config), processor


def ovis2():
    """An image is a row of probabilities over a visual vocabulary."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tok = tokenizer(["<image>", "<IMG_ATOM>", *marks])
    images = T.Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2)
    config = T.Ovis2Config(
        vision_config=tower(vocab_size=64, hidden_stride=2, num_visual_indicator_tokens=5),
        text_config=text_of(tok, "qwen2"),
        visual_indicator_token_ids=[number(tok, mark) for mark in marks],
        vocab_size=len(tok),
        hidden_size=32,
        **numbers(tok, image="<IMG_ATOM>"),
        **ids(tok),
    )
    processor = T.Ovis2Processor(images, tok, image_seq_length=4, chat_template=template("<image>"))
    return T.Ovis2ForConditionalGeneration(config), processor


MINICPM = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
MINICPM |= {"image_start_token": "<image>", "image_end_token": "</image>"}
MINICPM |= {"slice_start_token": "<slice>", "slice_end_token": "</slice>"}
MINICPM |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}


def _minicpm(version, rope=None, **more):
    kind, tok = f"MiniCPMV{version}", tokenizer(MINICPM.values(), named=MINICPM)
    sizes = {"scale_resolution": 56, "patch_size": 14, "max_slice_nums": 2, "downsample_mode": "16x"}
    processor = getattr(T, f"{kind}Processor")(
        T.MiniCPMV4_6ImageProcessor(**sizes),
        T.MiniCPMV4_6VideoProcessor(**sizes | {"max_slice_nums": 1}),
        tok,
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **(rope or {})}
    vision = tower(num_hidden_layers=3, num_attention_heads=2, image_size=112, insert_layer_id=1)
    config = getattr(T, f"{kind}Config")(
        text_config=text_of(tok, "qwen3_5_text", **LINEAR, rope_parameters=rope),
        vision_config=vision,
        insert_layer_id=1,
        image_size=56,
        **numbers(tok, image="<|image_pad|>", video="<|video_pad|>"),
        **{name: number(tok, token) for name, token in more.items()},
    )
    return getattr(T, f"{kind}ForConditionalGeneration")(config), processor


def minicpmv4_6():
    return _minicpm("4_6")


def minicpmv4_7():
    marks = {"image_start_id": "<image>", "image_end_id": "</image>", "newline_id": "Ċ"}
    marks |= {"slice_start_id": "<slice>", "slice_end_id": "</slice>"}
    return _minicpm("4_7", {"mrope_section": [2, 1, 1], "mrope_interleaved": True}, **marks)


def molmo2():
    names = ["<|image|>", "<|video|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>"]
    tok = tokenizer([*names, "<im_end>", "<frame_end>", "<im_low>"])
    common = {"size": SQUARE, "patch_size": 14, "pooling_size": [2, 2]}
    images = T.Molmo2ImageProcessor(**common, max_crops=2, overlap_margins=[0, 0])
    videos = T.Molmo2VideoProcessor(**common)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
    adapter = {"vision_feature_layer": [-1, -2], "hidden_size": 24, "intermediate_size": 48, "text_hidden_size": 32}
    config = T.Molmo2Config(
        vision_config=tower(**heads, image_size=[56, 56], num_position_embeddings=16),
        adapter_config=heads | adapter,
        text_config=text_of(tok, head_dim=8, additional_vocab_size=8),
        image_patch_id=number(tok, "<im_patch>"),
        **numbers(tok, image_start="<im_start>", low_res_image_start="<low_res_im_start>", image_end="<im_end>"),
        **numbers(tok, frame_start="<frame_start>", frame_end="<frame_end>"),
    )
    processor = T.Molmo2Processor(images, videos, tok, chat_template=template("<|image|>", "<|video|>"))
    return T.Molmo2ForConditionalGeneration(config), processor


def phi4_multimodal():
    """Its number of tokens is written for tiles of 448 x 448. The decoder holds the tower."""
    named = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
    tok = bos_tokenizer(named=named, bos="<|endoftext|>", eos="<|im_end|>", pad="<|pad|>", adds=False)
    processor = T.Phi4MultimodalProcessor(
        T.Phi4MultimodalImageProcessor(dynamic_hd=1),
        T.Phi4MultimodalFeatureExtractor(),
        tok,
        chat_template=template("<|image|>"),
    )
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}
    audio |= {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8}
    vision = tower(image_size=448, crop_size=448, feature_layer=-2)
    config = T.Phi4MultimodalConfig(
        **text_of(tok),
        vision_config=vision | numbers(tok, image="<|image|>"),
        audio_config=audio | numbers(tok, audio="<|audio|>"),
        original_max_position_embeddings=4096,
    )
    return T.Phi4MultimodalForCausalLM(config), processor


TILES = {
    "Aya Vision": Family(aya_vision),
    "Cohere2 Vision": Family(cohere2_vision),
    "LFM2-VL": Family(lfm2_vl),
    "Ovis2": Family(ovis2),
    "MiniCPM-V 4.6": Family(minicpmv4_6, video=True, both=True),
    "MiniCPM-V 4.7": Family(minicpmv4_7, video=True, both=True),
    "Molmo2": Family(molmo2, video=True),
    "Phi-4-multimodal": Family(phi4_multimodal),
}
