"""Tiny models of the newer Qwens: experts, linear attention, thinkers of the Omni models."""

import families
import transformers as T
from families import QWEN_TOWER, _qwen, template, text_of, tokenizer
from families_parts import EXPERTS, Family, numbers

# A conversation has an empty thought before its answer; the prompt of generation opens one.
_ANSWER = "{{ m['role'] + '\n' }}"
_THOUGHT = "{%- if m['role'] == 'assistant' -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
THINKING = families.QWEN_TEMPLATE.replace(_ANSWER, _ANSWER + _THOUGHT)
THINKING = THINKING.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")

LINEAR = {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
LINEAR |= {"linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
SHARED = {"shared_expert_intermediate_size": 16}


def qwen3_vl_moe():
    text = {"head_dim": 8, **EXPERTS}
    return _qwen("Qwen3VLMoe", {"deepstack_visual_indexes": [0]}, "Qwen3VL", patch=16, text=text)


def _linear(kind, **more):
    rope = {"partial_rotary_factor": 0.5}
    return _qwen(kind, {}, "Qwen3VL", patch=16, rope=rope, text=LINEAR | more)


def qwen3_5():
    model, processor = _linear("Qwen3_5")
    processor.chat_template = THINKING
    return model, processor


def qwen3_5_moe():
    return _linear("Qwen3_5Moe", **EXPERTS, **SHARED)


def qwen4_exp():
    indexer = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
    more = {"hc_count": 2, "hc_lowrank": 8, "indexer_compress_ratio": 4}
    return _linear("Qwen4Exp", **EXPERTS, **SHARED, **indexer, **more)


OMNI = {"image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>"}
OMNI |= {"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
OMNI |= {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
OMNI_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def _omni(kind, patch, vision, text, audio, end, **more):
    """A thinker: the part of an Omni model that reads and writes text."""
    tok = tokenizer(OMNI.values(), named=OMNI)
    size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
    common = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    processor = getattr(T, f"{kind}Processor")(
        T.Qwen2VLImageProcessor(**common),
        T.Qwen2VLVideoProcessor(**common, cap_pixels_per_frame=False),
        T.WhisperFeatureExtractor(feature_size=16),
        tok,
        chat_template=template("<|vision_bos|><|IMAGE|><|vision_eos|>", "<|vision_bos|><|VIDEO|><|vision_eos|>"),
    )
    config = getattr(T, f"{kind}ThinkerConfig")(
        text_config=text_of(tok, **text),
        vision_config=QWEN_TOWER | {"patch_size": patch} | vision,
        audio_config={"num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "d_model": 16} | audio,
        **numbers(tok, end, image="<|IMAGE|>", video="<|VIDEO|>", audio="<|AUDIO|>"),
        **numbers(tok, vision_start="<|vision_bos|>", vision_end="<|vision_eos|>"),
        **numbers(tok, audio_start="<|audio_bos|>", audio_end="<|audio_eos|>"),
        **more,
    )
    return getattr(T, f"{kind}ThinkerForConditionalGeneration")(config), processor


def qwen2_5_omni():
    audio = {"encoder_ffn_dim": 16, "output_dim": 32, "n_window": 10}
    vision = {"window_size": 56, "fullatt_block_indexes": [1]}
    return _omni("Qwen2_5Omni", 14, vision, {"rope_parameters": OMNI_ROPE}, audio, "index", user_token_id=5)


def qwen3_omni_moe():
    audio = {"encoder_ffn_dim": 16, "output_dim": 32, "n_window": 10, "downsample_hidden_size": 16}
    vision = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = EXPERTS | {"head_dim": 8, "rope_parameters": OMNI_ROPE | {"mrope_interleaved": True}}
    return _omni("Qwen3OmniMoe", 16, vision, text, audio, "id", user_token_id=5)


QWEN = {
    "Qwen3-VL MoE": Family(qwen3_vl_moe, video=True, both=True),
    "Qwen3.5": Family(qwen3_5, video=True, both=True),
    "Qwen3.5 MoE": Family(qwen3_5_moe, video=True, both=True, slow=True),
    "Qwen4-exp": Family(qwen4_exp, video=True, both=True, slow=True),
    "Qwen2.5-Omni thinker": Family(qwen2_5_omni, video=True, both=True),
    "Qwen3-Omni MoE thinker": Family(qwen3_omni_moe, video=True, both=True),
}
