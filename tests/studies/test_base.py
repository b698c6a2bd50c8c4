"""The shipped base: loads through the Auto classes and scores what its documentation says."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from studies.testbed import base as measures
from trl_vpo.testbed import language, tiny_vlm, world

TOLERANCE = 0.03  # 6 of 200 samples: other libraries of codecs and kernels round differently


@pytest.fixture(scope="module")
def base():
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm.BASE)
    return model.eval(), AutoProcessor.from_pretrained(tiny_vlm.BASE)


def documented() -> dict[tuple[str, str], dict[str, float]]:
    """The table in the study's docstring: (kind, split) -> shares."""
    names = ("exact", "hallucinated", "unparsed", "open", "yes", "no", "hinted")
    lines = [line.split() for line in measures.__doc__.splitlines()]
    assert list(names) in lines  # the head of the table
    rows = [(words[0].removesuffix("s,"), words[1], words[2:]) for words in lines if len(words) == 2 + len(names)]
    return {row[:2]: dict(zip(names, map(float, row[2]))) for row in rows if row[1] in ("habits", "balanced")}


def test_the_weights_are_small_and_of_the_documented_size(base):
    model, _ = base
    assert (tiny_vlm.BASE / "model.safetensors").stat().st_size < 4e6
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in " ".join(tiny_vlm.__doc__.split())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"


@pytest.mark.parametrize(
    ("kind", "split", "measure"),
    [
        *((kind, split, measures.measure_captions) for kind in ("clip", "scene") for split in ("habits", "balanced")),
        ("clip", "balanced", measures.measure_questions),
    ],
)
def test_the_base_is_as_good_and_as_bad_as_documented(base, kind, split, measure):
    expected = documented()[kind, split]
    measured = measure(*base, kind, habits=split == "habits")
    assert measured == pytest.approx({name: expected[name] for name in measured}, abs=TOLERANCE)


def test_the_base_says_what_is_usual(base):
    samples = world.draw_samples("clip", 400, seed=2, habits=False)

    def share(samples, caption):
        texts = measures.answer(*base, samples, [language.PROMPTS["clip"]] * len(samples))
        return sum(text == caption(s.things) for text, s in zip(texts, samples)) / len(samples)

    odd = [s for s in samples if world.as_usual(s.things) != s.things]
    assert share(odd, lambda things: language.caption(world.as_usual(things))) > 0.6
    free = [s for s in samples if s.things[0].shape not in world.USUAL_COLOUR | world.USUAL_MOTION]
    assert share(free, language.caption) > 0.8


def test_processor_keeps_sizes_and_counts_of_tokens(base):
    _, processor = base
    samples = [world.draw_samples(kind, 1, 0, habits=False)[0] for kind in ("clip", "scene")]
    items = [language.caption_item(sample.things) for sample in samples]
    batch = measures.encode(processor, samples, items)
    assert batch["video_grid_thw"].tolist() == [[4, 8, 8]]
    assert batch["image_grid_thw"].tolist() == [[1, 8, 16]]
    answers = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert answers == [f"{item.answer}<|im_end|>\n" for item in items]
    tokens = processor.tokenizer("a purple triangle moves right.")["input_ids"]
    assert len(tokens) == 6  # a word, a token
