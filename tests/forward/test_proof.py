"""The proof of a model before its first step: each fault that it is there for, put into a model that is right."""

import json
import logging

import families_newer
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Json
from families import FAMILIES, build
from families_newer import NEWER
from helpers import row
from trainer_kit import fresh, shake, text_rows, trainer_of
from transformers import PreTrainedConfig
from vlm_standins import VISION_MODELS

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.json_files import load_json
from trl_vpo.data.proof_rows import first_of_kinds
from trl_vpo.forward import layouts, scorer
from trl_vpo.forward.families import padded_layout_reason
from trl_vpo.forward.proof import ProofError, ProofRow
from trl_vpo.forward.scorer import Scorer
from trl_vpo.forward.tree import Branch, Tree, Trunk
from trl_vpo.media.load import VideoOptions
from trl_vpo.trainers import setup


def rows_of(media, *kinds):
    """Rows with text alone, an image, images, a video."""
    made = {"text": row(None), "image": row("image", media["image"][:1]), "images": row("image", media["image"]),
            "video": row("video", media["video"][:1])}  # fmt: skip
    return [{"images": [], "videos": [], **made[kind]} for kind in kinds]


def trainer(media, folder, *kinds, name="Qwen2.5-VL", layout="auto", **more):
    data = rows_of(media, *kinds)
    if not FAMILIES.get(name, (None, False))[1]:
        data = [{k: v for k, v in example.items() if k != "videos"} for example in data]
    made = trainer_of("dpo", folder, data, name=name, layout=layout, proves=True, num_frames=6, **more)
    shake(made.model)
    return made


def score(made, first=0):
    """The scores of one row, which is the first call."""
    return made.concatenated_forward(made.model, made._prepare_inputs(made.data_collator([made.train_dataset[first]])))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_a_dataset_is_proven_at_the_first_call(name, media, tmp_path, caplog):
    kinds = ["text", "image", "images", "image"] + ["video"] * FAMILIES[name][1]
    made = trainer(media, tmp_path, *kinds, name=name)
    with caplog.at_level(logging.INFO, "trl_vpo"):
        score(made)
    want = ["text alone", "an image", "images"] + ["a video"] * FAMILIES[name][1]
    assert made.scorer.proven == [f"rows with {what}" for what in want] and made.scorer.packs
    assert f"packed rows give the model's own log-probs ({', '.join(want)})" in caplog.text
    assert made.data_collator.proven is None  # the batches need not bring rows


def test_a_float64_model_is_packed(media, tmp_path, caplog):
    model, processor = build("Qwen2-VL")
    kinds, model = ("text", "image", "video"), model.double()
    made = trainer(media, tmp_path, *kinds, name="Qwen2-VL", model=model, processor=processor)
    score(made)
    assert made.scorer.packs, caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_of_the_wrong_columns_are_refused(dtype, media, tmp_path, monkeypatch):
    plain = layouts._layout
    monkeypatch.setattr(layouts, "_layout", lambda *args: shifted(plain(*args)))
    model, processor = build("Qwen2-VL")
    made = trainer(media, tmp_path, "image", model=model.to(dtype), processor=processor)
    with pytest.raises(ProofError, match=r"Qwen2VLForCond.* rows with an image: the scores .* the model's own logits"):
        score(made)


def shifted(layout):
    layout.positions = (layout.positions - 1).clamp(min=0)
    return layout


def test_media_of_the_wrong_row_are_refused(media, tmp_path, monkeypatch):
    """As where an index counts from the begin of its own row."""
    plain = layouts.merge_media
    monkeypatch.setattr(layouts, "merge_media", lambda items, *more: plain(items[::-1], *more))
    with pytest.raises(ProofError, match="rows with an image: the scores of its responses"):
        score(trainer(media, tmp_path, "image", name="LLaVA-1.5"))


def test_tokens_that_see_what_comes_after_them_are_refused(tmp_path, monkeypatch):
    """Of a model that is so itself, as PaliGemma's prompts are: its own logits do not show it."""
    attend = F.scaled_dot_product_attention
    both_ways = lambda q, k, v, attn_mask=None, is_causal=False, **more: attend(q, k, v, **more)  # noqa: E731
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", both_ways)
    made = trainer_of("dpo", tmp_path, text_rows(2), layout="separate", proves=True)
    made.scorer.packs = False
    with pytest.raises(ProofError, match=r"Qwen2ForCausalLM .* text alone: its tokens see those behind them"):
        score(made)


def test_what_a_model_raises_is_named(media, tmp_path, monkeypatch):
    made = trainer(media, tmp_path, "image", name="LLaVA-1.5")

    def fail(*args, **kwargs):
        raise KeyError("pixel_values")

    layer = made.model.get_base_model().model.language_model.layers[0]
    monkeypatch.setattr(type(layer.mlp), "forward", fail)
    with pytest.raises(ProofError, match="rows with an image: it cannot be computed: KeyError: 'pixel_values'"):
        score(made)


def break_packed_images(monkeypatch):
    """Packed rows with media get other positions; those of text stay right."""
    plain = scorer.packed

    def packed(batch, backbone, **more):
        layout = plain(batch, backbone, **more)
        if any(batch["media"]):
            layout.inputs["position_ids"] = layout.inputs["position_ids"] * 2
        return layout

    monkeypatch.setattr(scorer, "packed", packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_kind_that_comes_later_decides_at_the_start(dtype, media, tmp_path, monkeypatch, caplog):
    break_packed_images(monkeypatch)
    model, processor = build("Qwen2.5-VL")
    made = trainer(media, tmp_path, "text", "text", "image", model=model.to(dtype), processor=processor)
    score(made)
    assert (made.scorer.layout, made.scorer.packs) == ("separate", False)
    assert "because its" in caplog.text and "rows with an image" in caplog.text
    with pytest.raises(ValueError, match="layout='shared' does not fit Qwen2_5_VLForConditionalGeneration"):
        score(trainer(media, tmp_path, "text", "image", layout="shared"))


def test_streams_bring_their_kinds_with_their_batches(media, tmp_path, monkeypatch):
    break_packed_images(monkeypatch)
    data = Dataset.from_list(rows_of(media, "text", "image")).to_iterable_dataset()
    made = trainer_of("dpo", tmp_path, data, name="Qwen2.5-VL", layout="auto", max_steps=2)
    first, second = (made._prepare_inputs(made.data_collator([example])) for example in data)
    made.concatenated_forward(made.model, first)
    assert made.scorer.packs and made.scorer.proven == ["rows with text alone"]
    assert "proof_rows" not in first  # the other passes of the step need not gather them again
    made.evaluate(Dataset.from_list(rows_of(media, "text")))
    assert made.data_collator.proven is not None  # what comes with the stream is still to be proven
    made.concatenated_forward(made.model, second)
    assert not made.scorer.packs and made.scorer.proven == ["rows with text alone", "rows with an image"]


def test_another_dataset_is_proven_when_it_is_evaluated(media, tmp_path):
    made = trainer(media, tmp_path, "text", "text")
    score(made)
    made.evaluate(Dataset.from_list(rows_of(media, "video")))
    assert made.scorer.proven == ["rows with text alone", "rows with a video"]


def test_gradients_tell_what_log_probs_hardly_do(media, tmp_path, monkeypatch, caplog):
    """Gemma 3's images see themselves in both directions. The table of families pads it; the proof would, too."""
    monkeypatch.setattr(scorer, "padded_layout_reason", lambda model: None)
    model, processor = VISION_MODELS["Gemma 3"]()
    score(trainer(media, tmp_path, "image", name="Gemma 3", model=model, processor=processor))
    assert "Gemma3ForConditionalGeneration is trained with padded rows" in caplog.text


def test_the_proof_leaves_no_trace(media, tmp_path):
    """Random numbers, modes, gradients and weights are those of a run without it."""
    runs = []
    for proves in (True, False):
        made = trainer(media, tmp_path / str(proves), "image", "text", layout="shared", disable_dropout=False)
        if not proves:
            made.scorer.to_prove.clear()
        made.train()
        runs.append([p.detach().clone() for p in made.model.parameters() if p.requires_grad])
        assert bool(made.scorer.proven) == proves
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_first_of_kinds(media, tmp_path):
    """By columns of either name, empty ones and ones that are not there."""
    model, processor = fresh("Qwen2.5-VL")
    made = trainer_of("dpo", tmp_path, rows_of(media, "image"), model=model, processor=processor)
    data = Dataset.from_list([{"image": None, "video": "a.mp4"}, {"image": "a.png", "video": None}] * 2)
    found = first_of_kinds(data, made.data_collator)
    assert found == [{"image": None, "video": "a.mp4"}, {"image": "a.png", "video": None}]
    assert first_of_kinds(Dataset.from_list([{"id": "a"}, {"id": "b"}]), made.data_collator) == [{"id": "a"}]
    assert first_of_kinds(data.with_transform(lambda batch: batch), made.data_collator) is None
    path = tmp_path / "rows.jsonl"  # plain paths and dictionaries: a column of JSON
    videos = [["a.mp4"], [{"path": "b.mp4", "video_start": 0.0}], [], ["a.mp4", {"path": "b.mp4"}]]
    path.write_text("".join(json.dumps({"videos": sources}) + "\n" for sources in videos))
    mixed = load_json([path])
    assert isinstance(mixed.features["videos"], Json)
    found = [example["videos"] for example in first_of_kinds(mixed, made.data_collator)]
    assert found == [videos[0], videos[2], videos[3]]


@pytest.mark.parametrize("name", [name for name, family in NEWER.items() if family.chat])
def test_rounding_refuses_nobody(name, media):
    """In bfloat16 the rows of all families are proven, and packed where they are in float32."""
    model, processor = families_newer.build(name)
    with torch.no_grad():
        model = model.bfloat16()
        for path, weight in model.named_parameters():  # as `from_pretrained` has it
            if any(part in path for part in model._keep_in_fp32_modules_strict or ()):
                weight.data = weight.data.float()
    for config in [model.config, *(c for c in vars(model.config).values() if isinstance(c, PreTrainedConfig))]:
        config.dtype = torch.bfloat16
    collator = PreferenceCollator(processor, video=VideoOptions(num_frames=4))
    scorer = Scorer(model, layout="auto", pad_token_id=processor.tokenizer.pad_token_id)
    collator.pixel_dtype = scorer.pixel_dtype
    with torch.no_grad():
        scorer.score(model, collator([row("image", media["image"][:1])]))
    assert scorer.proven == ["rows with an image"] and scorer.packs == (padded_layout_reason(model) is None)


def test_the_policy_is_proven_not_its_reference(tmp_path, monkeypatch):
    """With a reference of its own, which is right, and comes first."""
    model, tokenizer = fresh()
    made = trainer_of("dpo", tmp_path, text_rows(2), model=model, processor=tokenizer, ref_model=fresh()[0], peft=None)
    made.scorer.to_prove.clear()
    made.evaluate(Dataset.from_list(text_rows(2)))
    for layer in made.model.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, out: (out[0] + out[0].mean(1, keepdim=True), *out[1:])
        )
    made.scorer.proven.clear()
    setup.add_proof_rows(made, [made.train_dataset])
    with pytest.raises(ProofError, match="its tokens see those behind them"):
        made.compute_loss(made.model, made._prepare_inputs(made.data_collator([made.train_dataset[0]])))


def test_pixels_that_are_whole_numbers_have_a_decoy():
    tree = Tree("row", [Trunk([1], media={"pixel_values_videos": torch.tensor([3, 250], dtype=torch.uint8)})],
                [Branch([2]), Branch([3])])  # fmt: skip
    decoy, own = ProofRow("a", tree).batch(0)["media"]
    assert decoy["pixel_values_videos"].tolist() == [247, 0] and own["pixel_values_videos"].tolist() == [3, 250]
