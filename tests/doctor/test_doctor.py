"""`trl-vpo doctor`: its findings in a good recipe, and in bad ones."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from datasets import Dataset, Features, List, Video
from families import FAMILIES, build, text_model, write_model
from helpers import row, write_clip, write_image
from peft import LoraConfig
from rich.console import Console
from transformers import BertConfig, BertForMaskedLM

from trl_vpo.cli import main
from trl_vpo.doctor import checks
from trl_vpo.doctor.checks import examine, run_doctor
from trl_vpo.doctor.live_bytes import LiveBytes
from trl_vpo.doctor.loaded_recipe import parse_recipe
from trl_vpo.doctor.measure import check_can_measure, measure
from trl_vpo.doctor.report import OK, STOP, WARN, show
from trl_vpo.errors import RecipeError
from trl_vpo.forward.parts import part_of
from trl_vpo.models.model_size import adapt, empty_model, model_sizes
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.training.methods import method_of
from trl_vpo.training.sharding import Sharding

BOX = [8, 8, 40, 40]


def write_recipe(folder, method, model, processor, rows, **keys):
    """A recipe for a model and rows in the same folder."""
    names = {
        "model_name_or_path": write_model(folder / "base", model, processor),
        "dataset_name": str(write_jsonl(rows, folder / "rows.jsonl")),
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(f"# trl-vpo train {method} --config recipe.yaml\n" + yaml.safe_dump(names | keys))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    image = write_image(folder / "image.png")
    rows = [row("image", [image], critical_box=BOX, id=f"r{i}") for i in range(6)]
    keys = {"use_peft": True, "lora_r": 2, "lora_target_modules": r".*language_model.*\.(q_proj|v_proj)"}
    keys |= {"per_device_train_batch_size": 3, "num_images": 4}
    return write_recipe(folder, "lpoi", *build("Qwen2-VL"), rows, **keys)


def status(report):
    return {check: status for check, status, _ in report.findings}


def texts(report):
    return {check: text for check, _, text in report.findings}


def parts(report):
    return report.memory.estimate.parts


def test_a_good_recipe(recipe):
    report = examine(recipe, [], rows=4)
    assert not report.stops and not report.problems
    assert status(report)["LoRA"] == status(report)["memory"] == OK
    assert texts(report)["LoRA"].startswith("4 modules adapted, 0 of them")  # q and v in 2 layers
    assert texts(report)["tokens"].startswith("4 of 6 rows tokenized")
    assert texts(report)["prompt and response"].endswith(
        "the prompt ends '?' '<|im_end|>' '\\n' '<|im_start|>' 'as' 'sistan' 't' '\\n'; the chosen response is 'a' "
        "' red' ' square' ' moves' ' left' '.' '<|im_end|>' '\\n'. It ends with '<|im_end|>'."
    )
    tokens = {name: values[0] for name, values in report.tokens.items()}
    assert tokens["media"] == 4  # 56 x 56 pixels, patches of 14, merged 2 x 2
    sides = tokens["chosen response"], tokens["rejected response"]
    prompt = tokens["prompt text"] + tokens["media"]
    assert tokens["longest sequence"] == prompt + max(sides)
    assert tokens["all sequences of the pair"] == 5 * prompt + 4 * sides[0] + sides[1]  # 4 images and the rejected
    assert report.memory.sharding == Sharding()
    assert {"weights", "optimizer states", "inputs", "working memory"} <= set(parts(report))


def test_responses_that_end_where_generation_does_not_stop(recipe, tmp_path):
    model, processor = build("Qwen2-VL")
    processor.tokenizer.add_tokens(["</s>"], special_tokens=True)
    processor.tokenizer.eos_token = "</s>"  # as in checkpoints whose chat template was added later
    model.generation_config.eos_token_id = None
    report = examine(recipe, ["--model_name_or_path", write_model(tmp_path / "base", model, processor)], rows=1)
    assert status(report)["prompt and response"] == WARN
    assert "ends with '<|im_end|>', but generation stops at '</s>': add it" in texts(report)["prompt and response"]


def test_every_problem_is_listed_and_written(recipe, tmp_path):
    image = write_image(tmp_path / "image.png")
    (tmp_path / "no.png").write_bytes(b"no image")
    rows = [row("image", [image], critical_box=BOX, id="good")]
    rows += [row("image", [str(tmp_path / "no.png")], critical_box=BOX, id=f"bad-{i}") for i in range(12)]
    rows += [row("image", [image], critical_box=[40, 8, 8, 40], id="inverted"), row(None, id="text")]
    argv = ["--dataset_name", str(write_jsonl(rows, tmp_path / "rows.jsonl"))]
    console = Console(record=True, width=100)
    assert run_doctor(recipe, argv, out=tmp_path / "problems.jsonl", console=console) == 1
    problems = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [problem["row"] for problem in problems] == list(range(1, 15))
    assert [problem["media"] for problem in problems] == [True] * 12 + [False] * 2
    assert "bad-0" in problems[0]["reason"]
    text = console.export_text()
    assert "and 4 more" in text and "1 of 15 rows tokenized" in text  # the one that is good
    assert run_doctor(recipe, argv, out=tmp_path / "problems.jsonl", console=console) == 1  # again
    rows = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(RecipeError, match=r"rows\.jsonl holds something else than problems of rows"):
        run_doctor(recipe, argv, out=tmp_path / "rows.jsonl", console=console)
    assert (tmp_path / "rows.jsonl").read_bytes() == rows
    skipping = examine(recipe, [*argv, "--on_bad_media", "skip"])
    assert "12 would be skipped" in texts(skipping)["train rows"]
    assert skipping.stops  # the other two rows still stop it


def test_rows_that_the_chat_template_refuses(tmp_path):
    model, tok = text_model()
    tok.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tok.chat_template += "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [row(None, id=f"r{i}") for i in range(4)]
    rows[2]["prompt"].insert(0, {"role": "system", "content": [{"type": "text", "text": "Be brief."}]})
    report = examine(write_recipe(tmp_path, "dpo", model, tok, rows), [])
    assert status(report)["tokens"] == STOP
    (problem,) = report.problems
    assert problem["row"] == 2 and "no system role" in problem["reason"]


def test_a_stream_of_datasets_videos(recipe, tmp_path):
    base = Dataset.from_list([row("video", [write_clip(tmp_path / "a.mp4")])] * 3)
    base.cast(Features({**base.features, "videos": List(Video())})).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "dpo.yaml").write_text(recipe.read_text().replace("lpoi", "dpo").replace("num_images: 4", ""))
    argv = ["--dataset_name", str(tmp_path / "rows.parquet"), "--dataset_streaming", "true"]
    report = examine(tmp_path / "dpo.yaml", argv)
    assert texts(report)["tokens"].startswith("3 of 3 rows tokenized, 0 of them") and not report.problems


def test_a_stream_of_rows_with_other_columns_and_types(recipe, tmp_path):
    """Paths beside dictionaries, and columns that the first row does not have."""
    clip, image = write_clip(tmp_path / "a.mp4"), write_image(tmp_path / "a.png")
    rows = [row(None), row("video", [clip]), row("video", [{"path": clip, "video_end": 0.5}]), row("image", [image])]
    write_jsonl(rows, tmp_path / "rows.jsonl")
    (tmp_path / "dpo.yaml").write_text(recipe.read_text().replace("lpoi", "dpo").replace("num_images: 4", ""))
    argv = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--dataset_streaming", "true", "--num_frames", "2"]
    report = examine(tmp_path / "dpo.yaml", argv)
    assert texts(report)["tokens"].startswith("4 of 4 rows tokenized, 0 of them") and not report.problems
    assert [tokens > 0 for tokens in report.tokens["media"]] == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "why"),
    [({"rows": 0}, "--rows is 0: give at least 1"), ({"rows": -3}, "--rows is -3")]
    + [({"gpu_memory": gib}, f"--gpu_memory is {gib}: give a") for gib in (0.0, -5.0, math.nan, math.inf)],
)
def test_numbers_that_make_no_sense_are_refused(recipe, options, why):
    with pytest.raises(RecipeError, match=why):
        examine(recipe, [], **options)


def test_a_file_that_cannot_be_written_is_said_first(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_vpo.doctor.checks.examine", None)
    for out, why in (
        (tmp_path, "is a folder: name the file"),
        (recipe / "a.jsonl", "cannot be written .*Name another"),
    ):
        with pytest.raises(RecipeError, match=why):
            run_doctor(recipe, [], out=out)


def test_rows_over_max_length(recipe):
    report = examine(recipe, ["--max_length", "10"])
    assert status(report)["tokens"] == STOP and len(report.problems) == 6
    assert "max_length=10" in report.problems[0]["reason"]


@pytest.mark.parametrize(
    ("argv", "check", "expected"),
    [
        (["--lora_target_modules", "all-linear"], "LoRA", WARN),
        (["--lora_target_modules", "query"], "LoRA", STOP),
        (["--model_name_or_path", "nowhere/nothing"], "model", STOP),
        (["--dataset_name", "nowhere.jsonl"], "data", STOP),
        (["--vision_learning_rate", "1e-5"], "learning rate", STOP),  # of a tower that does not train
        (["--gradient_checkpointing_kwargs", '{"every_n_layers": 0}'], "gradient checkpointing", STOP),
        (["--eval_strategy", "steps"], "data", STOP),  # there is no test split
    ],
)
def test_what_is_wrong_or_missing(recipe, argv, check, expected):
    result = status(examine(recipe, argv))
    assert result[check] == expected
    assert "tokens" in result or check != "LoRA"  # the other checks went on
    assert ("not checked" in result) == (check == "model")


def test_a_model_that_generates_no_text(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=400, **sizes))
    report = examine(write_recipe(tmp_path, "dpo", model, text_model()[1], [row(None)]), [])
    assert status(report)["model"] == STOP and "it generates no text" in texts(report)["model"]


def test_full_fine_tuning(recipe):
    report = examine(recipe, ["--use_peft", "false"])
    assert status(report)["full fine-tuning"] == WARN
    assert parts(report)["weights"] == parts(report)["reference model"]
    frozen = examine(recipe, ["--use_peft", "false", "--freeze_vision"])
    assert status(frozen)["full fine-tuning"] == OK
    assert parts(frozen)["optimizer states"] < parts(report)["optimizer states"]
    assert "reference model" not in parts(examine(recipe, []))


def test_method_of_a_recipe(recipe, tmp_path):
    assert method_of(recipe) == "lpoi"
    (tmp_path / "rrpo").mkdir()
    for path, method in (("rrpo/some.yaml", "rrpo"), ("leanpo.yaml", "leanpo")):
        (tmp_path / path).write_text("use_cpu: true\n")
        assert method_of(tmp_path / path) == method
    (tmp_path / "other.yaml").write_text("use_cpu: true\n")
    with pytest.raises(RecipeError, match="Begin it with the line `# trl-vpo train METHOD`"):
        method_of(tmp_path / "other.yaml")
    with pytest.raises(RecipeError, match="does not exist"):
        method_of(tmp_path / "nowhere.yaml")


# --- memory -------------------------------------------------------------------------------------------------------


def test_whether_it_fits(recipe):
    console = Console(record=True, width=200)
    argv = ["--gradient_checkpointing", "false"]
    assert run_doctor(recipe, argv, console=console, gpu_memory=0.25) == 0  # a warning, no stop
    text = console.export_text()
    assert "does not fit into 0.2 GiB" in text
    assert "half as many tokens of media (max_pixels) " in text  # there are no videos
    fits = examine(recipe, [], gpu_memory=24)
    assert status(fits)["memory"] == OK and fits.memory.fits and not fits.memory.remedies


def test_a_run_on_a_cpu_takes_no_memory_of_a_gpu(recipe):
    console = Console(record=True, width=300)
    assert run_doctor(recipe, ["--use_cpu", "true"], console=console, gpu_memory=0.001) == 0
    text = console.export_text()
    assert "GiB of tensors on the CPU (one process), peak in" in text and "memory of a process, estimated" in text
    assert "Python and its libraries take memory beside them" in text
    assert not any(word in text for word in ("GPU", "CUDA", "gpu_memory", "does not fit"))
    assert "on a GPU" in texts(examine(recipe, [], rows=1))["memory"]  # where this machine only has none


def test_several_gpus(recipe, monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    split = examine(recipe, ["--accelerate_config", "zero3", "--num_processes", "4"])
    assert split.memory.sharding == Sharding("zero3", 4)
    ddp = examine(recipe, ["--num_processes", "2"])
    assert parts(split)["weights"] < parts(ddp)["weights"] / 3
    assert parts(ddp)["communication"] == 4 * 2 * 2 * (32 + 32 + 32 + 16)  # float32, 2 layers, rank 2, q and v
    with pytest.raises(RecipeError, match="accelerate_config"):
        examine(recipe, ["--accelerate_config", "zero4"])
    shared = examine(recipe, ["--accelerate_config", "sp2", "--num_processes", "3"], rows=1)
    assert status(shared)["processes"] == STOP
    assert "sp2.yaml: sp_size is 2, so num_processes has to be a multiple" in texts(shared)["processes"]


def test_fewer_gpus_than_processes(recipe, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    report = examine(recipe, ["--num_processes", "4", "--bf16", "false"], rows=1)
    assert status(report)["GPUs"] == WARN
    assert "--num_processes 2 --gradient_accumulation_steps 2" in texts(report)["GPUs"]
    assert "GPUs" not in status(examine(recipe, ["--num_processes", "2", "--bf16", "false"], rows=1))


def test_a_model_that_needs_data_is_not_estimated(recipe, monkeypatch):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    whole = Qwen2VLTextModel.forward
    forward = lambda self, *args, **kwargs: whole(self, *args, **kwargs).last_hidden_state.sum().item()  # noqa: E731
    monkeypatch.setattr(Qwen2VLTextModel, "forward", forward)
    report = examine(recipe, [])
    assert status(report)["memory"] == WARN and report.memory is None
    assert "not estimated: DataDependentOutputException" in texts(report)["memory"]


def test_measuring_needs_one_process_and_a_gpu(recipe, monkeypatch, capsys):
    assert main(["doctor", str(recipe), "--measure"]) == 2
    assert "--measure runs two training steps and needs a CUDA GPU" in capsys.readouterr().err
    parsed = replace(parse_recipe(recipe, []), sharding=Sharding("ddp", 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match="runs one process, and this recipe trains with ddp on 2"):
        check_can_measure(parsed)


def test_measured_memory_stands_beside_the_estimate(recipe, monkeypatch):
    """On a CPU: the same way through the trainer, with the byte counter in the place of the GPU's allocator."""
    monkeypatch.setattr(checks, "check_can_measure", lambda recipe: None)
    monkeypatch.setattr(checks, "measure", lambda recipe, rows: replace(measure(recipe, rows, LiveBytes), reserved=0))
    report = examine(recipe, ["--gradient_accumulation_steps", "2"], measures=True)
    assert status(report)["measured memory"] == OK and "two steps took" in texts(report)["measured memory"]
    context = parts(report)["CUDA context, fragmentation"]
    assert report.memory.measured.allocated == pytest.approx(report.memory.estimate.total - context, rel=0.25)
    console = Console(record=True, width=100)
    show(report, console)
    assert "max_memory_allocated" in console.export_text()

    def too_small(recipe, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(checks, "measure", too_small)
    assert status(examine(recipe, [], measures=True))["measured memory"] == STOP
    stopped = examine(recipe, ["--max_length", "10"], measures=True)
    assert "measured memory" not in status(stopped)  # it could not be trained


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_models_count_as_real_ones(family):
    model, _ = build(family)
    model.config.architectures = [type(model).__name__]
    empty = empty_model(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    counted = model_sizes(empty, quantized=False, skip=[])
    assert counted.total == model.num_parameters() and 0 < counted.vision < counted.total
    _, adapted = adapt(empty, LoraConfig(target_modules="all-linear"))
    assert {part_of(name) for name in adapted} > {"language"}  # all-linear reaches into the tower of every family
