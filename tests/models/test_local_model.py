"""A model in this process: sampling that no batch changes, log-probs as in training, other families."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build
from families_tiles import TILES
from helpers import write_clip
from local_kit import GREEDY, asked, load, questions
from PIL import Image

from trl_vpo.errors import ModelError
from trl_vpo.forward.parts import part_of
from trl_vpo.forward.tree import Trunk
from trl_vpo.media.load import VideoOptions, load_video
from trl_vpo.models.local import LocalModel, SeededSampling
from trl_vpo.models.requests import Answer, Request, Sampling
from trl_vpo.text.responses import Failure

HOT = Sampling(max_new_tokens=16, temperature=2.5, top_p=0.95)


@pytest.fixture(scope="module")
def base():
    return load(batch_size=8)


@pytest.fixture(scope="module")
def requests():
    return questions(8)


def test_a_sampled_answer_does_not_depend_on_its_batch(base, requests):
    together = base.answer(requests, HOT)
    torch.manual_seed(1)  # the global random state plays no part
    alone = [base.answer([request], HOT)[0] for request in requests]
    backwards = base.answer(requests[::-1], HOT)[::-1]
    assert together == alone == backwards
    assert together != base.answer(requests, GREEDY)
    assert sum(isinstance(text, str) for text in together) > 4
    seeds = base.answer([replace(requests[0], seed=seed) for seed in (1, 2, 3, 4, 1, 2, 3, 4)], HOT)
    assert seeds[:4] == seeds[4:] and len(set(seeds)) > 1


def test_greedy_is_the_models_own_greedy_decoding(base, requests):
    tokenizer = base.processor.tokenizer
    for request, text in zip(requests, base.answer(requests, GREEDY)):
        prompt = base.processor.apply_chat_template(request.messages, add_generation_prompt=True)
        (clip,) = request.media.videos
        inputs = base.processor(text=[prompt], videos=[clip.frames], do_sample_frames=False, return_tensors="pt")
        output = base.model.generate(**inputs, max_new_tokens=GREEDY.max_new_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].size(1) :]
        assert new[-1] == tokenizer.eos_token_id
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


def frequencies(logits: list[float], sampling: Sampling, rows: int, steps: int) -> torch.Tensor:
    """Return how often each token is drawn over `rows * steps` draws, one seed a row."""
    sampler = SeededSampling(range(rows), 5, sampling)
    scores = torch.tensor([logits] * rows)
    drawn = [sampler(torch.zeros(rows, 5 + step, dtype=torch.long), scores).argmax(-1) for step in range(steps)]
    return torch.cat(drawn).bincount(minlength=len(logits)).double() / (rows * steps)


def test_tokens_are_drawn_with_their_probabilities():
    logits, temperature, n = [2.0, 1.0, 0.0, 0.5, -1.0], 0.7, 20_000
    exact = torch.tensor(logits, dtype=torch.double).div(temperature).softmax(-1)
    drawn = frequencies(logits, Sampling(temperature=temperature, top_p=1.0), 2000, 10)
    chi_square = (n * (drawn - exact) ** 2 / exact).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand
    # 0.716 and 0.172 reach 0.85; the next token takes no part, whatever its noise
    nucleus = frequencies(logits, Sampling(temperature=temperature, top_p=0.85), 2000, 10)
    assert exact[:2].sum() > 0.85 and nucleus[2:].sum() == 0
    share = float(exact[0] / exact[:2].sum())
    assert float(nucleus[0]) == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_draws_of_neighbouring_steps_and_seeds_are_independent():
    sampling = Sampling(temperature=1.0, top_p=1.0)
    scores = torch.zeros(4000, 2)
    sampler = SeededSampling(range(4000), 0, sampling)
    first, second = (sampler(torch.zeros(4000, step, dtype=torch.long), scores).argmax(-1) for step in (1, 2))
    for a, b in ((first, second), (first[:-1], first[1:])):
        same = (a == b).double().mean().item()
        assert same == pytest.approx(0.5, abs=4 * 0.5 / len(a) ** 0.5)


def test_the_models_own_generation_settings_take_no_part(tmp_path, requests):
    """A checkpoint with a repetition penalty, sampling defaults and a forced first token answers as one without."""
    plain, changed = load(), {"repetition_penalty": 5.0, "do_sample": True, "top_k": 1, "temperature": 0.3}
    changed |= {"forced_bos_token_id": 7, "no_repeat_ngram_size": 1, "max_length": 3}
    plain.model.generation_config.update(**changed)
    plain.model.save_pretrained(tmp_path)
    plain.processor.save_pretrained(tmp_path)
    assert "repetition_penalty" in (tmp_path / "generation_config.json").read_text()
    other = load(name=str(tmp_path))
    assert other.answer(requests[:4], GREEDY) == load().answer(requests[:4], GREEDY)
    assert other.answer(requests[:4], HOT) == load().answer(requests[:4], HOT)


def test_the_templates_end_of_turn_ends_an_answer():
    """Models whose end of turn is not the tokenizer's EOS, Gemma 3 and Idefics2, may not name it in their settings."""
    model, processor = build("Idefics2")
    processor.chat_template = processor.chat_template.replace("<|im_end|>", "<end_of_utterance>")
    tiny = LocalModel(model, processor)
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert model.generation_config.eos_token_id == sorted({end, processor.tokenizer.eos_token_id})
    assert tiny._read([65, end, 66], Trunk([])) == Answer(processor.tokenizer.decode([65]), 1, True)


def test_an_answer_that_does_not_end_is_cut_off(base, requests):
    whole = base.answer(requests[1:2], GREEDY)[0]
    length = len(base.processor.tokenizer(whole)["input_ids"])
    for limit, expected in (
        (length + 1, whole),  # the end of turn is the last token allowed
        (length, Failure(f"cut off after {length} tokens")),
        (2, Failure("cut off after 2 tokens")),
    ):
        assert base.answer(requests[1:2], Sampling(max_new_tokens=limit, temperature=0)) == [expected]
    sampling = Sampling(max_new_tokens=length, temperature=0)
    assert base.complete(requests[1:2], sampling) == [Answer(whole, length, False)]


def test_thoughts_are_taken_off(base, monkeypatch):
    tokenizer, eos = base.processor.tokenizer, base.processor.tokenizer.eos_token_id
    thoughts, opened = tokenizer([" <think>it moves</think> a red square. ", "<think>\n"])["input_ids"]
    assert base._read([*thoughts, eos, 9, 9], Trunk([])) == Answer("a red square.", len(thoughts), True)
    # Where the template opened them, an answer that was cut off is all thoughts; one that ended has none.
    assert base._read(thoughts[:3], Trunk(opened)) == Answer("", 3, False)
    assert base._read([65, eos], Trunk(opened)).text == tokenizer.decode([65]).strip()
    monkeypatch.setattr(base, "complete", lambda *args: [Answer("", 0, True), Answer("a <image>", 3, True)])
    empty, control = base.answer([], GREEDY)
    assert empty == Failure("empty answer") and "'<image>', a token of templates" in control.reason


def test_special_tokens_around_thoughts_tell_them_apart(base, monkeypatch):
    """Decoding leaves special tokens out, and the thoughts between them would stand in the answer."""
    tokenizer = copy.deepcopy(base.processor.tokenizer)
    tokenizer.add_tokens(["<|channel>", "<channel|>", "<|box|>"], special_tokens=True)
    monkeypatch.setattr(base, "_collator", replace(base._collator, processing_class=tokenizer))
    moved = f"it moves<channel|><|box|>a red square.<|box|>{tokenizer.eos_token}"
    for prompt, text, answer in (
        ("a", f"<|channel>thought\n{moved}", "a red square."),
        ("<|channel>thought\n", moved, "a red square."),
        ("a", "<|channel>thought\nit moves", ""),
        ("<|channel>thought\n", "it moves", ""),
    ):
        ids, prompt_ids = tokenizer([text, prompt])["input_ids"]
        assert base._read(ids, Trunk(prompt_ids)).text == answer


def test_nan_logits_stop_the_run():
    sampler = SeededSampling([0], 3, GREEDY)
    with pytest.raises(ModelError, match="bfloat16"):
        sampler(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0.0, float("nan")]]))


def test_a_batch_that_does_not_fit_is_halved(base, requests, caplog, monkeypatch):
    """The device's memory is the only thing that is played here: this machine may have no accelerator."""
    sizes, generate, expected = [], base.generate, base.answer(requests, GREEDY)
    monkeypatch.setattr(base, "batch_size", 8)

    def memory_for(room):
        def small(trees, *args):
            sizes.append(len(trees))
            if len(trees) > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return generate(trees, *args)

        monkeypatch.setattr(base, "generate", small)

    memory_for(3)
    assert base.answer(requests, GREEDY) == expected
    assert sizes == [8, 4, 2, 2, 2, 2] and base.batch_size == 2
    assert "8 requests at once do not fit on cpu: from now on 4." in caplog.text
    memory_for(0)
    with pytest.raises(ModelError, match=r"one request alone does not fit on cpu: \d+ prompt tokens, media"):
        base.answer(requests, GREEDY)


@torch.no_grad()
def slow_average(model: LocalModel, request: Request, response: str) -> float:
    """One sequence, all logits, log-softmax, gather."""
    turns = [*request.messages, {"role": "assistant", "content": [{"type": "text", "text": response}]}]
    prompt = model.processor.apply_chat_template(request.messages, add_generation_prompt=True)
    whole = model.processor.apply_chat_template(turns)
    kwargs = {"return_tensors": "pt", "images": list(request.media.images) or None}
    if request.media.videos:
        kwargs |= {"videos": [clip.frames for clip in request.media.videos], "do_sample_frames": False}
    start = model.processor(text=[prompt], **kwargs)["input_ids"].size(1)
    inputs = model.processor(text=[whole], **kwargs)
    logps = model.model(**inputs).logits[0].float().log_softmax(-1)  # (L, V)
    tokens = inputs["input_ids"][0, start:]
    return logps[start - 1 : -1].gather(-1, tokens.unsqueeze(-1)).mean().item()


def test_average_logps_are_those_of_the_full_logits(base, requests):
    responses = ["a red square moves left.", "circle.", "a blue triangle moves up.", "zebra 7", *["left."] * 4]
    averages = base.average_logps(requests, responses)
    assert averages == pytest.approx([slow_average(base, q, r) for q, r in zip(requests, responses)], abs=1e-5)
    (alone,) = base.average_logps(requests[2:3], responses[2:3])
    assert alone == pytest.approx(averages[2], abs=1e-5)
    assert len(set(np.round(averages[4:], 6))) == 4 and max(averages) < 0
    # scoring leaves the model able to answer as before
    assert base.answer(requests[:2], GREEDY) == load().answer(requests[:2], GREEDY)


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (56, 56 * (1 + i % 2), 3), np.uint8)) for i in range(3)]


@pytest.mark.parametrize("family", ["LLaVA-1.5", "Idefics2"])
def test_images_of_another_family(family):
    model, processor = build(family)
    tiny = LocalModel(model, processor, batch_size=4)
    requests = [asked("What is it?" * (1 + i), images=[image], seed=i) for i, image in enumerate(pictures())]
    requests.append(asked("moves", seed=9))  # and one without a picture
    sampling = Sampling(max_new_tokens=6, temperature=1.0, top_p=1.0)
    assert_batches_change_nothing(tiny, requests, sampling)
    responses = ["a red square", "left.", "a", "a blue circle moves left."]
    averages = tiny.average_logps(requests, responses)
    assert averages == pytest.approx([slow_average(tiny, q, r) for q, r in zip(requests, responses)], abs=1e-4)


def assert_batches_change_nothing(model: LocalModel, requests: list[Request], sampling: Sampling) -> None:
    """Random models seldom end an answer: the tokens are compared before they are read."""
    model._read = lambda ids, trunk: tuple(ids)
    together = model.complete(requests, sampling)
    alone = [model.complete([request], sampling)[0] for request in requests]
    del model._read
    assert [ids[: len(one)] for ids, one in zip(together, alone)] == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Qwen3-VL", "LLaVA-OneVision"])
def test_clips_of_different_lengths(family, tmp_path):
    """M-RoPE families count positions around padding and times; LLaVA's cannot stack clips of different lengths."""
    model, processor = build(family)
    tiny = LocalModel(model, processor, batch_size=4)
    lengths = (8, 4, 8, 6)
    files = [write_clip(tmp_path / f"{i}.mp4", frames=12 + i, seed=i) for i in range(4)]
    clips = [load_video(file, VideoOptions(num_frames=n)) for file, n in zip(files, lengths)]
    requests = [asked("What?" * (4 - i), videos=[clip], seed=i) for i, clip in enumerate(clips)]
    calls, generate = [], model.generate
    model.generate = lambda **inputs: calls.append(len(inputs["input_ids"])) or generate(**inputs)
    assert_batches_change_nothing(tiny, requests, Sampling(max_new_tokens=6, temperature=1.0, top_p=1.0))
    assert calls[:-4] == ([2, 1, 1] if family == "LLaVA-OneVision" else [4])
    responses = ["a red square", "left.", "a", "right."]
    alone = [tiny.average_logps([q], [r])[0] for q, r in zip(requests, responses)]
    assert tiny.average_logps(requests, responses) == pytest.approx(alone, abs=1e-5)


def test_media_that_the_family_cannot_see(requests):
    model, processor = build("LLaVA-1.5")
    with pytest.raises(ModelError, match="has videos, but LlavaProcessor takes none"):
        LocalModel(model, processor).answer(requests[:1], GREEDY)
    processor.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        LocalModel(model, processor)


def test_an_image_that_the_processor_refuses_is_a_failure():
    model, processor = build("Qwen3-VL")
    images = [Image.new("RGB", size) for size in ((4000, 10), (56, 56))]  # 400:1, and 200:1 is its limit
    requests = [asked("What?", images=[image]) for image in images]
    refused, fine = LocalModel(model, processor).answer(requests, Sampling(max_new_tokens=2))
    assert isinstance(refused, Failure) and "Qwen3VLProcessor refuses its prompt and media" in refused.reason
    assert isinstance(fine, str) or fine.reason.startswith("cut off")


def test_a_tower_answers_in_both_directions_as_trained():
    """transformers marks the attention of Phi-4-multimodal's tower as causal, which it was not trained with."""
    model, processor = TILES["Phi-4-multimodal"].build()
    tower = [module for name, module in model.named_modules() if part_of(name) == "vision"]
    marked = [module for module in tower if hasattr(module, "is_causal")]
    assert marked and all(module.is_causal for module in marked)
    LocalModel(model, processor)
    assert not any(module.is_causal for module in marked)
