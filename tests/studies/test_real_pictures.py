"""The pictures of the study on real weights, on a tiny language model and a tower with random weights."""

import json
import pickle
from types import SimpleNamespace

import families
import pytest
import timm
import torch
import transformers as T
from PIL import Image, ImageDraw

from studies.real import model as real_model
from studies.real.pictures import base as picture_base
from studies.real.pictures import model as picture_model
from studies.real.pictures import questions, runs, study
from studies.results import read_rows

DRAWN = [("red", "circle"), ("blue", "rectangle"), ("green", "circle"), ("red", "rectangle")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures and questions as easy-vqa stores them."""
    folder = tmp_path_factory.mktemp("easy-vqa")
    for split, count in (("train", 8), ("test", 4)):
        (folder / split / "images").mkdir(parents=True)
        asked = []
        for number in range(count):
            colour, shape = DRAWN[number % len(DRAWN)]
            picture = Image.new("RGB", (64, 64), "white")
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if shape == "circle" else draw.rectangle)((10, 20, 40, 50), fill=colour)
            picture.save(folder / split / "images" / f"{number}.png")
            asked += [[f"what color is the {shape}?", colour, number], [f"what is the {colour} shape?", shape, number]]
            asked += [["is there a red shape?", "yes" if colour == "red" else "no", number]]
        (folder / split / "questions.json").write_text(json.dumps(asked))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """timm's tower with random weights, and the file that has them under the package's names."""
    torch.manual_seed(0)
    model = timm.create_model(picture_model.ARCHITECTURE, num_classes=0)
    theirs = {of_timm: name for name, of_timm in picture_model.timm_modules().items()}
    weights = {}
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        weights[f"{theirs[module]}.{leaf}"] = value.uniform_(0.5, 1.5) if leaf == "running_var" else value
    file = tmp_path_factory.mktemp("tower") / "lite0.pth"
    torch.save(weights | {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}, file)
    return model, file


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    sentences = [questions.SENTENCES[kind].format(word) for kind, words in questions.WORDS.items() for word in words]
    tokenizer = families.tokenizer([picture_model.IMAGE], corpus=sentences * 3, vocab_size=500)
    tokenizer.chat_template = families.template()
    torch.manual_seed(0)
    model = T.Qwen2ForCausalLM(T.Qwen2Config(**families.text_of(tokenizer), tie_word_embeddings=True))
    for weight in model.parameters():
        weight.data.mul_(3 if weight.dim() > 1 else 1)  # or all next tokens are about equally likely
    return families.write_model(tmp_path_factory.mktemp("language"), model, tokenizer)


@pytest.fixture(scope="module")
def folder(language, tower, tmp_path_factory):
    model, processor = picture_model.assemble(language, tower[1])
    return families.write_model(tmp_path_factory.mktemp("picture-model"), model, processor)


@pytest.fixture(scope="module")
def tiny(folder):
    model, processor = picture_model.load(folder)
    return model.float(), processor


@pytest.fixture
def small(monkeypatch, data, tmp_path):
    """A study that takes seconds."""
    monkeypatch.setattr(runs, "CHECKPOINTS", (1, 2))
    monkeypatch.setattr(runs, "FIRST_PICTURE", 4)
    monkeypatch.setattr(runs, "TRAINED", {"colour": 2, "shape": 2})
    monkeypatch.setattr(runs, "HELD_OUT", {"colour": 2, "shape": 2})
    monkeypatch.setattr(picture_model, "ANSWER_TOKENS", 4)
    for name in ("RESULTS", "OUT"):
        monkeypatch.setattr(study, name, tmp_path / name)
    return runs.pairs(data)


def test_every_weight_of_the_tower_has_timms_name(tower):
    model, file = tower
    expected, found = model.state_dict(), picture_model.tower_weights(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    names = picture_model.timm_modules()
    # both list their modules in the order in which a picture passes them
    assert list(names.values()) == list(dict.fromkeys(name.rpartition(".")[0] for name in expected))
    assert names["_blocks.0._project_conv"] == "blocks.0.0.conv_pw"
    assert names["_blocks.1._bn0"] == "blocks.1.0.bn1" and names["_blocks.15._project_conv"] == "blocks.6.0.conv_pwl"


def test_pickles_cannot_run_code(tmp_path):
    torch.save({"_fc.weight": SimpleNamespace()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        picture_model.tower_weights(tmp_path / "evil.pth")


def test_pairs_are_a_right_and_a_wrong_answer(data, small):
    for split, rows in small.items():
        known = questions.facts(questions.rows(data, "train" if split == "train" else "test"))
        assert len({row["picture"] for row in rows}) == len(rows) == 4
        for row in rows:
            true = known[row["picture"]][row["kind"]]
            assert row["chosen"].strip(".").split()[-1] == true
            wrong = row["rejected"].strip(".").split()[-1]
            assert wrong != true and wrong in questions.WORDS[row["kind"]]
    assert min(row["picture"] for row in small["train"]) == 4
    assert known == {number: {"colour": colour, "shape": shape} for number, (colour, shape) in enumerate(DRAWN)}
    assert small == runs.pairs(data)


def test_questions_are_counted_and_balanced(data):
    rows = questions.rows(data, "train")
    assert questions.majority(rows)["What color is the circle?"] == "green"  # as often as red: the first by name
    assert questions.majority(rows)["Is there a red shape?"] == "no"
    uneven = [row for row in rows if row["kind"] == "yes/no"][:3]
    assert [row["answer"] for row in questions.balanced(uneven)] == ["yes", "no"]
    other = questions.others([row for row in rows if row["kind"] == "colour"][:4])
    assert [row["answer"] for row in other] == ["blue", "green", "red", "blue"]
    with pytest.raises(ValueError, match="8 of 9 pictures"):
        questions.one_each(rows, {"colour": 9})


@pytest.mark.parametrize(
    "kind, text, word",
    [
        ("shape", "The shape in this picture is a Circle.", "circle"),
        ("shape", "a circle or a triangle", None),
        ("colour", "It is a circle.", None),
        ("colour", "Red, red!", "red"),
    ],
)
def test_an_answer_has_one_word_of_its_kind(kind, text, word):
    assert questions.read_answer(kind, text) == word


def test_pictures_are_seen_as_by_the_model_itself(tiny, small):
    model, processor = tiny
    row = small["train"][0]
    (shown,) = picture_model.pictures(model, processor, {row["picture"]: row["file"]}).values()
    prompt, response = picture_model.text(processor, row["question"], row["chosen"])
    content = [{"type": "image", "path": row["file"]}, {"type": "text", "text": row["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert inputs["input_ids"].tolist() == [prompt] and prompt.count(model.config.image_token_id) == 16
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logs = (
            model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
    expected = logs.gather(1, torch.tensor(response)[:, None]).sum().item()
    texts = [(prompt, response), picture_model.text(processor, row["question"], row["chosen"], picture=False)]
    (seen, blind), _ = real_model.logps(model, texts, pictures=[shown, None])
    assert seen == pytest.approx(expected, abs=1e-3) and blind != pytest.approx(seen, abs=1e-3)


def test_picked_is_the_likeliest_word_of_the_kind(tiny):
    _, processor = tiny
    row = {"kind": "shape", "answer": "rectangle"}
    place, tokens = runs.word_tokens(processor.tokenizer, row)
    sentence = processor.tokenizer("The shape in this picture is a rectangle.")["input_ids"]
    assert sentence[place] == tokens[1] and len(set(tokens)) == 3
    logs = torch.full((len(sentence), 500), -9.0)
    logs[place, 0], logs[place, tokens[1]] = -0.1, -5.0  # what is no word of the kind does not count
    assert runs._picked(logs, row, place, tokens)
    logs[place, tokens[2]] = -4.0
    assert not runs._picked(logs, row, place, tokens)


def test_measures_are_changes_from_the_base(tiny, folder, small):
    model, processor = tiny
    base = runs.measure_base(model, processor, small["held-out"])
    same = runs.measure(model, processor, base)
    assert same["chosen"] == [0.0] * 4 and max(map(abs, same["kl"])) < 1e-3
    other, _ = picture_model.load(folder)
    other.float().get_decoder().layers[0].mlp.up_proj.weight.data.mul_(3)
    found = runs.measure(other, processor, base)
    now = real_model.logps(other, base.texts["chosen"], pictures=base.pictures["chosen"])[0]
    assert found["logp/chosen"] == pytest.approx(now, abs=2e-3)
    assert found["chosen"] == pytest.approx([a - b for a, b in zip(now, same["logp/chosen"])], abs=2e-3)
    swapped = dict(zip([row["picture"] for row in base.rows], base.pictures["chosen"]))
    shown = [swapped[row["picture"]] for row in questions.others(base.rows)]
    with_other = real_model.logps(other, base.texts["chosen"], pictures=shown)[0]
    assert found["logp/other"] == pytest.approx(with_other, abs=2e-3) and min(found["kl"]) > 1e-4
    assert len(found["right"]) == len(found["picked/none"]) == 4 and len(found["said"]) == 4


def test_the_base_learns_and_is_loaded_as_it_was(language, tower, data, tmp_path, monkeypatch):
    for name, value in {"STEPS": 8, "WARM_UP": 1, "RATE": 2e-2, "LOOK_EVERY": 100}.items():
        monkeypatch.setattr(picture_base, name, value)
    monkeypatch.setattr(picture_model, "ANSWER_TOKENS", 2)
    model, processor = picture_model.assemble(language, tower[1])
    asked = questions.rows(data, "train")[:6]
    maps = picture_model.tower_maps(model, processor, {row["picture"]: row["file"] for row in asked})
    picture_base.warm_start(model, processor.tokenizer, maps, questions.facts(asked))
    texts = [picture_model.text(processor, row["question"], row["chosen"]) for row in map(questions.pair, asked[:2])]

    def logps(own):
        shown = picture_model.pictures(own, processor, {row["picture"]: row["file"] for row in asked})
        return real_model.logps(own, texts, pictures=[shown[row["picture"]] for row in asked[:2]])[0]

    before = logps(model)
    adapted = picture_base.teach(model, processor, asked, maps, asked)
    after = logps(adapted.eval())
    assert sum(after) > sum(before) + 10
    picture_base.save(adapted, tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    where = picture_base.base_model(tmp_path / "base", language, tower[1], tmp_path / "adapter")
    assert logps(picture_model.load(where)[0]) == pytest.approx(after, abs=1.0)  # of bfloat16


@pytest.mark.slow
def test_interrupted_work_goes_on_with_what_is_left(folder, small, monkeypatch):
    cells = [runs.Cell("mDPO", 1e-2, 0), runs.Cell("DPO", 1e-2, 0)]
    monkeypatch.setattr(runs, "cells", lambda: cells[:1])
    study.work(folder, small)
    monkeypatch.setattr(runs, "cells", lambda: cells)
    assert runs.missing(read_rows(study.RESULTS)) == cells[1:]
    study.work(folder, small)
    done = read_rows(study.RESULTS)
    assert [(row["method"], row["steps"]) for row in done] == [
        ("base", 0), ("mDPO", 1), ("mDPO", 2), ("DPO", 1), ("DPO", 2)
    ]  # fmt: skip
    assert not runs.missing(done)
    for first, last in (done[1:3], done[3:]):
        margin = [sum(one["chosen"]) - sum(one["rejected"]) for one in (first, last)]
        assert margin[1] > margin[0] and min(last["kl"]) > 0 and len(last["log"]["loss"]) == 2
