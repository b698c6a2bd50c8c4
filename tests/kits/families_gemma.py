"""Tiny models of Google's families: Gemma 3, 3n and 4, PaliGemma."""

import transformers as T
from families import SQUARE, ids, text_of, tower
from families_parts import SIGLIP, WINDOWS, Family, bos_template, bos_tokenizer, number, numbers

SOFT = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
AUDIO = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}


def _tokenizer(named, **more):
    return bos_tokenizer(["<|video|>"], named, bos="<bos>", eos="<eos>", **more)


def _numbers(tok, named, end="id", **other):
    """Of all named tokens; `other` is the end of single fields."""
    fields = {name.removesuffix("_token"): token for name, token in named.items()}
    return {
        k: v for name, token in fields.items() for k, v in numbers(tok, other.get(name, end), **{name: token}).items()
    }


def gemma3(window=64):
    tok = _tokenizer(SOFT)
    images = T.Gemma3ImageProcessor(size=SQUARE, do_pan_and_scan=False)
    config = T.Gemma3Config(
        text_config=text_of(tok, query_pre_attn_scalar=8, **WINDOWS | {"sliding_window": window}),
        vision_config=tower("siglip_vision_model", **SIGLIP),
        mm_tokens_per_image=4,
        **_numbers(tok, SOFT, "index"),
        **ids(tok),
    )
    processor = T.Gemma3Processor(images, tok, image_seq_length=4, chat_template=bos_template("<start_of_image>"))
    return T.Gemma3ForConditionalGeneration(config), processor


def gemma3n():
    """Its tower is timm's. Vision and audio have vocabularies of their own behind the text's."""
    tok = _tokenizer(SOFT | AUDIO)
    n, chat = len(tok), bos_template("<image_soft_token>")
    processor = T.Gemma3nProcessor(
        T.Gemma3nAudioFeatureExtractor(feature_size=16),
        T.SiglipImageProcessor(size=SQUARE),
        tok,
        image_seq_length=4,
        audio_seq_length=4,
        chat_template=chat,
    )
    text = text_of(tok, num_hidden_layers=4, **WINDOWS | {"layer_types": WINDOWS["layer_types"] * 2})
    text |= {"vocab_size": n + 16, "vocab_size_per_layer_input": n, "hidden_size_per_layer_input": 8}
    text |= {"num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2}
    audio = {"vocab_size": 8, "vocab_offset": n + 8, "input_feat_size": 16, "hidden_size": 16}
    audio |= {"conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": (8, 4)}
    vision = {"architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 8, "vocab_offset": n}
    config = T.Gemma3nConfig(
        text_config=text | {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
        vision_config=vision,
        audio_config=audio,
        vision_soft_tokens_per_image=4,
        audio_soft_tokens_per_image=4,
        **_numbers(tok, SOFT | AUDIO),
        **ids(tok),
    )
    return T.Gemma3nForConditionalGeneration(config), processor


GEMMA4 = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
GEMMA4 |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
GEMMA4_PATCHES = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3}


def _gemma4(kind, vision, text):
    tok = _tokenizer(GEMMA4)
    audio, images, videos = (
        getattr(T, f"{kind}{part}") for part in ("AudioFeatureExtractor", "ImageProcessor", "VideoProcessor")
    )
    processor = getattr(T, f"{kind}Processor")(
        audio(feature_size=16) if kind == "Gemma4" else audio(),
        images(**GEMMA4_PATCHES),
        tok,
        videos(**GEMMA4_PATCHES),
        chat_template=bos_template("<|image|>", "<|video|>"),
        image_seq_length=70,
    )
    config = getattr(T, f"{kind}Config")(
        text_config=text_of(tok, **WINDOWS | {"global_head_dim": 16, "final_logit_softcapping": 30.0} | text(tok)),
        vision_config=vision | {"patch_size": 4, "pooling_kernel_size": 3},
        audio_config=None,
        video_token_id=number(tok, "<|video|>"),
        **_numbers(tok, GEMMA4, eoa="index"),
        **ids(tok),
    )
    return getattr(T, f"{kind}ForConditionalGeneration")(config), processor


GEMMA4_TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA4_TOWER |= {"num_key_value_heads": 2, "head_dim": 12, "position_embedding_size": 128}


def gemma4():
    """E2B, E4B: embeddings of each layer, keys and values that layers share."""

    def text(tok):
        layers = {"num_hidden_layers": 4, "layer_types": WINDOWS["layer_types"] * 2, "num_kv_shared_layers": 2}
        return layers | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tok)}

    return _gemma4("Gemma4", GEMMA4_TOWER, text)


def gemma4_moe():
    """26B-A4B: experts, and image tokens that see each other in both directions."""
    more = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    more |= {"use_bidirectional_attention": "vision", "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    return _gemma4(
        "Gemma4", GEMMA4_TOWER, lambda tok: more | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    )


def gemma4_unified():
    vision = {"mm_embed_dim": 24, "mm_posemb_size": 128, "output_proj_dims": 24}
    return _gemma4("Gemma4Unified", vision, lambda tok: {})


def _paligemma(text_type, **more):
    """Its processor writes BOS behind the images and a line feed behind the prompt; responses are its `suffix`."""
    tok = bos_tokenizer(["\n"], {"image_token": "<image>"}, bos="<bos>", eos="<eos>", adds=False)
    images = T.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    config = T.PaliGemmaConfig(
        text_config=text_of(tok, text_type, **{"head_dim": 8} | more),
        vision_config=tower("siglip_vision_model", projection_dim=32, **SIGLIP),
        projection_dim=32,
        hidden_size=32,
        **numbers(tok, "index", image="<image>"),
        **ids(tok),
    )
    return T.PaliGemmaForConditionalGeneration(config), T.PaliGemmaProcessor(images, tok)


def paligemma():
    return _paligemma("gemma")


def paligemma2():
    caps = {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    return _paligemma("gemma2", query_pre_attn_scalar=8, **WINDOWS | caps)


GEMMA = {
    "Gemma 3": Family(gemma3),
    "Gemma 3, short windows": Family(lambda: gemma3(window=8)),
    "Gemma 3n": Family(gemma3n),
    "Gemma 4": Family(gemma4, video=True, both=True),
    "Gemma 4 MoE": Family(gemma4_moe, video=True, both=True),
    "Gemma 4 unified": Family(gemma4_unified, video=True, both=True, slow=True),
    "PaliGemma": Family(paligemma, text=False, chat=False),
    "PaliGemma 2": Family(paligemma2, text=False, chat=False),
}
