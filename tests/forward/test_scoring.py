"""`concatenated_forward` against full logits, one sequence and one call at a time."""

import numpy as np
import pytest
import torch
from helpers import row
from PIL import Image
from slow_kit import of_tokens, slow_kl, slow_scores
from step_kit import assert_same_gradients, gradients
from trainer_kit import PAIRS, collated, fresh, image_rows, shake, text_rows, trainer_of

LAYOUTS = pytest.mark.parametrize("layout", ["separate", "shared"])
MODELS = pytest.mark.parametrize("name", ["text", "Qwen2-VL", "LLaVA-1.5"])


def moved(method, name, tmp_path, images, **more):
    rows = text_rows(4) if name == "text" else [*image_rows(images, 3), *text_rows(1)]
    trainer = trainer_of(method, tmp_path, rows, name=name, **more)
    shake(trainer.model)
    return trainer


def base_scores(trainer):
    with torch.no_grad(), trainer.model.disable_adapter():
        return slow_scores(trainer)


def assert_rows_close(got, want, mask, rtol, atol=1e-5):
    """(S, T) values where `mask` against a list of (T,) values."""
    for values, scored, here in zip(want, got, mask):
        torch.testing.assert_close(scored[here], values, rtol=rtol, atol=atol)


@LAYOUTS
@MODELS
def test_concatenated_forward_scores_as_full_calls(name, layout, tmp_path, images):
    """Ragged prompts, responses and images, and a row without an image: values and LoRA gradients."""
    trainer = moved("dpo", name, tmp_path, images, layout=layout)
    batch = collated(trainer)
    assert trainer.concatenated_forward(trainer.model, batch).log_sum_sq_probs is None
    trainer.scorer.squares = True
    assert trainer.reference_scores(batch).log_sum_sq_probs is None
    scores = trainer.concatenated_forward(trainer.model, batch)
    slow = slow_scores(trainer)
    squares = [(p.exp() ** 2).sum(-1).log() for p, _ in slow]
    assert_rows_close(scores.log_sum_sq_probs, squares, scores.mask, 1e-5)
    logps = of_tokens(slow)
    assert len({len(x) for x in logps}) > 3
    assert_rows_close(scores.logps, logps, scores.mask, 1e-5)
    assert_rows_close(scores.entropy, [-(p.exp() * p).sum(-1) for p, _ in slow], scores.mask, 1e-5)
    for s, (p, ids) in enumerate(slow):
        assert torch.equal(scores.is_top1[s][scores.mask[s]], p.argmax(-1) == ids)
    assert scores.logps[~scores.mask].abs().sum() == 0
    torch.testing.assert_close(scores.sums, torch.stack([x.sum() for x in logps]))
    weights = torch.rand(len(logps))
    want = gradients(trainer, sum(w * x.sum() for w, x in zip(weights, logps)))
    assert_same_gradients(gradients(trainer, (weights * scores.sums).sum()), want)


@LAYOUTS
@MODELS
def test_kl_is_that_of_the_full_logits(name, layout, tmp_path, images):
    trainer = moved("rrpo", name, tmp_path, images, layout=layout)
    batch = collated(trainer)
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    base = base_scores(trainer)
    kl = slow_kl(slow_scores(trainer), base)
    assert min(values.mean() for values in kl) > 1e-4  # there is something to compare
    assert_rows_close(scores.kl, kl, scores.mask, 1e-3)
    assert_rows_close(reference.logps, of_tokens(base), scores.mask, 1e-5)
    want = gradients(trainer, sum(kl[s].sum() for s in batch["chosen"].tolist()))
    assert_same_gradients(gradients(trainer, scores.kl[batch["chosen"]].sum()), want)
    # The rejected side's is a metric: through the sum of everything flows the chosen side's gradient only.
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    assert_same_gradients(gradients(trainer, scores.kl.sum()), want)
    assert not reference.logps.requires_grad and reference.kl is None


@LAYOUTS
def test_videos_of_different_lengths_keep_their_order(layout, tmp_path):
    """Of 2, 4 and 3 frames, which cannot be stacked, and a row of text: one call."""
    rng = np.random.default_rng(0)
    clips = [[Image.fromarray(rng.integers(0, 255, (56, 56, 3), np.uint8)) for _ in range(n)] for n in (2, 4, 3, 4)]
    rows = [{**row("video", [clip], *PAIRS[i]), "id": f"v{i}"} for i, clip in enumerate(clips)]
    rows.append({**text_rows(1)[0], "videos": []})
    trainer = trainer_of("rrpo", tmp_path, rows, name="LLaVA-OneVision", layout=layout)
    shake(trainer.model)
    batch, calls = collated(trainer), []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    assert len(calls) == 2
    slow = slow_scores(trainer)
    assert_rows_close(scores.logps, of_tokens(slow), scores.mask, 1e-4)
    assert_rows_close(scores.kl, slow_kl(slow, base_scores(trainer)), scores.mask, 1e-3)


def test_pad_to_multiple_of_changes_the_width_only(tmp_path, images):
    """Of padded rows."""
    widths, logps = [], []
    for multiple in (32, None):
        trainer = moved("dpo", "Qwen2-VL", tmp_path, images, layout="separate", pad_to_multiple_of=multiple)
        trainer.scorer.packs, trainer.scorer.squares = False, True
        seen = lambda model, args, kwargs: widths.append(kwargs["input_ids"].size(1))  # noqa: E731
        trainer.model.register_forward_pre_hook(seen, with_kwargs=True)
        scores = trainer.concatenated_forward(trainer.model, collated(trainer))
        logps.append(scores.logps)
        squares = [(p.exp() ** 2).sum(-1).log() for p, _ in slow_scores(trainer)]
        assert_rows_close(scores.log_sum_sq_probs, squares, scores.mask, 1e-5)
    torch.testing.assert_close(*logps, rtol=1e-5, atol=1e-5)
    assert widths[0] % 32 == 0 and widths[1] % 32 and widths[1] < widths[0]


def test_bf16_weights_give_float32_log_probs(tmp_path):
    model, tokenizer = fresh()
    trainer = trainer_of("rrpo", tmp_path, model=model.bfloat16(), processor=tokenizer, peft=None)
    batch = collated(trainer)
    shake(trainer.model)
    reference = trainer.reference_scores(batch)
    scores = trainer.concatenated_forward(trainer.model, batch, reference)
    assert {scores.logps.dtype, scores.kl.dtype, scores.entropy.dtype} == {torch.float32}
    assert_rows_close(scores.logps, of_tokens(slow_scores(trainer)), scores.mask, 2e-2, atol=2e-2)


@pytest.mark.parametrize("limit", [32, 4096])
def test_positions_that_depend_on_the_batch_are_named(limit, tmp_path, caplog):
    """Dynamic RoPE: a row's scores change beside a longer one, which the log says once."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": limit}
    model, tokenizer = fresh()
    config = type(model.config)(**model.config.to_dict() | {"rope_parameters": rope, "max_position_embeddings": limit})
    model = type(model)(config)
    long = row(None, (), "a red square moves left. " * 8, "a blue circle.", id="long")
    trainer = trainer_of("dpo", tmp_path, [*text_rows(1), long], model=model, processor=tokenizer)
    alone = trainer.concatenated_forward(trainer.model, collated(trainer, 1)).logps[0]
    assert "rotary" not in caplog.text
    for _ in ("once", "again"):
        beside = trainer.concatenated_forward(trainer.model, collated(trainer)).logps[0]
    same = torch.allclose(alone, beside[: len(alone)], atol=1e-5)
    assert same == (limit == 4096)
    assert caplog.text.count(f"in batches beyond {limit} tokens the scores of a row depend") == (limit == 32)
