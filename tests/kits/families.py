"""Tiny randomly initialised models of every supported family, with their real processors, built offline.

Each builder gives (model, processor). Widths are a few dozen, images 56 x 56; nothing is downloaded.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

CORPUS = [f"a {c} {s} moves {d}." for c in ("red", "blue") for s in ("square", "circle") for d in ("left", "right")]
CORPUS += ["What is in the picture? Describe the video.", "user assistant system", "Frame from 00:01: <0.5 seconds>"]
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = LAYERS | {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 4096}
TOWER = LAYERS | {"hidden_size": 24, "intermediate_size": 48, "patch_size": 14, "image_size": 56}
PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112]]
SQUARE = {"height": 56, "width": 56}


def tokenizer(special=(), named=None, corpus=CORPUS, vocab_size=360):
    tok = Tokenizer(BPE(unk_token=None))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(corpus, trainer)
    return T.PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=4096,
        extra_special_tokens=dict(named or {}),
    )


def template(image="", video=""):
    """ChatML with typed or plain contents."""
    return (
        "{%- for m in messages -%}<|im_start|>{{ m['role'] + '\n' }}"
        "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for c in m['content'] -%}"
        "{%- if c['type'] == 'image' -%}" + image + "{%- elif c['type'] == 'video' -%}" + video + "{%- else -%}"
        "{{ c['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


def ids(tok, **more):
    start = tok.convert_tokens_to_ids(tok.bos_token or "<|im_start|>")
    return {"pad_token_id": tok.pad_token_id, "eos_token_id": tok.eos_token_id, "bos_token_id": start, **more}


def text_of(tok, model_type=None, **more):
    kind = {"model_type": model_type} if model_type else {}
    return {**TEXT, **kind, "vocab_size": len(tok), **ids(tok), **more}


def tower(model_type=None, **more):
    return {**TOWER, **({"model_type": model_type} if model_type else {}), **more}


def text_model():
    tok = tokenizer()
    tok.chat_template = template()
    return T.Qwen2ForCausalLM(T.Qwen2Config(**text_of(tok))), tok


# --- Qwen ---------------------------------------------------------------------------------------------------------

QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TEMPLATE = template("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")


def _qwen(kind, vision, processor=None, patch=14, rope=None, text=None):
    """A model and the processor of a kind of Qwen; with patches of 16, the vision is Qwen3-VL's."""
    config, model = (getattr(T, f"{kind}{name}") for name in ("Config", "ForConditionalGeneration"))
    tok = tokenizer(QWEN_TOKENS.values())
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
    common = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    images = T.Qwen2VLImageProcessor(**common, size=size)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], **(rope or {})}
    video_processor, video_size = T.Qwen2VLVideoProcessor, size
    if patch == 16:
        video_processor, rope = T.Qwen3VLVideoProcessor, rope | {"mrope_interleaved": True}
        video_size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 64 * 64}  # of frames x height x width
        vision = {**QWEN_TOWER, "patch_size": 16, "num_position_embeddings": 16, **vision}
    videos = video_processor(**common, size=video_size, cap_pixels_per_frame=False)
    tokens = {name: tok.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    cfg = config(text_config=text_of(tok, rope_parameters=rope, **(text or {})), vision_config=vision, **tokens)
    processor = getattr(T, f"{processor or kind}Processor")
    return model(cfg), processor(images, tok, videos, chat_template=QWEN_TEMPLATE)


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return _qwen("Qwen2VL", vision)


QWEN_TOWER = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}


def qwen2_5_vl():
    more = {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return _qwen("Qwen2_5_VL", QWEN_TOWER | more)


def qwen3_vl():
    return _qwen("Qwen3VL", {"deepstack_visual_indexes": [0]}, patch=16, text={"head_dim": 8})


# --- LLaVA --------------------------------------------------------------------------------------------------------

CLIP_SIZE = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
CLIP_PROCESSOR = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}


def _llava(kind, tok, text, **more):
    """A model of a kind of LLaVA; its vision tower is CLIP's unless `more` says otherwise."""
    config, model = (getattr(T, f"{kind}{name}") for name in ("Config", "ForConditionalGeneration"))
    if "vision_config" not in more:
        vision = tower("clip_vision_model", projection_dim=24)
        more |= {"vision_config": vision, "vision_feature_layer": -1, "image_seq_length": 16}
    tokens = {f"{k}_token_index": tok.convert_tokens_to_ids(f"<{k}>") for k in ("image", "video")}
    if "<video>" not in tok.get_vocab():
        del tokens["video_token_index"]
    return model(config(text_config=text, **tokens, **more))


def llava15():
    tok = tokenizer(["<image>"])
    chat = template("<image>", "<video>")
    processor = T.LlavaProcessor(T.LlavaImageProcessor(**CLIP_SIZE), tok, chat_template=chat, **CLIP_PROCESSOR)
    return _llava("Llava", tok, text_of(tok, "llama")), processor


def llava_next_video():
    tok = tokenizer(["<image>", "<video>"])
    processor = T.LlavaNextVideoProcessor(
        video_processor=T.LlavaNextVideoVideoProcessor(**CLIP_SIZE),
        image_processor=T.LlavaNextImageProcessor(**CLIP_SIZE, image_grid_pinpoints=PINPOINTS),
        tokenizer=tok,
        chat_template=template("<image>", "<video>"),
        **CLIP_PROCESSOR,
    )
    more = {"video_seq_length": 4, "image_grid_pinpoints": PINPOINTS}
    return _llava("LlavaNextVideo", tok, text_of(tok, "llama"), **more), processor


def llava_onevision():
    tok = tokenizer(["<image>", "<video>"])
    processor = T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tok,
        T.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
    )
    vision = tower("siglip_vision_model", vision_use_head=False)
    more = {"vision_config": vision, "image_grid_pinpoints": PINPOINTS}
    return _llava("LlavaOnevision", tok, text_of(tok, "qwen2"), **more), processor


# --- Idefics, InternVL --------------------------------------------------------------------------------------------


def idefics2():
    tok = tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    size = {"shortest_edge": 56, "longest_edge": 56}
    images = T.Idefics2ImageProcessor(size=size, do_image_splitting=False)
    perceiver = {f"resampler_{key}": value for key, value in (("depth", 1), ("n_heads", 4), ("head_dim", 8))}
    cfg = T.Idefics2Config(
        vision_config=tower(),
        text_config=text_of(tok, "mistral"),
        perceiver_config=perceiver | {"hidden_size": 32, "resampler_n_latents": 4, "num_key_value_heads": 2},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
    )
    processor = T.Idefics2Processor(images, tok, image_seq_len=4, chat_template=template("<image>"))
    return T.Idefics2ForConditionalGeneration(cfg), processor


EDGE = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 56}}


def _idefics3(kind, *more_tokens):
    """(model, tokenizer, image processor)."""
    named = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    grid = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    tok = tokenizer([*named, *grid, *more_tokens], vocab_size=420)
    cfg = getattr(T, f"{kind}Config")(
        vision_config=tower(),
        scale_factor=2,
        text_config=text_of(tok, "llama"),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        pad_token_id=tok.pad_token_id,
    )
    images = getattr(T, f"{kind}ImageProcessor")(**EDGE, do_image_splitting=False)
    return getattr(T, f"{kind}ForConditionalGeneration")(cfg), tok, images


def idefics3():
    model, tok, images = _idefics3("Idefics3")
    return model, T.Idefics3Processor(images, tok, image_seq_len=4, chat_template=template("<image>"))


def smolvlm():
    model, tok, images = _idefics3("SmolVLM", "<video>")
    videos, chat = T.SmolVLMVideoProcessor(**EDGE), template("<image>", "<video>")
    videos.num_frames, videos.fps = 8, 4
    return model, T.SmolVLMProcessor(images, tok, videos, image_seq_len=4, chat_template=chat)


def internvl():
    named = {"start_image_token": "<img>", "end_image_token": "</img>"}
    named |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tok = tokenizer(named.values(), named=named)
    processor = T.InternVLProcessor(
        T.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=False),
        tok,
        T.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>", "<video>"),
    )
    cfg = T.InternVLConfig(
        vision_config=tower(image_size=[56, 56], patch_size=[14, 14]),
        text_config=text_of(tok, "qwen2"),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return T.InternVLForConditionalGeneration(cfg), processor


# --- the table ----------------------------------------------------------------------------------------------------

FAMILIES = {  # name as in docs/models.md: (builder, takes videos)
    "Qwen2-VL": (qwen2_vl, True),
    "Qwen2.5-VL": (qwen2_5_vl, True),
    "Qwen3-VL": (qwen3_vl, True),
    "LLaVA-1.5": (llava15, False),
    "LLaVA-NeXT-Video": (llava_next_video, True),
    "LLaVA-OneVision": (llava_onevision, True),
    "Idefics2": (idefics2, False),
    "Idefics3": (idefics3, False),
    "SmolVLM": (smolvlm, True),
    "InternVL": (internvl, True),
}
KINDS = [(name, "image") for name in FAMILIES] + [(name, "video") for name, (_, video) in FAMILIES.items() if video]
LANGUAGE_MODEL = r".*(language_model|text_model)\.(?!.*vision).*\.(q|k|v|o|gate|up|down)_proj"


def build(name, seed=0):
    """(model, processor) of a family with weights that a seed decides, larger than at initialisation.

    Fresh weights are so small that the picture hardly moves the output; tests could not see it missing.
    """
    torch.manual_seed(seed)
    model, processor = FAMILIES[name][0]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval(), processor


def write_model(folder, model, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
