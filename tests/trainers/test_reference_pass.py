"""The reference's pass: in the policy's precision, and without the noise of its training."""

import math

import pytest
import torch
from peft import get_peft_model
from trainer_kit import collated, fresh, lora, losses_of, shake, text_rows, trainer_of
from transformers import TrainerCallback


@pytest.mark.parametrize("layout", ["separate", "auto"])
@pytest.mark.parametrize("kind", ["full", "full, explicit", "lora, explicit"])
def test_bfloat16_autocast_is_the_references_too(kind, layout, tmp_path):
    """A reference with float32 weights, beside the policy: before the first step their log-probs are equal, to the
    bit, as they would not be if one of them computed in float32."""
    more = {"ref_model": fresh()[0]} if "explicit" in kind else {}
    peft = "new" if "lora" in kind else None
    trainer = trainer_of("dpo", tmp_path, layout=layout, peft=peft, bf16=True, **more)
    dtypes = set()
    layer = trainer._bare(trainer.ref_model).model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda *args: dtypes.add(args[-1].dtype))
    trainer.train()
    assert trainer.scorer.layout == {"auto": "shared"}.get(layout, layout)
    assert dtypes == {torch.bfloat16} and layer.weight.dtype == torch.float32
    assert losses_of(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    for side in ("chosen", "rejected"):
        start, later = losses_of(trainer, f"displacement/{side}")
        assert start == 0 and later != 0


class TwoPasses(TrainerCallback):
    """Scores one batch in the midst of training, twice each: the reference's and the policy's sums of log-probs."""

    def __init__(self):
        self.trainer, self.reference, self.policy, self.modes = None, [], [], []

    @torch.no_grad()
    def on_step_end(self, args, state, control, **_):
        batch = collated(self.trainer)
        before = [module.training for module in self.trainer.model.modules()]
        self.reference += [self.trainer.reference_scores(batch).sums for _ in range(2)]
        self.modes.append([module.training for module in self.trainer.model.modules()] == before)
        self.policy += [self.trainer.concatenated_forward(self.trainer.model, batch).sums for _ in range(2)]


NOISE = {
    "embedding noise": ("new", {"neftune_noise_alpha": 5.0}),
    "embedding noise, given adapter": ("given", {"neftune_noise_alpha": 5.0}),
    "dropout, given adapter": ("given", {"disable_dropout": False}),
}


@pytest.mark.parametrize("kind", NOISE)
def test_training_noise_does_not_reach_the_reference(kind, tmp_path):
    """NEFTune and LoRA's dropout are the policy's. The reference is the same in every pass, and as in evaluation."""
    adapter, options = NOISE[kind]
    model, tokenizer = fresh()
    config = lora(text=True, lora_dropout=0.0 if "neftune_noise_alpha" in options else 0.3)
    more = {"peft_config": config}
    if adapter == "given":
        model = get_peft_model(model, config)
        shake(model, 3, scale=0.3)
        more = {}
    more |= {"model": model, "processor": tokenizer, "peft": None, "callbacks": [watch := TwoPasses()], **options}
    watch.trainer = trainer = trainer_of("dpo", tmp_path, text_rows(4), **more)
    trainer.model.eval()
    want = trainer.reference_scores(collated(trainer)).sums
    trainer.train()
    assert len(watch.reference) == 4 and all(torch.equal(got, want) for got in watch.reference)
    assert all(watch.modes)  # the policy goes on in training mode
    for first, second in zip(watch.policy[::2], watch.policy[1::2]):  # where it is random
        assert (first - second).abs().max() > 1e-3
    trainer.model.eval()
    assert torch.equal(trainer.reference_scores(collated(trainer)).sums, want)
