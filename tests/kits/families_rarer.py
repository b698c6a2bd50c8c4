"""Tiny models of the newest and rarer families: Granite 4 Vision, Hunyuan-VL, MiniMax-M3-VL, Mistral 4, and others."""

import transformers as T
from families import CLIP_SIZE, PINPOINTS, SQUARE, template, text_of, tokenizer, tower
from families_llama import ROPE, pixtral_parts
from families_parts import Family, bos_tokenizer, number, numbers

ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


def mistral4():
    """Mistral 3 with the text model of Mistral 4: latent attention, experts."""
    scaled = ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096}
    text = {"model_type": "mistral4", "head_dim": 8, **ROUTED, **LATENT, "rope_parameters": scaled}
    return pixtral_parts("Mistral3", 2, text, spatial_merge_size=2)


def mistral_large4():
    """An indexer chooses what each token attends to: all, for among its many ties padded rows choose otherwise."""
    text = ROUTED | LATENT | {"index_topk": 512, "index_head_dim": 16, "index_n_heads": 2, "rope_parameters": ROPE}
    del text["q_lora_rank"]
    return pixtral_parts("MistralLarge4", 2, text, spatial_merge_size=2)


def granite4_vision():
    """Features of several layers of the tower, added at several layers of the decoder."""
    tok = tokenizer(["<image>"], named={"image_token": "<image>"})
    layers = {"deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [1, 2, 3, 4], "downsample_rate": "1/2"}
    scales = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
    config = T.Granite4VisionConfig(
        vision_config=tower("siglip_vision_model", hidden_size=64, vision_use_head=False),
        text_config=text_of(tok, num_hidden_layers=5, **scales, attention_multiplier=0.25),
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48}
        | {"cross_attention_frequency": 1, "use_qformer_text_input": False},
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        **layers,
        **numbers(tok, "index", image="<image>"),
    )
    images = T.LlavaNextImageProcessor(**CLIP_SIZE, image_grid_pinpoints=PINPOINTS)
    more = {"patch_size": 14, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"}
    processor = T.Granite4VisionProcessor(images, tok, chat_template=template("<image>"), **more)
    return T.Granite4VisionForConditionalGeneration(config), processor


HUNYUAN = {"image_token": "<img>", "image_start_token": "<img_start>", "image_end_token": "<img_end>"}


def hunyuan_vl():
    """Images are rows of patches, each with a newline, at positions of their own."""
    tok = bos_tokenizer(["<img_newline>"], HUNYUAN, adds=False)
    images = T.HunYuanVLImageProcessor(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision |= {"out_hidden_size": 32, "max_image_size": 128, "min_image_size": 32, "max_vit_seq_len": 64}
    config = T.HunYuanVLConfig(
        text_config=text_of(tok, head_dim=8, rope_parameters=ROPE | {"mrope_section": [2, 1, 1]}),
        vision_config=vision,
        im_start_id=number(tok, "<img_start>"),
        im_end_id=number(tok, "<img_end>"),
        im_newline_id=number(tok, "<img_newline>"),
        **numbers(tok, image="<img>"),
    )
    chat = template("<img_start><img><img_end>")
    return T.HunYuanVLForConditionalGeneration(config), T.HunYuanVLProcessor(images, tok, chat_template=chat)


def minimax_m3_vl():
    """One of its layers attends to the blocks of keys that an indexer chooses."""
    marks = ["]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
    tok = tokenizer(marks)
    chat = template(*marks[:2])
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = T.MiniMaxM3VLProcessor(
        T.MiniMaxM3VLImageProcessor(size=size), tok, T.MiniMaxM3VLVideoProcessor(size=SQUARE), chat_template=chat
    )
    text = {"head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 4, "dense_intermediate_size": 64}
    text |= {"shared_intermediate_size": 16, "intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"]}
    text |= {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 4}
    text |= {"layer_types": ["full_attention", "minimax_m3_sparse"]}
    config = T.MiniMaxM3VLConfig(
        text_config=text_of(tok, **text, rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
        vision_config=tower(num_attention_heads=2),
        projector_hidden_size=32,
        **numbers(tok, "index", image=marks[0], video=marks[1]),
    )
    return T.MiniMaxM3SparseForConditionalGeneration(config), processor


NORM = {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}


def nemotron_h_omni():
    """Mamba layers beside attention; each layer is one of four kinds. Its processor refuses the times of a video."""
    tok = tokenizer(["<image>", "<video>", "<img>", "</img>", "<so_embedding>"])
    images = T.NemotronH_Omni_Reasoning_V3ImageProcessor(min_num_patches=4, max_num_patches=16)
    videos = T.NemotronH_Omni_Reasoning_V3VideoProcessor(video_target_num_patches=16, **NORM)
    processor = T.NemotronH_Omni_Reasoning_V3Processor(
        images, videos, tok, T.ParakeetFeatureExtractor(feature_size=16), chat_template=template("<image>", "<video>")
    )
    text = text_of(tok, "nemotron_h", head_dim=8, layer_types=["linear_attention", "moe", "full_attention", "mlp"])
    text |= {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16}
    del text["num_hidden_layers"]
    vision = {"model_type": "radio", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"mlp_ratio": 2.0, "image_size": 64, "max_img_size": 256, "video_temporal_patch_size": 2}
    config = T.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text | ROUTED | {"moe_shared_expert_intermediate_size": 16},
        vision_config=vision,
        audio_config=None,
        vision_hidden_size=24,
        projector_hidden_size=32,
        image_token_id=number(tok, "<image>"),
        video_token_id=number(tok, "<image>"),
        audio_token_id=number(tok, "<so_embedding>"),
    )
    return T.NemotronH_Omni_Reasoning_V3(config), processor


def step3p7():
    """A view of the whole image, and crops of it where it is long."""
    marks = ["<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"]
    tok = tokenizer(marks)
    images = T.Step3p7ImageProcessor(size=SQUARE, patch_size=56, max_image_size=224)
    text = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    text |= {"mlp_layer_types": ["dense", "sparse"], "share_expert_dim": 16, "num_sliding_attention_heads": 4}
    text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = T.Step3p7Config(
        text_config=text_of(tok, **text),
        vision_config=tower(num_attention_heads=2, mlp_ratio=2.0, max_position_embeddings=16),
        **numbers(tok, image="<im_patch>"),
    )
    processor = T.Step3p7Processor(images, tok, chat_template=template("<im_patch>"))
    return T.Step3p7ForConditionalGeneration(config), processor


RARER = {
    "Mistral 4": Family(mistral4, slow=True),
    "Mistral Large 4": Family(mistral_large4, slow=True),
    "Granite 4 Vision": Family(granite4_vision),
    "Hunyuan-VL": Family(hunyuan_vl),
    "MiniMax-M3-VL": Family(minimax_m3_vl, video=True, both=True, slow=True),
    "Nemotron-H Omni": Family(nemotron_h_omni, slow=True),
    "Step-3.7": Family(step3p7),
}
