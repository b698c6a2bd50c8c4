"""LeanPO's pairs of the small world, made by the testbed's base."""

from leanpo_kit import pipeline
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_vpo.data.inputs import InputRow
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.local import LocalModel
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE


def test_damage_costs_answers_and_the_hint_helps(tmp_path):
    items = []
    for number, sample in enumerate(world.draw_samples("clip", 16, seed=11, habits=False)):
        path = str(world.write_sample(sample, tmp_path / f"{number}.mp4"))
        example = {"question": language.PROMPTS["clip"], "answer": language.caption(sample.things)}
        media = Media(videos=(load_video(path, VideoOptions(num_frames=8)),))
        items.append((InputRow(f"r{number}", example, videos=(path,)), media))
    base, processor = AutoModelForImageTextToText.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE)
    job = pipeline(LocalModel(base, processor, batch_size=16), max_new_tokens=16)
    outcomes = job.make(items)
    figures = job.summarize(outcomes)
    assert sum(bool(outcome.rows) for outcome in outcomes) >= 10
    # motion cannot be told from two frames of a small part
    assert figures["rejected_right"] < figures["plain_right"]
    assert figures["rejected_trust"] < figures["chosen_trust"]
    assert figures["reward_accuracy"] > 0.5
    assert figures["answer_reward"] < 0
