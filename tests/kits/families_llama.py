"""Tiny models of Meta's families, and of LLaVA's kind: towers with a projector beside them."""

import inspect

import pytest
import transformers as T
from families import CLIP_PROCESSOR, CLIP_SIZE, PINPOINTS, SQUARE, ids, template, text_of, tokenizer, tower
from families_parts import Family, bos_template, bos_tokenizer, numbers

ROPE = {"rope_type": "default", "rope_theta": 1e4}


def mllama():
    """Its pictures are read by cross-attention layers: `cross_attention_mask` says which tokens see which."""
    tok = bos_tokenizer(named={"image_token": "<|image|>"}, bos="<|begin_of_text|>", eos="<|eot_id|>")
    images = T.MllamaImageProcessor(size=SQUARE, max_image_tiles=4)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "vision_output_dim": 32, "image_size": 56, "patch_size": 14}
    config = T.MllamaConfig(
        text_config=text_of(tok, num_hidden_layers=4, cross_attention_layers=[1, 3], rope_parameters=ROPE),
        vision_config=vision | {"max_num_tiles": 4, "intermediate_layers_indices": [1]},
        **numbers(tok, "index", image="<|image|>"),
        **ids(tok),
    )
    processor = T.MllamaProcessor(images, tok, chat_template=bos_template("<|image|>"))
    return T.MllamaForConditionalGeneration(config), processor


class Float32Llama4ImageProcessor(T.Llama4ImageProcessor):
    """The real one gives bfloat16 pixels, which a float32 model refuses."""

    def rescale_and_normalize(self, *args, **kwargs):
        return super().rescale_and_normalize(*args, **kwargs).float()


def needs_llama4():
    if "outputs.image_outputs" in inspect.getsource(T.Llama4ForConditionalGeneration.forward):
        pytest.skip(f"no call of Llama 4 ends in transformers {T.__version__}: it reads an output that is not there")


def llama4(chunk=8192):
    """With experts; one of its layers attends within chunks."""
    needs_llama4()
    names = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"]
    names += ["<|tile_x_separator|>", "<|tile_y_separator|>"]
    tok = bos_tokenizer(names, bos="<|begin_of_text|>", eos="<|eot|>")
    images = Float32Llama4ImageProcessor(size=SQUARE, max_patches=4)
    shuffle = {"pixel_shuffle_ratio": 0.5}
    vision = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24}
    text = {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4, "moe_layers": [1]}
    text |= {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    config = T.Llama4Config(
        vision_config=vision | shuffle | {"image_size": 56, "patch_size": 14},
        text_config=text_of(tok, **text, attention_chunk_size=chunk, rope_parameters=ROPE),
        **numbers(tok, "index", image="<|patch|>", boi="<|image_start|>", eoi="<|image_end|>"),
        **ids(tok),
    )
    processor = T.Llama4Processor(images, tok, patch_size=14, **shuffle, chat_template=bos_template("<|image|>"))
    return T.Llama4ForConditionalGeneration(config), processor


def perception_lm():
    """Images of a tile or more, videos of frames that are one tile each. Its tower is timm's."""
    named = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tok = bos_tokenizer(named=named, bos="<|begin_of_text|>", eos="<|eot_id|>")
    images = T.PerceptionLMImageProcessor(
        tile_size=64, max_num_tiles=4, max_frame_tiles=1, vision_input_type="thumb+tile"
    )
    videos = T.PerceptionLMVideoProcessor(size={"height": 64, "width": 64})
    chat = bos_template("<|image|>", "<|video|>")
    tiny = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": False}
    config = T.PerceptionLMConfig(
        vision_config=vision | {"model_args": tiny, "initializer_range": 0.02, "hidden_size": 24, "num_features": 24},
        text_config=text_of(tok, "llama"),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        **numbers(tok, image="<|image|>", video="<|video|>"),
    )
    config.vision_config.embed_dim = 24
    processor = T.PerceptionLMProcessor(videos, images, tok, patch_size=16, pooling_ratio=2, chat_template=chat)
    return T.PerceptionLMForConditionalGeneration(config), processor


def llava_next():
    tok = bos_tokenizer(named={"image_token": "<image>"})
    images = T.LlavaNextImageProcessor(**CLIP_SIZE, image_grid_pinpoints=PINPOINTS)
    config = T.LlavaNextConfig(
        vision_config=tower("clip_vision_model", projection_dim=24),
        text_config=text_of(tok, "mistral", sliding_window=None),
        vision_feature_layer=-1,
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        **numbers(tok, "index", image="<image>"),
    )
    processor = T.LlavaNextProcessor(images, tok, chat_template=bos_template("<image>"), **CLIP_PROCESSOR)
    return T.LlavaNextForConditionalGeneration(config), processor


def fast_vlm():
    """Its tower is timm's, a convolutional one."""
    tok = tokenizer(["<image>"], named={"image_token": "<image>"})
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    parts = {"patch_size": 32, "vision_feature_select_strategy": "full"}
    vision = {"model_type": "timm_wrapper", "architecture": "test_efficientnet", "do_pooling": False}
    config = T.FastVlmConfig(
        vision_config=vision | {"hidden_size": 256, "initializer_range": 0.02},
        text_config=text_of(tok, "qwen2"),
        image_seq_length=4,
        **numbers(tok, "index", image="<image>"),
    )
    images = T.CLIPImageProcessor(**size)
    processor = T.LlavaProcessor(images, tok, chat_template=template("<image>"), **parts)
    return T.FastVlmForConditionalGeneration(config), processor


def pixtral_parts(kind, merge, text, **more):
    """A model of Mistral's: each image has its own size, its rows end with a token of their own."""
    tok = bos_tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    images = T.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    config = getattr(T, f"{kind}Config")(
        vision_config=tower("pixtral", hidden_size=32, head_dim=8),
        text_config=text_of(tok, **text),
        vision_feature_layer=-1,
        **numbers(tok, "index", image="[IMG]"),
        **more,
    )
    sizes = {"patch_size": 14, "spatial_merge_size": merge}
    processor = T.PixtralProcessor(images, tok, chat_template=bos_template("[IMG]"), **sizes)
    return getattr(T, f"{kind}ForConditionalGeneration")(config), processor


MISTRAL = {"model_type": "mistral", "sliding_window": None, "head_dim": 8}


def pixtral():
    return pixtral_parts("Llava", 1, MISTRAL, vision_feature_select_strategy="full")


def mistral3():
    return pixtral_parts("Mistral3", 2, MISTRAL, spatial_merge_size=2)


LLAMA = {
    "Mllama": Family(mllama),
    "Llama 4": Family(llama4),
    "Llama 4, short chunks": Family(lambda: llama4(chunk=16)),
    "Perception LM": Family(perception_lm, video=True, both=True, alike=True),
    "LLaVA-NeXT": Family(llava_next),
    "FastVLM": Family(fast_vlm, slow=True),
    "Pixtral": Family(pixtral),
    "Mistral 3": Family(mistral3),
}
