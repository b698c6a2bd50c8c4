"""A model in this process: sampling that no batch changes, log-probs as in training, adapters, failures."""

from dataclasses import replace

import families
import numpy as np
import pytest
import torch
import transformers
from families import LANGUAGE_MODEL, build
from held_out_kit import write_adapter
from helpers import write_clip
from peft import PeftModel
from PIL import Image

from trl_vpo.errors import AdapterError, GenerateError
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.load import _short_name, answering_model
from trl_vpo.models.local import LocalModel, SeededSampling
from trl_vpo.models.requests import Request, Sampling
from trl_vpo.testbed import world
from trl_vpo.testbed.tiny_vlm import BASE
from trl_vpo.text.responses import Failure

GREEDY = Sampling(max_new_tokens=16, temperature=0)
HOT = Sampling(max_new_tokens=16, temperature=2.5, top_p=0.95)
QUESTIONS = ("Describe the video.", "Which shape is it?", "What colour is the shape?")


def load(**settings) -> LocalModel:
    settings = {"model_name_or_path": str(BASE), "device": "cpu", "dtype": "float32", **settings}
    return answering_model(GenerateConfig(**settings))


def asked(text: str, *, images=(), videos=(), seed=0) -> Request:
    media = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
    return Request(messages, Media(tuple(images), tuple(videos)), seed)


def clip_of(frames: np.ndarray):
    return load_video(np.asarray(frames), VideoOptions(num_frames=len(frames)))


@pytest.fixture(scope="module")
def base():
    return load(batch_size=8)


@pytest.fixture(scope="module")
def requests():
    """Eight clips and questions of three lengths, so that a batch has padding."""
    samples = world.draw_samples("clip", 8, seed=3, habits=False)
    clips = [clip_of(sample.frames) for sample in samples]
    return [asked(QUESTIONS[i % 3], videos=[clip], seed=100 + i) for i, clip in enumerate(clips)]


# --- sampling -----------------------------------------------------------------------------------------------------


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
        output = base.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = output[0, inputs["input_ids"].size(1) :]
        assert new[-1] == tokenizer.eos_token_id
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


def frequencies(logits: list[float], sampling: Sampling, rows: int, steps: int) -> torch.Tensor:
    """How often each token is drawn over `rows * steps` draws, one seed a row."""
    sampler = SeededSampling(range(rows), 5, sampling)
    scores = torch.tensor([logits] * rows)
    drawn = [sampler(torch.zeros(rows, 5 + step, dtype=torch.long), scores).argmax(-1) for step in range(steps)]
    return torch.cat(drawn).bincount(minlength=len(logits)).double() / (rows * steps)


def test_tokens_are_drawn_with_their_probabilities():
    logits, temperature, n = [2.0, 1.0, 0.0, 0.5, -1.0], 0.7, 20_000
    wanted = torch.tensor(logits, dtype=torch.double).div(temperature).softmax(-1)
    found = frequencies(logits, Sampling(temperature=temperature, top_p=1.0), 2000, 10)
    chi_square = (n * (found - wanted) ** 2 / wanted).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand
    # 0.716 and 0.172 reach 0.85; the next token takes no part, whatever its noise
    nucleus = frequencies(logits, Sampling(temperature=temperature, top_p=0.85), 2000, 10)
    assert wanted[:2].sum() > 0.85 and nucleus[2:].sum() == 0
    share = float(wanted[0] / wanted[:2].sum())
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
    plain = load()
    changed = plain.model.generation_config
    changed.repetition_penalty, changed.do_sample, changed.top_k, changed.temperature = 5.0, True, 1, 0.3
    changed.forced_bos_token_id, changed.no_repeat_ngram_size, changed.max_length = 7, 1, 3
    plain.model.save_pretrained(tmp_path)
    plain.processor.save_pretrained(tmp_path)
    assert "repetition_penalty" in (tmp_path / "generation_config.json").read_text()
    other = load(model_name_or_path=str(tmp_path))
    assert other.answer(requests[:4], GREEDY) == load().answer(requests[:4], GREEDY)
    assert other.answer(requests[:4], HOT) == load().answer(requests[:4], HOT)


# --- answers that are none ----------------------------------------------------------------------------------------


def test_the_templates_end_of_turn_ends_an_answer():
    """Where it is not the tokenizer's EOS, as in Gemma 3 and Idefics2, the model's own settings may not name it."""
    model, processor = build("Idefics2")
    template = processor.chat_template.replace("<|im_end|>", "<end_of_utterance>")
    processor.chat_template = template
    made = LocalModel(model, processor)
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert model.generation_config.eos_token_id == sorted({end, processor.tokenizer.eos_token_id})
    assert made._read([65, end, 66]) == processor.tokenizer.decode([65])


def test_an_answer_that_does_not_end_is_cut_off(base, requests):
    two = Sampling(max_new_tokens=2, temperature=0)
    assert base.answer(requests[:1], two) == [Failure("cut off after 2 tokens")]
    whole = base.answer(requests[1:2], GREEDY)[0]
    length = len(base.processor.tokenizer(whole)["input_ids"])
    exact = base.answer(requests[1:2], Sampling(max_new_tokens=length + 1, temperature=0))
    assert exact == [whole]  # the end of turn is the last token allowed
    assert base.answer(requests[1:2], Sampling(max_new_tokens=length, temperature=0)) == [
        Failure(f"cut off after {length} tokens")
    ]


def test_empty_answers_and_reasoning(base):
    tokenizer, eos = base.processor.tokenizer, base.processor.tokenizer.eos_token_id
    assert base._read([eos, eos]) == Failure("empty answer")
    text = tokenizer(" <think>it moves</think> a red square. ")["input_ids"]
    assert base._read([*text, eos, 9, 9]) == "a red square."


def test_nan_logits_stop_the_run():
    sampler = SeededSampling([0], 3, GREEDY)
    with pytest.raises(GenerateError, match="bfloat16"):
        sampler(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0.0, float("nan")]]))


def test_a_batch_that_does_not_fit_is_halved_and_one_request_is_an_error(base, requests, caplog):
    """The device's memory is the only thing that is played here: this machine may have no accelerator."""
    sizes, generate = [], base._generate

    def small(trunks, seeds, sampling, room):
        sizes.append(len(trunks))
        if len(trunks) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(trunks, seeds, sampling)

    want = base.answer(requests, GREEDY)
    try:
        base._generate = lambda *args: small(*args, room=3)
        assert base.answer(requests, GREEDY) == want
        assert sizes == [8, 4, 2, 2, 2, 2] and base.batch_size == 2
        assert "8 requests at once do not fit on cpu: from now on 4." in caplog.text
        base._generate = lambda *args: small(*args, room=0)
        with pytest.raises(GenerateError, match=r"one request alone does not fit on cpu: \d+ prompt tokens, media"):
            base.answer(requests, GREEDY)
    finally:
        del base._generate
        base.batch_size = 8


# --- log-probs ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_average(model: LocalModel, request: Request, response: str) -> float:
    """One sequence, all logits, log-softmax, gather."""
    turns = [*request.messages, {"role": "assistant", "content": [{"type": "text", "text": response}]}]
    prompt = model.processor.apply_chat_template(request.messages, add_generation_prompt=True)
    whole = model.processor.apply_chat_template(turns)
    kwargs = {"return_tensors": "pt"}
    if request.media.images:
        kwargs |= {"images": list(request.media.images)}
    if request.media.videos:
        kwargs |= {"videos": [clip.frames for clip in request.media.videos], "do_sample_frames": False}
    start = model.processor(text=[prompt], **kwargs)["input_ids"].size(1)
    inputs = model.processor(text=[whole], **kwargs)
    logps = model.model(**inputs).logits[0].float().log_softmax(-1)  # (L, V)
    tokens = inputs["input_ids"][0, start:]
    return logps[start - 1 : -1].gather(-1, tokens.unsqueeze(-1)).mean().item()


def test_average_logps_are_those_of_the_full_logits(base, requests):
    responses = ["a red square moves left.", "circle.", "a blue triangle moves up.", "zebra 7", *["left."] * 4]
    found = base.average_logps(requests, responses)
    assert found == pytest.approx([slow_average(base, q, r) for q, r in zip(requests, responses)], abs=1e-5)
    (alone,) = base.average_logps(requests[2:3], responses[2:3])
    assert alone == pytest.approx(found[2], abs=1e-6)
    assert len(set(np.round(found[4:], 6))) == 4 and max(found) < 0
    # scoring leaves the model able to answer as before
    assert base.answer(requests[:2], GREEDY) == load().answer(requests[:2], GREEDY)


def test_the_true_caption_is_more_likely_than_a_false_one(base):
    (sample,) = world.draw_samples("clip", 1, seed=5, habits=True)
    request = asked(QUESTIONS[0], videos=[clip_of(sample.frames)])
    (thing,) = sample.things
    other = "up" if thing.motion != "up" else "down"
    true, false = (f"a {thing.name} moves {motion}." for motion in (thing.motion, other))
    good, bad = base.average_logps([request] * 2, [true, false])
    assert good > bad


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random LoRA adapter on the language model, large enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter") / "last"
    return write_adapter(folder, scale=0.1, lora_alpha=16, target_modules=LANGUAGE_MODEL)


def test_an_adapter_answers_as_its_merged_model(base, requests, adapter):
    tuned = load(from_adapter=adapter)
    assert tuned.record() == {"model": str(BASE), "adapter": adapter, "revision": None}
    merged = LocalModel(PeftModel.from_pretrained(load().model, adapter).merge_and_unload(), base.processor)
    response = ["a red square moves left."] * 3
    found, without = (m.average_logps(requests[:3], response) for m in (tuned, base))
    assert found == pytest.approx(merged.average_logps(requests[:3], response), abs=1e-4)
    assert min(abs(a - b) for a, b in zip(found, without)) > 0.01
    answers = tuned.answer(requests, GREEDY)
    assert answers == merged.answer(requests, GREEDY) != base.answer(requests, GREEDY)


def test_adapters_that_do_not_fit(tmp_path, adapter):
    with pytest.raises(GenerateError, match=rf"{tmp_path} has no adapter_config\.json"):
        load(from_adapter=str(tmp_path))
    copy = tmp_path / "another"
    base = load()
    base.model.save_pretrained(copy)
    base.processor.save_pretrained(copy)
    with pytest.raises(GenerateError, match=rf"was trained on .*base, but model_name_or_path is {copy}"):
        load(model_name_or_path=str(copy), from_adapter=adapter)
    # the right name, but another model: one layer less
    fewer = tmp_path / "base"
    base.model.config.text_config.num_hidden_layers = 1
    base.model.config.text_config.layer_types = ["full_attention"]
    del base.model.model.language_model.layers[1]
    base.model.save_pretrained(fewer)
    base.processor.save_pretrained(fewer)
    with pytest.raises(AdapterError, match=r"does not fit .*base: \d+ weights have no place in the model"):
        load(model_name_or_path=str(fewer), from_adapter=adapter)


def test_settings_that_cannot_be_loaded(tmp_path):
    with pytest.raises(GenerateError, match="there is no model"):
        load(model_name_or_path=None)
    with pytest.raises(GenerateError, match=rf"{tmp_path} cannot be loaded"):
        load(model_name_or_path=str(tmp_path))
    with pytest.raises(GenerateError, match="dtype is 'fp8'"):
        load(dtype="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(GenerateError, match="device is 'cuda', but what this process has is cpu"):
            load(device="cuda")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Qwen2-VL whose widths are multiples of 64: 4-bit weights on the CPU need that."""
    vision = {"depth": 1, "embed_dim": 24, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    names = ("Config", "ForConditionalGeneration", "Processor", "VideoProcessor")
    classes = [getattr(transformers, f"Qwen2VL{name}") for name in names]
    text = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    model, processor = families._qwen(*classes, vision, rope={"mrope_section": [2, 3, 3]}, text=text)
    return families.write_model(tmp_path_factory.mktemp("wide"), model, processor)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_those_of_the_language_model(bits, requests, wide):
    pytest.importorskip("bitsandbytes")
    model = load(model_name_or_path=wide, **{f"load_in_{bits}bit": True})
    kinds = {name: type(module).__name__ for name, module in model.model.named_modules()}
    wanted = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert kinds["model.language_model.layers.0.self_attn.q_proj"] == wanted
    assert kinds["model.visual.blocks.0.attn.qkv"] == kinds["lm_head"] == "Linear"
    assert len(model.answer(requests[:2], GREEDY)) == 2
    exact = load(model_name_or_path=wide)
    found, wanted = (m.average_logps(requests[:2], ["left.", "a red square"]) for m in (model, exact))
    assert found == pytest.approx(wanted, abs=0.1) and found != wanted


# --- other families -----------------------------------------------------------------------------------------------


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
    found = tiny.average_logps(requests, responses)
    assert found == pytest.approx([slow_average(tiny, q, r) for q, r in zip(requests, responses)], abs=1e-4)


def assert_batches_change_nothing(model: LocalModel, requests: list[Request], sampling: Sampling) -> None:
    """Random models seldom end an answer: the tokens are compared before they are read."""
    model._read = lambda ids: tuple(ids)
    together = model.answer(requests, sampling)
    alone = [model.answer([request], sampling)[0] for request in requests]
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
    found = tiny.average_logps(requests, ["a red square", "left.", "a", "right."])
    singles = [tiny.average_logps([q], [r])[0] for q, r in zip(requests, ["a red square", "left.", "a", "right."])]
    assert found == pytest.approx(singles, abs=1e-5)


def test_media_that_the_family_cannot_see(requests):
    model, processor = build("LLaVA-1.5")
    with pytest.raises(GenerateError, match="has videos, but LlavaProcessor takes none"):
        LocalModel(model, processor).answer(requests[:1], GREEDY)
    processor.chat_template = None
    with pytest.raises(GenerateError, match="has no chat template"):
        LocalModel(model, processor)


def test_an_image_that_the_processor_refuses_is_a_failure_of_its_request():
    model, processor = build("Qwen3-VL")
    images = [Image.new("RGB", size) for size in ((4000, 10), (56, 56))]  # 400:1, and 200:1 is its limit
    refused, fine = LocalModel(model, processor).answer(
        [asked("What?", images=[image]) for image in images], Sampling(max_new_tokens=2)
    )
    assert isinstance(refused, Failure) and "Qwen3VLProcessor refuses its prompt and media" in refused.reason
    assert isinstance(fine, str) or fine.reason.startswith("cut off")


@pytest.mark.parametrize(
    "name, short",
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "qwen2-vl-2b-instruct"),
        ("/data/models/Qwen2-VL-2B-Instruct/", "qwen2-vl-2b-instruct"),
        ("/hub/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/895c3a49bc3f", "qwen2-vl-2b-instruct"),
        ("/hub/models--gpt2/snapshots/607a30d7", "gpt2"),
    ],
)
def test_one_model_under_several_names(name, short):
    assert _short_name(name) == short
