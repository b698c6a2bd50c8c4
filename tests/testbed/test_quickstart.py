"""The quickstart's table and sentences follow from the numbers; its recipes train what it says they do."""

import pytest
from datasets import Dataset
from held_out_kit import LANGUAGE, processor
from peft import LoraConfig
from rich.console import Console

from trl_vpo import LeanPOConfig, LeanPOTrainer
from trl_vpo.testbed import language, quickstart, rows, tiny_vlm
from trl_vpo.testbed.language import Verdict
from trl_vpo.testbed.quickstart import Measured, Result

TRUE, FALSE, GARBLED = Verdict(True, True, ()), Verdict(True, False, ("red square",)), Verdict(False, False, ())


def measured(verdicts, accuracy=0.5, chosen=-5.0, rejected=-4.0, kl=0.0):
    preferences = {"preference/accuracy": accuracy, "preference/accuracy_average": accuracy}
    preferences |= {"logps/chosen": chosen, "logps/rejected": rejected, "kl/chosen": kl}
    return Measured(preferences, verdicts)


BEFORE = measured([FALSE] * 40 + [TRUE] * 60)


def said(after) -> str:
    return quickstart.verdict(Result("DPO", "clip", BEFORE, after, 10.0, []))


def test_a_method_that_helps_is_said_to_help():
    text = said(measured([FALSE] * 10 + [TRUE] * 90, accuracy=0.9, chosen=-4.0))
    assert text == "30 of 100 captions mended, 0 newly false; it hallucinates less than the base."


def test_no_clear_change_is_no_help():
    # 5 mended against 2 newly false: within two standard deviations (5.3) of nothing
    text = said(measured([FALSE] * 35 + [TRUE] * 63 + [FALSE] * 2, accuracy=0.9, chosen=-4.0))
    assert text.startswith("5 of 100 captions mended, 2 newly false; it does not help here: no clear change")


def test_what_gets_worse_is_named():
    text = said(measured([FALSE] * 40 + [FALSE] * 30 + [GARBLED] * 30, accuracy=0.5, chosen=-7.5))
    assert "it hallucinates more than the base" in text
    assert "does not prefer the true captions more often" in text
    assert "less likely (-2.50 nats)" in text
    assert "30 of its captions are no sentences of the world (base: 0)" in text


def test_the_table_compares_each_kind_with_its_own_base():
    scenes = measured([FALSE] * 20 + [TRUE] * 80)
    results = [
        Result("DPO", "clip", BEFORE, measured([TRUE] * 100, 0.99, -3.0, -9.0, 1.25), 21.0, []),
        Result("LPOI", "scene", scenes, measured([TRUE] * 100, 0.75, -6.0, -5.0, 0.5), 33.0, []),
    ]
    console = Console(width=140)
    with console.capture() as capture:
        console.print(quickstart.results_table(results))
    lines = [line.replace("│", " ").split() for line in capture.get().splitlines()]
    assert ["base", "(clips)", "50.0%", "40.0%"] in lines
    assert ["DPO", "99.0%", "0.0%", "+2.00", "-5.00", "1.250", "21"] in lines
    assert ["base", "(scenes)", "50.0%", "20.0%"] in lines
    assert ["LPOI", "75.0%", "0.0%", "-1.00", "-1.00", "0.500", "33"] in lines


@pytest.mark.parametrize("kind", ["clip", "scene"])
def test_captions_are_the_models_own_greedy_answers(kind, tmp_path):
    samples, written = rows.write_preferences(kind, 3, seed=21, folder=tmp_path / "media")
    args = LeanPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], num_frames=8)
    dataset, lora = Dataset.from_list(written), LoraConfig(target_modules=LANGUAGE)
    trainer = LeanPOTrainer(str(tiny_vlm.BASE), args=args, train_dataset=dataset, peft_config=lora)
    model = trainer.model.eval()
    expected = tiny_vlm.answer(model, processor(), samples, [language.PROMPTS[kind]] * 3)
    assert quickstart.answer_prompts(trainer, dataset) == expected
