"""Newer families: our log-probs and gradients are those of the model's own call on its processor's output.

The slow twin shares only the decoding of files with the package. For each response it calls the model once, on what
its processor makes of the whole conversation: nothing padded, full logits.
"""

import copy
import functools

import pytest
import torch
from accelerate import PartialState
from families_newer import NEWER, SIDES, build, example
from helpers import message
from PIL import ImageOps
from transformers import ProcessorMixin
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import disable_dropout_in_model

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.trunk_media import video_metadata
from trl_vpo.forward.router import router_logits
from trl_vpo.forward.scorer import Scorer
from trl_vpo.media.load import VideoOptions, load_image, load_video
from trl_vpo.trainers.compat import turn_off_dropout

FRAMES = VideoOptions(num_frames=6)
# Rows of each batch; "+" is two rows.
KINDS = ["text", "image", "images", "video", "both", "text+image", "image+images", "image+video", "text+video+both"]
KINDS += ["string"]  # with an image; the others have messages
SLOW = ["text", "image"]  # first of a batch of two kinds, too
STATE, BOTH_WAYS = "pass a state along", "both directions"
PADDED = {  # families that are trained with padded rows, and why
    **dict.fromkeys(["Gemma 3", "Gemma 3, short windows", "Gemma 4 MoE", "Gemma 4 unified", "PaliGemma"], BOTH_WAYS),
    **dict.fromkeys(["PaliGemma 2", "Molmo2"], BOTH_WAYS),
    **dict.fromkeys(["Qwen3.5", "Qwen3.5 MoE", "Qwen4-exp", "LFM2-VL", "LFM3-VL"], STATE),
    **dict.fromkeys(["MiniCPM-V 4.6", "MiniCPM-V 4.7", "MiniCPM-OCR", "Nemotron-H Omni"], STATE),
    **dict.fromkeys(["Inkling 2", "GLM-5 Next"], STATE),
    **dict.fromkeys(["Mistral Large 4", "MiniMax-M3-VL", "Dots 3"], "chooses the tokens that it sees"),
    **dict.fromkeys(["Llama 4", "Llama 4, short chunks"], "within chunks of"),
    "Mllama": "cross-attention",
}


def has(family, kind):
    needs = {"text": family.text, "images": family.images, "video": family.video, "both": family.both}
    needs["string"] = family.chat  # what has no template has only strings
    return all(needs.get(part, True) for part in kind.split("+"))


def cases(kinds, fails=(), slow=()):
    for name, family in NEWER.items():
        for kind in filter(functools.partial(has, family), kinds):
            marks = [pytest.mark.slow] * (family.slow or kind in slow)
            if reason := next((why for names, which, why in fails if name in names and kind in which), None):
                marks.append(pytest.mark.xfail(strict=True, reason=reason))
            yield pytest.param(name, kind, marks=marks)


@functools.cache
def world(name):
    """A family's model as it comes, the same one in training, its processor, and the results of the slow twin."""
    PartialState(cpu=True)
    plain, processor = build(name)
    model = copy.deepcopy(plain).train()
    disable_dropout_in_model(model)
    turn_off_dropout(model)
    return plain, model, processor, {}


def weight(model):
    """One of the decoder's weights, the only one that trains."""
    name = next(n for n, p in model.get_decoder().named_parameters() if ".0." in f".{n}" and p.dim() > 1)
    found = model.get_decoder().get_parameter(name)
    model.requires_grad_(False)
    return found.requires_grad_()


def scorer_of(name, kind):
    """A scorer that chooses its layout. Rows of a kind are proven once; of several in a batch, the first would be."""
    _, model, processor, results = world(name)
    scorer = Scorer(model, layout="auto", pad_token_id=processor.tokenizer.pad_token_id)
    if results.get(f"{kind.split('+')[0]} is packed"):
        scorer.layout, scorer.packs = "shared", True
    return scorer


def loss(logps):
    """(T,) -> a loss that weighs each token differently."""
    return (logps * torch.arange(1.0, len(logps) + 1).cos()).sum()


def official(family, processor, made, side, invert=False):
    """(what the processor makes of prompt and response, tokens of the response)."""
    images = [load_image(source) for source in made.get("images", ())]
    clips = [load_video(source, FRAMES) for source in made.get("videos", ())]
    frames = [255 - clip.frames if invert else clip.frames for clip in clips]
    images = [ImageOps.invert(image) if invert else image for image in images]
    media = {"images": images if hasattr(processor, "multi_page") else [images]} if images else {}
    if clips:
        media |= {"videos": frames, "video_metadata": [video_metadata(c) for c in clips], "do_sample_frames": False}
        own = getattr(type(processor), "videos_kwargs", {})
        plain = type(processor).__call__ is ProcessorMixin.__call__
        media["videos_kwargs"] = {"return_metadata": True} if plain else {}
        if own.get("do_resize") is False:  # MiniMax-M3 leaves it to others
            media["videos_kwargs"]["do_resize"] = True
    if not family.chat:
        text = "".join(["<image>"] * len(images)) + made["prompt"]
        out = processor(text=[text], suffix=[made[side]], return_tensors="pt", **media)
        return out, int(out["token_type_ids"].sum())
    write = functools.partial(processor.apply_chat_template, tokenize=False, chat_template=processor.chat_template)
    if isinstance(made["prompt"], str):
        shown = write(message("user", "<image>", made["prompt"]))
        prompt = shown.partition("user\n")[2].partition(made["prompt"])[0] + made["prompt"]
        whole = prompt + made[side] + processor.tokenizer.eos_token
    else:
        whole, prompt = write(made["prompt"] + made[side]), write(made["prompt"], add_generation_prompt=True)
    assert whole.startswith(prompt)
    count = len(processor.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"])
    bos = processor.tokenizer.bos_token
    special = {"add_special_tokens": False} if bos and whole.startswith(bos) else {}  # as `apply_chat_template` does
    if "mm_token_type_ids" in processor.model_input_names:
        special["return_mm_token_type_ids"] = True
    return processor(text=[whole], return_tensors="pt", **special, **media), count


def slow(name, kind, media, invert=False):
    """For both responses (ids of prompt and response, log-probs of the response); and the gradient."""
    plain, _, processor, results = world(name)
    if (kind, invert) in results:
        return results[kind, invert]
    trained, pairs = weight(plain), []
    trained.grad = None
    for side in SIDES:
        inputs, count = official(NEWER[name], processor, example(NEWER[name], kind, media), side, invert)
        ids = inputs["input_ids"][0]
        logits = plain(**inputs, use_cache=False).logits[0]
        logps = logits[-count - 1 : -1].log_softmax(-1).gather(1, ids[-count:, None])[:, 0]
        loss(logps).backward()
        pairs.append((ids.tolist(), logps.detach()))
    results[kind, invert] = pairs, trained.grad.clone()
    return results[kind, invert]


@pytest.mark.parametrize(("name", "kind"), cases(KINDS, slow=SLOW))
def test_the_model_s_own_call(name, kind, media, caplog):
    """In the layout that the scorer chooses, and with padded rows."""
    _, model, processor, results = world(name)
    rows = kind.split("+")
    want = [slow(name, part, media) for part in rows]
    batch = PreferenceCollator(processor, video=FRAMES)([example(NEWER[name], part, media) for part in rows])
    pairs = [pair for both, _ in want for pair in both]
    for branch, (ids, _) in enumerate(pairs):
        trunk = batch["branch_trunk"][branch]
        prompt, response = (
            batch[f"{k}_ids"][i][batch[f"{k}_mask"][i]] for k, i in (("trunk", trunk), ("branch", branch))
        )
        assert prompt.tolist() + response.tolist() == ids
    grads = sum(grad for _, grad in want)
    trained, packs = weight(model), False
    scorer = scorer_of(name, kind)
    while True:
        trained.grad = None
        scores = scorer.score(model, batch)
        logps = [row[mask] for row, mask in zip(scores.logps, scores.mask)]
        sum(map(loss, logps)).backward()
        where = "packed" if scorer.packs else "padded"
        off = max((got - expected).abs().max() for got, (_, expected) in zip(logps, pairs))
        assert off < 1e-5, f"{where}: log-probs differ by {off:.2g}"
        off = (trained.grad - grads).norm() / grads.norm()
        assert off < 1e-5, f"{where}: gradients differ by {off:.2g}"
        if not scorer.packs:
            break
        packs = results[f"{rows[0]} is packed"] = True
        scorer.layout, scorer.packs = "separate", False
    assert packs == (name not in PADDED) and PADDED.get(name, "") in caplog.text, caplog.messages


@pytest.mark.parametrize(("name", "kind"), cases(["image", "video"]))
def test_another_picture_gives_other_log_probs(name, kind, media):
    (same, _), (other, _) = (slow(name, kind, media, invert) for invert in (False, True))
    assert (same[0][1] - other[0][1]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kind"), cases(["image"]))
def test_images_of_another_size_beside_a_row(name, kind, media):
    """A square image needs no padding of its own."""
    _, model, processor, _ = world(name)
    square, wide = media["image"]
    rows = [example(NEWER[name], kind, media | {"image": [None, image]}) for image in (square, wide)]
    weight(model)  # Gemma 3n's tower has BatchNorm
    collator, scorer = PreferenceCollator(processor), scorer_of(name, kind)
    with torch.no_grad():
        alone, together = (scorer.score(model, collator(batch)).sums[:2] for batch in (rows[:1], rows))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


TWICE = (["Mllama", "Phi-4-multimodal"], ["image"], "their towers run outside of feature methods")
TOWERS = ("vision_tower", "vision_model", "visual", "img_processor", "image_tower", "video_tower", "vision_encoder")
TOWERS += ("vqmodel.encoder",)


@pytest.mark.parametrize(("name", "kind"), cases(["image", "video"], [TWICE]))
def test_frozen_towers_run_once_a_step(name, kind, media):
    """In the reference pass; the policy pass replays what they gave."""
    _, model, processor, _ = world(name)
    weight(model)
    batch = PreferenceCollator(processor, video=FRAMES)([example(NEWER[name], kind, media)])
    scorer, runs = scorer_of(name, kind), []
    want = scorer.score(model, batch).logps
    towers = [module for path, module in model.named_modules() if path.endswith(TOWERS)]
    towers = towers or [model.base_model.embed_vision]  # Gemma 4 unified has no more
    hooks = [tower.register_forward_hook(lambda *_: runs.append(1)) for tower in towers]
    try:
        with scorer.record_vision(), torch.no_grad():
            recorded, first = scorer.score(model, batch).logps, len(runs)
        with scorer.replay_vision():
            replayed = scorer.score(model, batch).logps
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(recorded, want) and torch.equal(replayed, want)
    assert len(runs) == first > 0


def test_pictures_of_tokens_train_the_vocabulary(media):
    """Emu3's pictures become tokens, whose embeddings have a gradient behind a reference pass, too."""
    _, model, processor, _ = world("Emu3")
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    batch = PreferenceCollator(processor)([example(NEWER["Emu3"], "image", media)])
    scorer = scorer_of("Emu3", "image")
    with scorer.record_vision(), torch.no_grad():
        scorer.score(model, batch)
    with scorer.replay_vision():
        scorer.score(model, batch).logps.sum().backward()
    codes = [number for token, number in processor.tokenizer.get_vocab().items() if "visual token" in token]
    assert embeddings.grad[codes].any()
    embeddings.grad = None


EXPERTS = ["Llama 4", "Qwen3-VL MoE", "Qwen3-Omni MoE thinker", "GLM-4.5V", "ERNIE 4.5 VL", "Kimi K2.5", "Mistral 4"]
EXPERTS += ["Qwen3.5 MoE", "Qwen4-exp", "Mistral Large 4", "MiniMax-M3-VL", "Nemotron-H Omni", "Step-3.7"]
EXPERTS += ["DeepSeek-OCR 2", "Muse Spark", "Inkling 2", "Dots 3", "GLM-5 Next"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * NEWER[n].slow) for n in EXPERTS])
def test_the_load_balancing_loss(name, media):
    """Over the tokens of the model's own calls, each response behind its own prompt."""
    plain, model, processor, _ = world(name)
    rows = [example(NEWER[name], kind, media) for kind in ("image", "text")]
    config = model.config.get_text_config()
    with router_logits(plain) as kept:
        for made in rows:
            for side in SIDES:
                plain(**official(NEWER[name], processor, made, side)[0], use_cache=False)
    layers = [torch.cat(kept[i :: len(kept) // 4]) for i in range(len(kept) // 4)]
    want = load_balancing_loss_func(tuple(layers), layers[0].size(-1), config.num_experts_per_tok)
    scorer = Scorer(model, layout="auto", pad_token_id=processor.tokenizer.pad_token_id, balances=True)
    batch = PreferenceCollator(processor, video=FRAMES)(rows)
    for _ in ("as it chooses", "padded"):
        torch.testing.assert_close(scorer.score(model, batch).aux_loss, want, rtol=1e-5, atol=0)
        scorer.layout, scorer.packs = "separate", False
