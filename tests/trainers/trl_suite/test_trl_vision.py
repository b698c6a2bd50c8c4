"""What TRL's DPO tests ask of vision-language models: images, several of them, none, lengths, precomputing."""

import re

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from trl_standins import conversations, plain, typed
from trl_training import assert_same_as_trl, steps, train, trainer_on, trains_adapter, trains_all
from vlm_standins import VISION_MODELS

from trl_vpo.errors import RowError

UNUSED = {  # LLaVA reads CLIP's patches in front of that layer; Gemma 3n's sounds, and tokens that stand for media
    "LLaVA": r"vision_tower\.post_layernorm\.",
    "Gemma 3n": r"audio|embed_vision\.(embedding|hard_embedding_norm)\.",
}
QWEN = "Qwen2.5-VL"
TOWER = "model.visual."


@pytest.fixture(scope="module")
def rows(images):
    """One image each, of three shapes."""
    return typed([[Image.open(images[i % 3])] for i in range(4)])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "Gemma 3n" else n for n in VISION_MODELS]
)
def test_one_image(name, rows, hub, tmp_path):
    if name == "Gemma 3n":
        pytest.importorskip("timm")
    more = {"router_aux_loss_coef": 0.0} if "MoE" in name else {}
    trainer = trainer_on(hub(name), rows, tmp_path / "ours", **more)
    assert_same_as_trl(trainer, rows, tmp_path / "theirs", **more)
    unused = next((pattern for begin, pattern in UNUSED.items() if name.startswith(begin)), "$^")
    names = set(dict(trainer.model.named_parameters()))
    assert names - steps(trainer) == {name for name in names if re.search(unused, name)}


def test_the_load_balancing_loss(rows, hub, tmp_path):
    with pytest.raises(ValueError, match=r"load-balancing loss.*router_aux_loss_coef=0\.0"):
        trainer_on(hub("Qwen3.5-MoE"), rows, tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_an_adapter(checkpointing, rows, hub, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    trains_adapter(hub(QWEN), rows, tmp_path, peft_config=lora, gradient_checkpointing=checkpointing)


def test_several_images_and_none(images, hub, tmp_path):
    pictures = [Image.open(path) for path in images]
    trainer = trains_all(hub(QWEN), typed([pictures[:2], [], pictures[2:], []]), tmp_path, max_length=None)
    collate, rows = trainer.data_collator, list(trainer.train_dataset)
    seen = [len(collate.encode(row).trunks[0].media.get("image_grid_thw", [])) for row in rows]
    batch = collate(rows)
    assert seen == [2, 0, 1, 0] and not batch["trunk_mask"].all()
    assert batch["trunk_types"]["mm_token_type_ids"].shape == batch["trunk_ids"].shape


@pytest.mark.parametrize("form", [plain, conversations])
def test_text_only(form, hub, tmp_path):
    """A row without images moves everything but the tower that reads them."""
    trainer, changed = train(hub(QWEN), form(), tmp_path)
    names = set(dict(trainer.model.named_parameters()))
    assert changed == {name for name in names if not name.startswith(TOWER)} and changed != names


def test_images_and_a_text_model(rows, hub, tmp_path):
    with pytest.raises(RowError, match=r"tokenizer of a text model\. Train a vision-language model"):
        trainer_on(hub("Qwen2.5"), rows, tmp_path)


# --- lengths and precomputing -------------------------------------------------------------------------------------


def test_a_length_that_cuts_a_response(rows, hub, tmp_path):
    """Not an image token would be lost; but a response would, and nothing is cut."""
    trainer = trainer_on(hub(QWEN), rows, tmp_path)
    lengths = []
    for row in trainer.train_dataset:
        tree = trainer.data_collator.encode(row)
        lengths.append(len(tree.trunks[0].ids) + max(len(branch.ids) for branch in tree.branches))
    with pytest.raises(RowError, match=f"are more than max_length={max(lengths) - 1}.*Nothing is cut"):
        trainer_on(hub(QWEN), rows, tmp_path, max_length=max(lengths) - 1).train()
    trains_all(hub(QWEN), rows, tmp_path, max_length=max(lengths))


def test_which_end_is_kept(rows, hub, tmp_path):
    with pytest.raises(ValueError, match=r"truncation_mode.*may cut its video"):
        trainer_on(hub(QWEN), rows, tmp_path, max_length=32, truncation_mode="keep_end")


def test_precomputing(rows, hub, tmp_path):
    """TRL refuses it; here the losses are those of the reference that runs along."""
    logged = []
    for precompute in (False, True):
        trainer, _ = train(hub(QWEN), rows, tmp_path / str(precompute), precompute_ref_log_probs=precompute)
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert (trainer.ref_model is None) == precompute
    torch.testing.assert_close(*map(torch.tensor, logged), rtol=1e-5, atol=1e-6)
