"""Detectors and SAM 2 at tiny size with random weights and their real processors, saved to be loaded by name."""

import torch
import transformers as T
from families import write_model

SWIN = {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 2, "out_indices": [1, 2, 3]}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz"


def bert_tokenizer():
    """Word pieces of one letter; "[CLS]", "[SEP]", "." and "?" have their numbers of BERT: the model knows them so."""
    vocab = [f"[unused{i}]" for i in range(1100)]
    vocab[0], vocab[100], vocab[101], vocab[102], vocab[103] = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    vocab[1012], vocab[1029] = ".", "?"
    vocab[200:252] = [*CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    return T.BertTokenizer(vocab={word: i for i, word in enumerate(vocab)})


def grounding_dino(config=T.GroundingDinoConfig, model=T.GroundingDinoForObjectDetection):
    cfg = config(
        backbone_config=T.SwinConfig(image_size=64, **SWIN),
        text_config=T.BertConfig(vocab_size=1100, max_position_embeddings=256, **TEXT),
        d_model=32,
        num_queries=20,
        encoder_layers=1,
        decoder_layers=2,
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
        num_feature_levels=4,
        max_text_len=64,
    )
    images = T.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return model(cfg), T.GroundingDinoProcessor(images, bert_tokenizer())


def owlv2():
    words = [c + end for end in ("", "</w>") for c in CHARACTERS] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    ids = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    cfg = T.Owlv2Config(
        text_config={**TEXT, **ids, "vocab_size": len(vocab), "max_position_embeddings": 64},
        vision_config={**TEXT, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    images = T.Owlv2ImageProcessor(size={"height": 64, "width": 64})
    tokenizer = T.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=64)
    return T.Owlv2ForObjectDetection(cfg), T.Owlv2Processor(images, tokenizer)


def sam2():
    stages = {"blocks": [1, 1, 2, 1], "embed_dim": [16, 32, 64, 128], "num_attention_heads": [1, 2, 4, 8]}
    backbone = T.Sam2HieraDetConfig(
        hidden_size=16,
        num_attention_heads=1,
        image_size=[128, 128],
        window_size_per_stage=[4] * 4,
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
        **{f"{key}_per_stage": values for key, values in stages.items()},
    )
    vision = T.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    cfg = T.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 128, "patch_size": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    )
    images = T.Sam2ImageProcessor(size={"height": 128, "width": 128}, mask_size={"height": 32, "width": 32})
    return T.Sam2Model(cfg), T.Sam2Processor(images)


BUILDERS = {
    "grounding-dino": grounding_dino,
    "mm-grounding-dino": lambda: grounding_dino(T.MMGroundingDinoConfig, T.MMGroundingDinoForObjectDetection),
    "owlv2": owlv2,
    "sam2": sam2,
}


def save(kind, folder, seed=0):
    """The path of a saved model of this kind, with weights so large that inputs matter, and none that saturate."""
    torch.manual_seed(seed)
    model, processor = BUILDERS[kind]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if kind != "owlv2" and weight.dim() > 1:
                weight.mul_(2)
            elif name.startswith(("class_head", "box_head")) and weight.dim() > 1:
                weight.normal_(0, 0.1)
    return write_model(folder, model, processor)
