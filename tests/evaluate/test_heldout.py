"""Held-out measures against the same numbers computed the long way: one row at a time, full logits."""

import pytest
import torch
from datasets import Dataset

from trl_vpo.testbed import language, rows, tiny_vlm

LORA = r".*language_model.*\.(q_proj|v_proj)"


@pytest.fixture(scope="module", params=["clip", "scene"])
def trained(request, tmp_path_factory):
    """A trainer whose adapter is not the identity, with samples and rows of one kind."""
    from peft import LoraConfig

    from trl_vpo import LeanPOConfig, LeanPOTrainer

    folder = tmp_path_factory.mktemp(request.param)
    samples, written = rows.write_preferences(request.param, 5, seed=21, folder=folder / "media")
    dataset = Dataset.from_list(written)
    args = LeanPOConfig(
        str(folder / "out"), use_cpu=True, bf16=False, report_to=[], num_frames=8, per_device_eval_batch_size=2
    )
    trainer = LeanPOTrainer(
        str(tiny_vlm.BASE), args=args, train_dataset=dataset, peft_config=LoraConfig(target_modules=LORA)
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return trainer, samples, dataset


@torch.no_grad()
def log_probs(model, processor, sample, text) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, V) log-probs of each next token of a caption, and its tokens (T,)."""
    item = language.Item("caption", language.PROMPTS[sample.kind], text)
    batch = tiny_vlm.encode(processor, [sample], [item])
    labels = batch.pop("labels")[0, 1:]
    logits = model(**batch).logits[0, :-1].float().log_softmax(-1)
    return logits[labels != -100], labels[labels != -100]


def test_measures_agree_with_the_long_way(trained):
    from trl_vpo.evaluate.heldout import base_model, measure_preferences

    trainer, samples, dataset = trained
    before, after = measure_preferences(trainer, dataset)
    model, processor = trainer.model.eval(), trainer.processing_class
    sums = {name: {"chosen": [], "rejected": []} for name in ("base", "policy")}
    kls = []
    for sample, row in zip(_as_decoded(samples, dataset), dataset):
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"][0]["text"]
            policy, tokens = log_probs(model, processor, sample, text)
            with base_model(model):
                base, _ = log_probs(model, processor, sample, text)
            for name, logps in (("base", base), ("policy", policy)):
                sums[name][side].append(logps.gather(1, tokens[:, None]).sum().item())
            if side == "chosen":
                kls.append((base.exp() * (base - policy)).sum().item())
    for name, measures in (("base", before), ("policy", after)):
        chosen, rejected = (torch.tensor(sums[name][side]) for side in ("chosen", "rejected"))
        assert measures.pairs == len(samples)
        assert measures.chosen_logp == pytest.approx(chosen.mean().item(), abs=1e-3)
        assert measures.rejected_logp == pytest.approx(rejected.mean().item(), abs=1e-3)
        assert measures.accuracy == pytest.approx((chosen > rejected).float().mean().item())
    assert before.kl == 0 and after.kl > 0.01
    assert after.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3)


def test_generation_sees_what_training_sees(trained):
    from trl_vpo.evaluate.heldout import base_model, generate_responses

    trainer, samples, dataset = trained
    trainer.model.train()
    with base_model(trainer.model):
        texts = generate_responses(trainer, dataset)
        expected = tiny_vlm.answer(
            trainer.model.eval(),
            trainer.processing_class,
            _as_decoded(samples, dataset),
            [language.PROMPTS[sample.kind] for sample in samples],
        )
    assert texts == expected


def test_a_model_without_an_adapter_has_no_base_to_go_back_to():
    from trl_vpo.evaluate.heldout import base_model

    with pytest.raises(ValueError, match="no adapter to switch off"), base_model(torch.nn.Linear(1, 1)):
        pass


def _as_decoded(samples, dataset):
    """The samples with the pixels that come back from their files."""
    from dataclasses import replace

    from trl_vpo.testbed.world import read_mp4

    return [
        replace(sample, frames=read_mp4(row["videos"][0])) if sample.kind == "clip" else sample
        for sample, row in zip(samples, dataset)
    ]
