"""The demands of TRL's DPO tests on vision-language models: one image, several of them, none, and lengths."""

import re

import pytest
from peft import LoraConfig
from PIL import Image
from trl_standins import conversations, plain, typed
from trl_training import assert_same_as_trl, steps, train, trainer_on, trains_adapter, trains_all
from vlm_standins import VISION_MODELS

from trl_vpo.errors import RowError

UNUSED = r"vision_tower\.post_layernorm\."  # LLaVA reads CLIP's patches in front of that layer
QWEN = "Qwen2.5-VL"
TOWER = "model.visual."


@pytest.fixture(scope="module")
def rows(images):
    """One image each, of three shapes."""
    return typed([[Image.open(images[i % 3])] for i in range(4)])


@pytest.mark.parametrize("name", VISION_MODELS)
def test_one_image(name, rows, hub, tmp_path):
    trainer = trainer_on(hub(name), rows, tmp_path / "ours")
    assert_same_as_trl(trainer, rows, tmp_path / "theirs")
    names = set(dict(trainer.model.named_parameters()))
    unused = {each for each in names if name.startswith("LLaVA") and re.search(UNUSED, each)}
    assert names - steps(trainer) == unused


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
