"""Tiny models of families that read documents: PaddleOCR-VL, GLM-OCR, LightOnOCR, GOT-OCR 2, and others."""

import transformers as T
from families import SQUARE, template, text_of, tokenizer, tower
from families_grids import GLM, GLM_TEMPLATE, ROPE
from families_parts import Family, bos_tokenizer, numbers
from families_qwen import LINEAR
from families_tiles import MINICPM

GRID = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}


def paddleocr_vl():
    named = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    tok = bos_tokenizer(["<|IMAGE_START|>", "<|IMAGE_END|>"], named, adds=False)
    chat = template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    processor = T.PaddleOCRVLProcessor(T.PaddleOCRVLImageProcessor(size=GRID), tok, chat_template=chat)
    config = T.PaddleOCRVLConfig(
        text_config=text_of(tok, head_dim=8, rope_parameters=ROPE | {"mrope_section": [2, 1, 1]}),
        vision_config=tower(num_attention_heads=2),
        **numbers(tok, image="<|IMAGE_PLACEHOLDER|>", vision_start="<|IMAGE_START|>", vision_end="<|IMAGE_END|>"),
    )
    return T.PaddleOCRVLForConditionalGeneration(config), processor


def glm_ocr():
    tok = tokenizer(GLM.values())
    videos = T.Glm46VVideoProcessor(size={"shortest_edge": 2 * 28 * 28, "longest_edge": 6 * 56 * 56})
    images = T.Glm46VImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 2 * 56 * 56})
    processor = T.Glm46VProcessor(images, tok, videos, chat_template=GLM_TEMPLATE)
    vision = {"depth": 2, "hidden_size": 24, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    rope = ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}
    config = T.GlmOcrConfig(
        text_config=text_of(tok, rope_parameters=rope, head_dim=8),
        vision_config=vision | {"image_size": 56, "patch_size": 14},
        **numbers(tok, **GLM),
    )
    return T.GlmOcrForConditionalGeneration(config), processor


def lighton_ocr():
    named = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    tok = tokenizer(named.values(), named)
    images = T.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 28, "width": 28})
    config = T.LightOnOcrConfig(
        vision_config=tower("pixtral", hidden_size=32, head_dim=8),
        text_config=text_of(tok, "qwen3", head_dim=8),
        **numbers(tok, image="<|image_pad|>"),
    )
    processor = T.LightOnOcrProcessor(images, tok, patch_size=14, chat_template=template("<|image_pad|>"))
    return T.LightOnOcrForConditionalGeneration(config), processor


def _got_ocr2(config, processor, image="<imgpad>"):
    tok = tokenizer(["<img>", "</img>", "<imgpad>"])
    vision = {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 256, "patch_size": 16, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32}
    config = config(
        vision_config=vision,
        text_config=text_of(tok, "qwen2"),
        image_seq_length=16,
        **numbers(tok, "index", image="<imgpad>"),
    )
    images = T.GotOcr2ImageProcessor(size={"height": 256, "width": 256})
    return T.GotOcr2ForConditionalGeneration(config), processor(
        images, tok, chat_template=template(f"<img>{image}</img>")
    )


def got_ocr2():
    model, processor = _got_ocr2(T.GotOcr2Config, T.GotOcr2Processor)
    processor.num_image_tokens = 16
    return model, processor


def pp_chart2table():
    """Its template writes all tokens of an image."""
    return _got_ocr2(T.PPChart2TableConfig, T.PPChart2TableProcessor, "<imgpad>" * 16)


def qianfan_ocr():
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = tokenizer(named.values(), named)
    images = T.GotOcr2ImageProcessor(size={"height": 112, "width": 112}, min_patches=1, max_patches=2)
    processor = T.QianfanOCRProcessor(images, tok, image_seq_length=16, chat_template=template("<image>"))
    config = T.QianfanOCRConfig(
        vision_config=tower(image_size=[112, 112], patch_size=[14, 14]),
        text_config=text_of(tok, "qwen3", head_dim=8),
        image_seq_length=16,
        **numbers(tok, image="<IMG_CONTEXT>"),
    )
    return T.QianfanOCRForConditionalGeneration(config), processor


def minicpm_ocr():
    tok = tokenizer(MINICPM.values(), named=MINICPM)
    sizes = {"scale_resolution": 56, "patch_size": 14, "max_slice_nums": 2}
    processor = T.MiniCPMOcrProcessor(
        T.MiniCPMOcrImageProcessor(**sizes),
        T.MiniCPMOcrVideoProcessor(**sizes | {"max_slice_nums": 1}),
        tok,
        chat_template=template("<|image_pad|>", "<|video_pad|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = T.MiniCPMOcrConfig(
        text_config=text_of(tok, "qwen3_5_text", **LINEAR, rope_parameters=rope),
        vision_config=tower(num_hidden_layers=3, num_attention_heads=2, image_size=112, insert_layer_id=1),
        insert_layer_id=1,
        **numbers(tok, image="<|image_pad|>", video="<|video_pad|>"),
    )
    return T.MiniCPMOcrForConditionalGeneration(config), processor


def granite_docling():
    grid = [f"<row_{i + 1}_col_{j + 1}>" for i in range(4) for j in range(4)]
    tok = tokenizer(["<fake_token_around_image>", "<image>", "<global-img>", *grid], vocab_size=420)
    images = T.GraniteDoclingImageProcessor(size=SQUARE, max_patches=2)
    processor = T.GraniteDoclingProcessor(images, tok, image_seq_len=4, chat_template=template("<image>"))
    scales = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}
    vision = tower(num_hidden_layers=3, scale_factor=2, out_hidden_size=32, deepstack_visual_indexes=[0, 1])
    config = T.GraniteDoclingConfig(
        vision_config=vision,
        text_config=text_of(tok, num_hidden_layers=3, **scales, attention_multiplier=0.25),
        pad_token_id=tok.pad_token_id,
        **numbers(tok, image="<image>"),
    )
    return T.GraniteDoclingForConditionalGeneration(config), processor


READERS = {
    "PaddleOCR-VL": Family(paddleocr_vl),
    "GLM-OCR": Family(glm_ocr, video=True),
    "LightOnOCR": Family(lighton_ocr),
    "GOT-OCR 2": Family(got_ocr2, text=False),
    "PP-Chart2Table": Family(pp_chart2table, text=False, slow=True),
    "Qianfan-OCR": Family(qianfan_ocr),
    "MiniCPM-OCR": Family(minicpm_ocr, video=True, both=True, slow=True),
    "Granite Docling": Family(granite_docling),
}
