"""Tiny models of families that see an image at one size: DeepSeek-VL, Janus."""

import transformers as T
from families import SQUARE, ids, text_of, tower
from families_parts import SIGLIP, Family, bos_template, bos_tokenizer, numbers

BOS = {"bos": "<|begin|>", "eos": "<|end|>", "pad": "<|pad|>"}


def _deepseek(kind, images, **more):
    tok = bos_tokenizer(named={"image_token": "<image_placeholder>"}, **BOS)
    config = getattr(T, f"{kind}Config")(
        text_config=text_of(tok, "llama"),
        vision_config=tower("siglip_vision_model", **SIGLIP),
        **more,
        **numbers(tok, image="<image_placeholder>"),
        **ids(tok),
    )
    chat = bos_template("<image_placeholder>")
    processor = getattr(T, f"{kind}Processor")(images, tok, chat_template=chat, num_image_tokens=16)
    return getattr(T, f"{kind}ForConditionalGeneration")(config), processor


def deepseek_vl():
    return _deepseek("DeepseekVL", T.DeepseekVLImageProcessor(size=SQUARE))


def deepseek_vl_hybrid():
    """With a second tower, SAM's, which sees the image in `high_res_pixel_values`."""
    high = {"model_type": "sam_vision_model", "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2}
    high |= {"num_attention_heads": 2, "image_size": 128, "patch_size": 8, "mlp_dim": 32, "window_size": 4}
    high |= {"global_attn_indexes": [1], "num_pos_feats": 8}
    images = T.DeepseekVLHybridImageProcessor(size=SQUARE, high_res_size={"height": 128, "width": 128})
    return _deepseek("DeepseekVLHybrid", images, high_res_vision_config=high)


def janus():
    """It also writes images, with a decoder that text does not use."""
    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tok = bos_tokenizer(named=named, **BOS)
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    vq = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
    }
    config = T.JanusConfig(
        text_config=text_of(tok, "llama"),
        vision_config=vision | {"mlp_ratio": 2, "projection_dim": 32, "num_image_tokens": 16},
        vq_config=vq | {"num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32},
        **numbers(tok, image="<image_placeholder>"),
    )
    images = T.JanusImageProcessor(size=SQUARE, min_size=14)
    chat = bos_template("<image_placeholder>")
    processor = T.JanusProcessor(images, tok, chat_template=chat, num_image_tokens=16)
    return T.JanusForConditionalGeneration(config), processor


SQUARES = {
    "DeepSeek-VL": Family(deepseek_vl),
    "DeepSeek-VL hybrid": Family(deepseek_vl_hybrid),
    "Janus": Family(janus),
}
