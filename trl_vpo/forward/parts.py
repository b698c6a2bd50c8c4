"""The parts of a model by the names of their modules: towers, projector, what no row reaches; all else is language.

Names tell the same of a model in memory, of a saved adapter and of a config. They are those of all image-text-to-text
models of transformers; the tests hold them against the modules of every family.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trl_vpo.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TOWERS = (
    "visual|vision_tower|vision_model|image_tower|video_tower|high_res_vision_model|image_encoder|vision_encoder|"
    "embed_tokens_extend"
)
# Between tower and language model: layers, and single parameters such as LLaVA-NeXT's newline.
PROJECTORS = (
    "merger|merger_list|deepstack_merger_list|patch_merger|multi_modal_projector|mm_projector|projector|connector|"
    "aligner|resampler_model|vision_resampler|perceiver_resampler|qformer|vision_adapter|vision_projection|"
    "visual_projection|language_projection|image_to_text_projection|embed_vision|vision_embed_tokens|"
    "layerwise_projectors|spatial_projectors|high_res_vision_neck|high_res_vision_proj|high_res_vision_alpha|"
    "visual_embeddings_table|head_linear|query_tokens|img_projection_up|img_projection_down|global_img_feature_extensor|"
    "sub_img_feature_extensor|image_newline|view_separator|vision_final_layernorm"
)
IDLE = (
    "audio_tower|audio_embed|embed_audio|vqmodel|generation_embeddings|generation_aligner|generation_head|"
    r"connector\.fine|density_router"
)
# Layers of a decoder that weigh or choose: routers, indexers of sparse attention, Gemma 3n's mixing of streams, whose
# weights it reads past an adapter.
CHOOSERS = "router|shared_expert_gate|indexer|altup"


def named(names: str) -> re.Pattern:
    """Return a pattern for modules and parameters that are called so, or lie inside."""
    return re.compile(rf"(^|\.)({names})(\.|$)")


_IDLE, _PROJECTOR, _TOWER = named(IDLE), named(PROJECTORS), named(TOWERS)


def part_of(name: str) -> str:
    """Return the part of a module or parameter: "vision", "projector", "idle" or "language".

    Idle is what rows of text, images and videos do not reach: audio, the making of pictures, Granite Docling's finer
    tiles.
    """
    if _IDLE.search(name):
        return "idle"
    return "projector" if _PROJECTOR.search(name) else "vision" if _TOWER.search(name) else "language"


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the LM head; also of models that hold a whole language model and do not hand on its head.

    Raises ModelError for ModernBertDecoderForCausalLM, whose head is called decoder: its layers are not found.
    """
    head = model.get_output_embeddings()
    decoder = model.get_decoder()
    if head is not None and decoder is head:
        raise ModelError(f"{type(model).__name__} is not supported: its `get_decoder` gives its LM head.")
    if head is None and decoder is not model and hasattr(decoder, "get_output_embeddings"):
        return decoder.get_output_embeddings()
    return head
