"""The quickstart's table and sentences follow from the numbers; its recipes train what it says they do."""

import signal

import pytest
from datasets import Dataset
from held_out_kit import LANGUAGE, processor
from peft import LoraConfig
from rich.console import Console
from trl import DPOTrainer

from studies.testbed.base import answer
from trl_vpo import LeanPOConfig, LeanPOTrainer, cli
from trl_vpo.testbed import language, quickstart, rows, tiny_vlm
from trl_vpo.testbed.language import CaptionCheck
from trl_vpo.testbed.quickstart import Measured, Result
from trl_vpo.training.sigterm import STOP_SIGNALS, TrainingStopped

TRUE, FALSE = CaptionCheck(True, True, ()), CaptionCheck(True, False, ("red square",))
GARBLED = CaptionCheck(False, False, ())


def measured(captions, accuracy=0.5, chosen=-5.0, rejected=-4.0, kl=0.0):
    preferences = {"preference/accuracy": accuracy, "preference/accuracy_average": accuracy}
    preferences |= {"logps/chosen": chosen, "logps/rejected": rejected, "kl/chosen": kl}
    return Measured(preferences, captions)


BEFORE = measured([FALSE] * 40 + [TRUE] * 60)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (
            measured([FALSE] * 10 + [TRUE] * 90, accuracy=0.9, chosen=-4.0),
            "30 of 100 captions fixed, 0 newly wrong; it hallucinates less than the base.",
        ),
        (  # 5 against 2: within two standard deviations (5.3) of nothing
            measured([FALSE] * 35 + [TRUE] * 63 + [FALSE] * 2, accuracy=0.9, chosen=-4.0),
            "5 of 100 captions fixed, 2 newly wrong; it does not help here: no clear change in hallucination.",
        ),
        (
            measured([FALSE] * 40 + [FALSE] * 30 + [GARBLED] * 30, accuracy=0.5, chosen=-7.5),
            "0 of 100 captions fixed, 30 newly wrong; it does not help here: it hallucinates more than the base; "
            "it does not prefer the true captions more often than the base does; it makes the true captions "
            "themselves less likely (-2.50 nats); 30 of its captions are outside the world's grammar (base: 0).",
        ),
    ],
)
def test_words_follow_from_the_numbers(after, words):
    assert quickstart.in_words(Result("DPO", "clip", BEFORE, after, 10.0, [])) == words


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


def test_the_next_steps_are_commands():
    text = quickstart.NEXT.format(out="out", kind="clip", runs="out/dpo out/lpoi")
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("  trl-vpo ")]
    assert [words[0] for words in commands] == ["view", "plot", "recipes", "doctor", "train"]
    for words in commands:
        args, rest = cli.make_parser().parse_known_args(words)
        assert (args.run.__name__ == words[0] and not rest) or words[0] == "doctor"
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("kind", ["clip", "scene"])
def test_captions_are_the_models_own_greedy_answers(kind, tmp_path):
    samples, written = rows.write_preferences(kind, 3, seed=21, folder=tmp_path / "media")
    args = LeanPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], num_frames=8)
    dataset, lora = Dataset.from_list(written), LoraConfig(target_modules=LANGUAGE)
    trainer = LeanPOTrainer(str(tiny_vlm.BASE), args=args, train_dataset=dataset, peft_config=lora)
    model = trainer.model.eval()
    expected = answer(model, processor(), samples, [language.PROMPTS[kind]] * 3)
    assert quickstart.answer_prompts(trainer, dataset) == expected


def test_a_stopped_one_names_no_option_that_it_does_not_have(tmp_path, monkeypatch, capsys):
    _, written = rows.write_preferences("clip", 32, seed=21, folder=tmp_path / "media")
    step = DPOTrainer.training_step

    def signalled(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "training_step", signalled)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with pytest.raises(TrainingStopped):
            quickstart.run_method("dpo", tmp_path, None, None, data=rows.write_jsonl(written, tmp_path / "rows.jsonl"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    text = capsys.readouterr().out
    assert "stopped after step 1 of" in text and "same command starts it from scratch" in text
    assert "--resume_from_checkpoint" not in text
