"""The model card: its facts are the run's, and its snippet runs as it stands."""

import re
import shutil

import pytest
import yaml
from datasets import IterableDataset
from families import LANGUAGE_MODEL, build, text_model, write_model
from helpers import row, write_clip, write_image
from peft import LoraConfig
from trainer_kit import trainer_of
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import trl_vpo
from trl_vpo.models.source import hub_name


def trained(method, base, processor, rows, folder, peft=LANGUAGE_MODEL, loader=AutoModelForImageTextToText, **more):
    """The card of a trainer after one step on a base that lies on disk; the working folder is `folder`."""
    lora = LoraConfig(r=2, target_modules=peft) if peft else None
    more = {"max_steps": 1, "per_device_train_batch_size": 1, "num_frames": 4} | more
    more |= {"peft": None, "peft_config": lora}
    trainer = trainer_of(
        method, "outputs/tuned", rows, model=loader.from_pretrained(base), processor=processor, **more
    )
    trainer.train()
    trainer.save_model("outputs/tuned")
    trainer.create_model_card(dataset_name="someone/pairs")
    return (folder / "outputs/tuned" / "README.md").read_text()


def base_of(built, folder="base"):
    """Write a model and its processor; return that."""
    write_model(folder, *built)
    return built[1]


def run_snippet(card, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.S)
    capsys.readouterr()
    exec(compile(snippet.replace("max_new_tokens=128", "max_new_tokens=4"), "card", "exec"), {})
    return capsys.readouterr().out


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["video", "image"])
def test_the_snippet_of_an_adapter_runs_without_trl_vpo(kind, here, capsys):
    built = build("Qwen2.5-VL")
    built[1].video_processor.size = {"shortest_edge": 3136, "longest_edge": 12845056}  # as published
    processor = base_of(built)
    source = write_clip(here / "clip.mp4") if kind == "video" else write_image(here / "photo.jpg")
    card = trained("rrpo", "base", processor, [row(kind, [source])], here)
    assert "trl_vpo" not in re.findall(r"```python\n(.*?)```", card, re.S)[0]
    assert ("size = {'shortest_edge': 100352, 'longest_edge': 602112}" in card) == (kind == "video")
    assert run_snippet(card, capsys).endswith("\n")
    facts = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in facts and facts["library_name"] == "peft"  # the base is a folder, no model of the Hub
    assert facts["pipeline_tag"] == f"{kind}-text-to-text" and facts["datasets"] == ["someone/pairs"]
    assert {"trl-vpo", "rrpo"} <= set(facts["tags"])
    assert "2504.12083" in card and trl_vpo.__version__ in card and "| `alpha` | 0.01 |" in card
    assert "| `pairs per step` | 1 |" in card and "| `r` | 2 |" in card and "| `lora_alpha` | 8 |" in card


def test_the_card_of_a_streamed_run_shows_its_medium(here):
    """A stream does not know its columns."""
    processor = base_of(build("Qwen2.5-VL"))
    for kind, write in (("video", write_clip), ("image", write_image)):
        rows = [row(kind, [write(here / f"a.{'mp4' if kind == 'video' else 'png'}")])]
        stream = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        assert stream.column_names is None
        card = trained("dpo", "base", processor, stream, here)
        assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == f"{kind}-text-to-text"


def test_the_card_shows_the_length_that_was_in_force(here):
    processor = base_of(build("Qwen2.5-VL"))
    rows = [row("image", [write_image(here / "photo.png")])]
    card = trained("dpo", "base", processor, rows, here)
    assert "| `max_steps` | 1 |" in card and "num_train_epochs" not in card
    card = trained("dpo", "base", processor, rows, here, max_steps=-1, num_train_epochs=1)
    assert "| `num_train_epochs` | 1 |" in card and "max_steps" not in card


def test_the_card_shows_the_options_of_the_loss(here):
    """Also those that TRL has, where the method or the run has another value than TRL."""
    processor = base_of(build("Qwen2.5-VL"))
    rows = [row("image", [write_image(here / "photo.png")])]
    card = trained("leanpo", "base", processor, rows, here, label_smoothing=0.0)
    assert "| `label_smoothing` | 0.0 |" in card and "| `nll_weight` | 0.5 |" in card
    card = trained("dpo", "base", processor, rows, here)
    assert "loss_type" not in card and "discopop_tau" not in card
    card = trained("dpo", "base", processor, rows, here, loss_type=["ipo", "sft"], loss_weights=[1.0, 0.5])
    assert "| `loss_type` | ['ipo', 'sft'] |" in card and "| `loss_weights` | [1.0, 0.5] |" in card


def test_the_snippets_of_full_and_text_models_run(here, capsys):
    processor = base_of(build("LLaVA-1.5"))
    photo = write_image(here / "photo.jpg")
    card = trained("leanpo", "base", processor, [row("image", [photo])], here, peft=None)
    assert "PeftModel" not in card and run_snippet(card, capsys).endswith("\n")
    shutil.rmtree("base")
    tokenizer = base_of(text_model())
    card = trained("dpo", "base", tokenizer, [row(None)], here, "all-linear", AutoModelForCausalLM)
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "text-generation"
    assert "What happens here?" in run_snippet(card, capsys)


def test_the_snippet_finds_a_base_by_its_whole_path(here, capsys, tmp_path_factory):
    """A folder elsewhere; one of the Hub's cache goes by its name on the Hub."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "base"
    processor = base_of(build("Qwen2.5-VL"), elsewhere)
    photo = write_image(here / "photo.jpg")
    card = trained("dpo", str(elsewhere), processor, [row("image", [photo])], here)
    assert f'from_pretrained("{elsewhere}"' in card and f"LoRA adapter of `{elsewhere}`" in card
    assert run_snippet(card, capsys).endswith("\n")
    assert hub_name("/c/hub/models--Qwen--Qwen2-VL-7B/snapshots/0a1b") == "Qwen/Qwen2-VL-7B"
    assert hub_name(str(elsewhere)) is None
