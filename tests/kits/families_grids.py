"""Tiny models of families whose images and videos are grids of patches, as Qwen's: GLM-V, ERNIE, Kimi and others."""

import transformers as T
from families import QWEN_TEMPLATE, QWEN_TOKENS, template, text_of, tokenizer, tower
from families_parts import Family, bos_tokenizer, numbers

SIZE = {"shortest_edge": 28 * 28, "longest_edge": 2 * 56 * 56}
CLIP = {"shortest_edge": 2 * 28 * 28, "longest_edge": 6 * 56 * 56}  # of frames x height x width
GRID = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}

GLM = {"image": "<|image|>", "video": "<|video|>"}
GLM |= {
    f"{kind}_{at}": f"<|{word}_of_{kind}|>"
    for kind in ("image", "video")
    for at, word in (("start", "begin"), ("end", "end"))
}
GLM_TEMPLATE = template("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>")


def _glm(kind, parts, **text):
    """Frames of videos are under the token of images, between those of a video: no prompt can have both."""
    tok = tokenizer(GLM.values())
    videos = getattr(T, f"{parts}VideoProcessor")(size=CLIP, max_image_size={"longest_edge": 56 * 56})
    images = getattr(T, f"{parts}ImageProcessor")(size=SIZE)
    processor = getattr(T, f"{parts}Processor")(images, tok, videos, chat_template=GLM_TEMPLATE)
    vision = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    vision |= {"image_size": 56, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = getattr(T, f"{kind}Config")(
        text_config=text_of(tok, rope_parameters=rope, **text), vision_config=vision, **numbers(tok, **GLM)
    )
    return getattr(T, f"{kind}ForConditionalGeneration")(config), processor


def glm4v():
    return _glm("Glm4v", "Glm4v")


def glm4v_moe():
    experts = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_routed_experts": 4}
    return _glm("Glm4vMoe", "Glm4v", **experts, first_k_dense_replace=1)


def glm46v():
    return _glm("Glm46V", "Glm46V", model_type="glm4v_text")


ERNIE = {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
ERNIE |= {f"{kind}_{at}_token": f"<|{kind}_{at}|>".upper() for kind in ("image", "video") for at in ("start", "end")}


def ernie():
    """Text and media have experts of their own; the processor says whose a token is."""
    tok = bos_tokenizer(named=ERNIE, adds=False)
    videos = T.Ernie4_5_VLMoeVideoProcessor(**GRID, size=SIZE, draw_on_frames=False)
    processor = T.Ernie4_5_VLMoeProcessor(
        T.Ernie4_5_VLMoeImageProcessor(patch_size=14, merge_size=2, size=SIZE),
        tok,
        videos,
        chat_template=template(
            "Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            "Video 1:<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>",
        ),
    )
    vision = {"depth": 2, "hidden_size": 24, "num_heads": 2, "intermediate_size": 48, "patch_size": 14}
    experts = {"moe_intermediate_size": [16, 16], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    config = T.Ernie4_5_VLMoeConfig(
        text_config=text_of(tok, **experts, rope_parameters=ROPE | {"mrope_section": [1, 1, 2]}),
        vision_config=vision,
        **numbers(tok, **{name.removesuffix("_token"): token for name, token in ERNIE.items()}),
    )
    return T.Ernie4_5_VLMoeForConditionalGeneration(config), processor


def video_llama3():
    """Frames that resemble the one before are thinned out: `video_compression_mask` says which tokens stay."""
    tok = tokenizer(QWEN_TOKENS.values())
    sizes = {"patch_size": 14, "size": {"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}}
    processor = T.VideoLlama3Processor(
        T.VideoLlama3ImageProcessor(**sizes),
        tok,
        T.VideoLlama3VideoProcessor(**sizes, use_token_compression=True),
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )
    vision = tower(num_attention_heads=2)
    del vision["image_size"]
    config = T.VideoLlama3Config(
        text_config=text_of(tok, "qwen2"),
        vision_config=vision,
        **numbers(tok, image="<|image_pad|>", video="<|video_pad|>"),
    )
    return T.VideoLlama3ForConditionalGeneration(config), processor


def kimi_k25():
    """Its text model is DeepSeek-V3's: latent attention, experts. Its videos fail in transformers 5.23."""
    names = {"image": "<|media_pad|>", "video": "<|kimi_k25_video_placeholder|>"}
    names |= {"vision_start": "<|media_begin|>", "vision_end": "<|media_end|>"}
    tok = tokenizer([*names.values(), "<|media_content|>"])
    image = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
    processor = T.Kimi_K25Processor(
        T.Kimi_K25ImageProcessor(patch_size=14, merge_size=2),
        tok,
        T.Kimi_K25VideoProcessor(patch_size=14, merge_size=2, temporal_patch_size=4),
        chat_template=template(image, names["video"]),
    )
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    text = text_of(tok, "deepseek_v3", **experts, **latent, n_group=1, topk_group=1, first_k_dense_replace=1)
    vision = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48}
    config = T.Kimi_K25Config(
        text_config=text | {"num_key_value_heads": 4, "rope_parameters": ROPE, "head_dim": 8},
        vision_config=vision | {"pos_emb_height": 8, "pos_emb_width": 8, "patch_size": 14},
        projection_hidden_size=24,
        **numbers(tok, **names),
    )
    return T.Kimi_K25ForConditionalGeneration(config), processor


def lfm3_vl():
    tok = bos_tokenizer(QWEN_TOKENS.values(), bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>")
    common = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    videos = T.Qwen3VLVideoProcessor(**common, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64})
    images = T.Qwen2VLImageProcessor(**common, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"], "patch_size": 16}
    names = {name.removesuffix("_token_id"): token for name, token in QWEN_TOKENS.items()}
    config = T.Lfm3VlConfig(
        text_config=text_of(tok, "lfm3", layer_types=["conv", "full_attention"]),
        vision_config=vision,
        projector_hidden_size=32,
        **numbers(tok, **names),
    )
    chat = "{{ bos_token }}" + QWEN_TEMPLATE
    return T.Lfm3VlForConditionalGeneration(config), T.Lfm3VlProcessor(images, tok, videos, chat_template=chat)


GRIDS = {
    "GLM-4.1V": Family(glm4v, video=True),
    "GLM-4.5V": Family(glm4v_moe, video=True),
    "GLM-4.6V": Family(glm46v, video=True, slow=True),
    "ERNIE 4.5 VL": Family(ernie, video=True, both=True),
    "VideoLLaMA 3": Family(video_llama3, video=True, both=True),
    "Kimi K2.5": Family(kimi_k25),
    "LFM3-VL": Family(lfm3_vl, video=True, both=True),
}
