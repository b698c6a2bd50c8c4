"""Tiny models of further families: ViP-LLaVA, Video-LLaVA, EXAONE 4.5, HyperCLOVA X Vision, GLM-GA."""

import transformers as T
from families import CLIP_PROCESSOR, CLIP_SIZE, QWEN_TEMPLATE, QWEN_TOKENS, template, text_of, tokenizer, tower
from families_grids import GLM, GLM_TEMPLATE, ROPE
from families_parts import Family, numbers


def vipllava():
    """Features of several layers of its tower."""
    tok = tokenizer(["<image>"])
    config = T.VipLlavaConfig(
        vision_config=tower("clip_vision_model", projection_dim=24),
        text_config=text_of(tok, "llama"),
        vision_feature_layer=[-2, -1],
        image_seq_length=16,
        **numbers(tok, "index", image="<image>"),
    )
    processor = T.LlavaProcessor(
        T.LlavaImageProcessor(**CLIP_SIZE), tok, chat_template=template("<image>"), **CLIP_PROCESSOR
    )
    return T.VipLlavaForConditionalGeneration(config), processor


def video_llava():
    """A tower of images and one of the frames of videos."""
    tok = tokenizer(["<image>", "<video>"])
    processor = T.VideoLlavaProcessor(
        T.VideoLlavaImageProcessor(**CLIP_SIZE),
        T.VideoLlavaVideoProcessor(**CLIP_SIZE),
        tok,
        chat_template=template("<image>", "<video>"),
        **CLIP_PROCESSOR,
    )
    config = T.VideoLlavaConfig(
        vision_config=tower("clip_vision_model", projection_dim=24),
        text_config=text_of(tok, "llama"),
        vision_feature_layer=-1,
        image_seq_length=16,
        **numbers(tok, "index", image="<image>", video="<video>"),
    )
    return T.VideoLlavaForConditionalGeneration(config), processor


def _qwen_like(kind, processor, text, vision):
    tok = tokenizer(QWEN_TOKENS.values())
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    videos = T.Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    processor = processor(T.Qwen2VLImageProcessor(size=size), tok, videos, chat_template=QWEN_TEMPLATE)
    vision |= {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = getattr(T, f"{kind}Config")(
        text_config=text_of(tok, **text),
        vision_config=vision,
        **numbers(tok, image="<|image_pad|>", video="<|video_pad|>"),
    )
    return getattr(T, f"{kind.rstrip('_')}{'_' * kind.endswith('_')}ForConditionalGeneration")(config), processor


def exaone4_5():
    text = {"model_type": "exaone4", "head_dim": 8, "sliding_window": 64}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    return _qwen_like("Exaone4_5_", T.Exaone4_5_Processor, text, {"num_key_value_heads": 2})


def hyperclovax():
    scales = {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.5}
    text = {"model_type": "hyperclovax", "attention_multiplier": 0.25, **scales}
    return _qwen_like("HyperCLOVAXVisionV2", T.HyperCLOVAXVisionV2Processor, text, {"model_type": "qwen2_5_vl_vision"})


def glmga():
    tok = tokenizer(GLM.values())
    videos = T.GlmgaVideoProcessor(size={"shortest_edge": 2 * 28 * 28, "longest_edge": 6 * 56 * 56})
    images = T.GlmgaImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 2 * 56 * 56})
    processor = T.Glm46VProcessor(images, tok, videos, chat_template=GLM_TEMPLATE)
    vision = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    rope = ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = T.GlmgaConfig(
        text_config=text_of(tok, "glm4v_text", rope_parameters=rope),
        vision_config=vision | {"model_type": "glm4v_vision", "image_size": 56, "patch_size": 14},
        **numbers(tok, **GLM),
    )
    return T.Glm46VForConditionalGeneration(config), processor


OTHERS = {
    "ViP-LLaVA": Family(vipllava),
    "Video-LLaVA": Family(video_llava, video=True, both=True),
    "EXAONE 4.5": Family(exaone4_5, video=True, both=True),
    "HyperCLOVA X Vision": Family(hyperclovax, video=True, both=True, slow=True),
    "GLM-GA": Family(glmga, video=True, slow=True),
}
