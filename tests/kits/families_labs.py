"""Tiny models of families of one lab each: Aria, Emu3, DeepSeek-OCR 2, Cosmos 3, Muse, Inkling 2, and others."""

import transformers as T
from families import QWEN_TEMPLATE, QWEN_TOKENS, ids, template, text_of, tokenizer, tower
from families_grids import GLM, GLM_TEMPLATE, ROPE
from families_parts import Family, bos_tokenizer, number, numbers
from families_squares import BOS

GRID = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
CLIP = {"shortest_edge": 2 * 32 * 32, "longest_edge": 8 * 64 * 64}


def aria():
    """Its processor takes images of 490 or 980 pixels."""
    tok = tokenizer(["<image>"], {"image_token": "<image>"})
    images = T.AriaImageProcessor(max_image_size=980)
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = T.AriaConfig(
        vision_config=tower("idefics3_vision", image_size=980, patch_size=140),
        text_config=text_of(tok, "aria_text", **experts),
        projector_patch_to_query_dict={49: 4},
        **numbers(tok, "index", image="<image>"),
    )
    processor = T.AriaProcessor(images, tok, chat_template=template("<image>"), size_conversion={980: 4})
    return T.AriaForConditionalGeneration(config), processor


def emu3():
    names = {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"}
    names |= {"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"}
    codes = [f"<|visual token {i:06d}|>" for i in range(8)]
    tok = bos_tokenizer(["<|extra_200|>", *codes], names, bos="<|extra_203|>", eos="<|extra_204|>", adds=False)
    vocabulary = {name: number(tok, name) for name in ("<image>", "<|extra_200|>", *codes)}
    vq = {"codebook_size": 8, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 32}
    config = T.Emu3Config(
        vq_config=vq | {"channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [1]},
        text_config=text_of(tok, attention_dropout=0.0),
        vocabulary_map=vocabulary,
    )
    images = T.Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=32 * 32)
    processor = T.Emu3Processor(images, tok, chat_template=template("<image>"))
    return T.Emu3ForConditionalGeneration(config), processor


SAM = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SAM |= {"window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
DEEPSEEK |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]}


def deepseek_ocr2():
    """An image has 144 queries at 768 pixels, whatever its patches."""
    tok = bos_tokenizer(named={"image_token": "<image>"}, **BOS)
    sam = SAM | {"image_size": 768, "patch_size": 64, "downsample_channels": [16, 24]}
    config = T.DeepseekOcr2Config(
        vision_config={"sam_config": sam, "encoder_config": tower(hidden_size=24, num_key_value_heads=2)},
        text_config=text_of(tok, **DEEPSEEK),
        **numbers(tok, image="<image>"),
        **ids(tok),
    )
    images = T.DeepseekOcr2ImageProcessor(size={"height": 768, "width": 768}, max_patches=2)
    chat = "{{ bos_token }}" + template("<image>")
    return T.DeepseekOcr2ForConditionalGeneration(config), T.DeepseekOcr2Processor(images, tok, chat_template=chat)


def cosmos3_edge():
    tok = tokenizer(QWEN_TOKENS.values())
    images, videos = T.Cosmos3EdgeImageProcessor(size=GRID), T.Cosmos3EdgeVideoProcessor(size=CLIP)
    processor = T.Cosmos3EdgeProcessor(images, tok, videos, chat_template=QWEN_TEMPLATE)
    vision = tower(patch_size=16, num_patches=16)
    del vision["image_size"]
    config = T.Cosmos3EdgeConfig(
        text_config=text_of(tok, head_dim=8, rope_parameters=ROPE | {"mrope_section": [2, 1, 1]}),
        vision_config=vision,
        projector_hidden_size=32,
        **{name: tok.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()},
    )
    return T.Cosmos3EdgeForConditionalGeneration(config), processor


def cosmos3_omni():
    tok = tokenizer(QWEN_TOKENS.values())
    common = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    videos = T.Qwen3VLVideoProcessor(**common, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64})
    images = T.Qwen2VLImageProcessor(**common, size=GRID)
    processor = T.Qwen3VLProcessor(images, tok, videos, chat_template=QWEN_TEMPLATE)
    vision = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = T.Cosmos3OmniConfig(
        text_config=text_of(tok, "qwen3_vl_text", head_dim=8, rope_parameters=rope),
        vision_config=vision | {"model_type": "qwen3_vl_vision"},
        **{name: tok.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()},
    )
    return T.Cosmos3OmniForConditionalGeneration(config), processor


MUSE = ["<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>"]
MUSE += ["<|vid_start|>", "<|vid_end|>", "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>"]


def _muse(kind, *features, audio=(), **text):
    tok = bos_tokenizer(MUSE, adds=False)
    images = T.MuseGlimmerImageProcessor(max_image_tokens=4)
    videos = T.MuseGlimmerVideoProcessor(max_video_frame_tokens=4)
    chat = template("<|patch|>", "<|video|>")
    vision = tower(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64, num_attention_heads=2)
    del vision["image_size"]
    text |= {"head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
    config = getattr(T, f"{kind}Config")(
        text_config=text_of(tok, **text),
        vision_config=vision,
        out_hidden_size=96,
        projector_hidden_size=32,
        **numbers(tok, image="<|patch|>", video="<|video|>"),
        **dict(audio),
    )
    processor = getattr(T, f"{kind}Processor")(images, videos, tok, *features, chat_template=chat)
    return getattr(T, f"{kind}ForConditionalGeneration")(config), processor


def muse_glimmer():
    return _muse("MuseGlimmer")


def muse_spark():
    experts = {"moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 16}
    audio = {"out_hidden_size": 32, "hidden_sizes": [8] * 4, "depths": [1] * 4}
    return _muse(
        "MuseSpark",
        T.MuseSparkFeatureExtractor(),
        audio={"audio_config": audio},
        **experts,
        mlp_layer_types=["dense", "sparse"],
    )


def inkling2():
    tok = tokenizer(["<|unused_200054|>", "<|img|>"])
    text = {"head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
    text |= {"sliding_window_size": 64, "d_rel": 4, "rel_extent": 64, "moe_intermediate_size": 16}
    text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_layers_per_attn_res_block": 1}
    text |= {"layer_types": ["hybrid_sliding", "hybrid"]}
    vision = tower(num_attention_heads=2, patch_size=20, posemb_grid_size=4, projection_hidden_dim=32)
    del vision["image_size"]
    config = T.Inkling2Config(
        text_config=text_of(tok, **text, unpadded_vocab_size=len(tok)),
        vision_config=vision | {"text_hidden_size": 32},
        **numbers(tok, image="<|unused_200054|>"),
    )
    processor = T.Inkling2Processor(
        T.Inkling2ImageProcessor(), tok, chat_template=template("<|img|><|unused_200054|>")
    )
    return T.Inkling2ForConditionalGeneration(config), processor


def cohere_compass():
    marks = {"image_token": "<|IMAGE_PAD|>", "video_token": "<|VIDEO_PAD|>"}
    tok = bos_tokenizer(["<|VISION_START|>", "<|VISION_END|>"], marks, adds=False)
    common = {"patch_size": 16}
    images = T.CohereCompassImageProcessor(**common, size=GRID)
    videos = T.CohereCompassVideoProcessor(**common, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64})
    chat = template("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>", "<|VIDEO_PAD|>")
    vision = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.25}
    rope = ROPE | {"mrope_section": [2, 1, 1]}
    config = T.CohereCompassConfig(
        text_config=text_of(tok, **text, rope_parameters=dict.fromkeys(text["layer_types"], rope)),
        vision_config=vision,
        **numbers(tok, image="<|IMAGE_PAD|>", video="<|VIDEO_PAD|>"),
        **numbers(tok, vision_start="<|VISION_START|>", vision_end="<|VISION_END|>"),
    )
    processor = T.CohereCompassProcessor(images, tok, videos, chat_template=chat)
    return T.CohereCompassForConditionalGeneration(config), processor


INDEXED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
INDEXED |= {"kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
INDEXED |= {"index_topk": 512, "index_head_dim": 16, "index_n_heads": 2, "mlp_layer_types": ["dense", "sparse"]}


def dots3_note():
    tok = tokenizer(["<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"])
    common = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, "temporal_patch_size": 1}
    videos = T.Qwen2VLVideoProcessor(**common, cap_pixels_per_frame=False)
    processor = T.Dots3NoteProcessor(
        T.Qwen2VLImageProcessor(**common),
        tok,
        videos,
        T.Dots3NoteFeatureExtractor(),
        chat_template=template("<|imgpad|>", "<|video_pad|>"),
    )
    vision = tower(num_attention_heads=2, mlp_layer_types=["dense", "sparse"], moe_intermediate_size=16)
    vision |= {"num_local_experts": 4, "num_experts_per_tok": 2, "adapter_in_dim": 24, "adapter_out_dim": 32}
    del vision["image_size"]
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    audio |= {"downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": 32}
    latent = {"qk_rope_head_dim": 8, "head_dim": 16, "shared_experts_intermediate_size": 16, "sliding_window": 64}
    config = T.Dots3NoteConfig(
        text_config=text_of(tok, **INDEXED, **latent),
        vision_config=vision,
        audio_config=audio,
        **numbers(tok, image="<|imgpad|>", video="<|video_pad|>", audio="<|audio_comp_pad|>"),
    )
    return T.Dots3NoteForConditionalGeneration(config), processor


def glm5_next():
    tok = tokenizer(GLM.values())
    videos = T.Glm5NextVideoProcessor(min_image_tokens=4, max_image_tokens=16)
    images = T.Glm5NextImageProcessor(min_image_tokens=1, max_image_tokens=4)
    processor = T.Glm5NextProcessor(images, tok, videos, chat_template=GLM_TEMPLATE)
    vision = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    text = {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
    config = T.Glm5NextConfig(
        text_config=text_of(tok, **INDEXED, **text, hc_mult=2),
        vision_config=vision | {"image_size": 56, "patch_size": 14, "projection_intermediate_size": 48},
        **numbers(tok, **GLM),
    )
    return T.Glm5NextForConditionalGeneration(config), processor


LABS = {
    "Aria": Family(aria, slow=True),
    "Emu3": Family(emu3, projector=False),
    "DeepSeek-OCR 2": Family(deepseek_ocr2, adapter=False),
    "Cosmos3-Edge": Family(cosmos3_edge, video=True, both=True),
    "Cosmos3-Omni": Family(cosmos3_omni, video=True, both=True, slow=True),
    "Muse Glimmer": Family(muse_glimmer, video=True, both=True),
    "Muse Spark": Family(muse_spark, video=True, both=True, slow=True),
    "Inkling 2": Family(inkling2, slow=True),
    "Cohere Compass": Family(cohere_compass, video=True, both=True, slow=True),
    "Dots 3": Family(dots3_note, video=True, both=True, slow=True),
    "GLM-5 Next": Family(glm5_next, video=True, both=True, slow=True),
}
