"""Tasks of lmms-eval over clips made here, and what a test asks about them."""

import functools
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from local_kit import asked

from trl_vpo.evaluate.lmms import run as lmms
from trl_vpo.media.load import VideoOptions, load_video
from trl_vpo.models.requests import Request
from trl_vpo.testbed import language, world
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.testbed.tiny_vlm import BASE

needs_lmms_eval = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="needs the extra lmms")
FRAMES = VideoOptions(num_frames=4)
FIRST, CAPTION = "What moves first?", "Describe the video."

CODE = '''
def media(doc):
    return [doc["clip"]]


def messages(doc):
    """Two images, with text before, between and behind them."""
    first, second = ({"type": "image", "url": path} for path in doc["scenes"])
    content = [first, {"type": "text", "text": "and"}, second, {"type": "text", "text": "How big is the table?"}]
    return [{"role": "system", "content": [{"type": "text", "text": "Look."}]}, {"role": "user", "content": content}]


def leave(doc):
    raise SystemExit("video path gone.mp4 does not exist")


def right(doc, results):
    return {"right": float(results[0] == doc["answer"])}
'''


class Function(str):
    """A `!function` of lmms-eval's task files."""


yaml.SafeDumper.add_representer(Function, lambda dumper, text: dumper.represent_scalar("!function", str(text)))


def write_documents(folder: Path) -> list[dict]:
    """Six clips with what moves first and three captions each, of which the true one is at `place`; two scenes."""
    scenes = world.draw_samples("scene", 2, seed=6, habits=False)
    scenes = [str(world.write_sample(sample, folder / f"{i}.png")) for i, sample in enumerate(scenes)]
    documents = []
    for i, sample in enumerate(world.draw_samples("clip", 6, seed=5, habits=False)):
        wrong = [language.one_fact_wrong(sample.things, np.random.default_rng(seed))[0] for seed in range(3)]
        captions = [language.caption(things) for things in wrong]
        captions[i % 3] = language.caption(sample.things)
        clip = str(world.write_sample(sample, folder / f"{i}.mp4"))
        answer = f"the {next(thing.shape for thing in sample.things if thing.turn == 1)}."
        documents.append({"clip": clip, "scenes": scenes, "answer": answer, "captions": captions, "place": i % 3})
    return documents


def write_tasks(folder: Path, documents: list[dict]) -> Path:
    """A folder with tasks of every kind that the bridge serves, and of some that it refuses."""
    write_jsonl(documents, folder / "documents.jsonl")
    (folder / "code.py").write_text(CODE)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
    data["test_split"] = "test"
    metric = {"metric": "right", "aggregation": "mean", "higher_is_better": True}
    scored = {"process_results": Function("code.right"), "metric_list": [metric], "doc_to_target": "answer"}
    media = {"doc_to_visual": Function("code.media")}
    clip = {**data, **scored, **media, "doc_to_text": FIRST}
    choice = {**data, **media, "output_type": "multiple_choice", "doc_to_text": CAPTION}
    scenes = {"doc_to_messages": Function("code.messages"), "doc_to_text": "not used"}

    def generation(**settings):
        return {"generation_kwargs": settings}

    hot = generation(max_new_tokens=16, temperature=2.5, top_p=0.95, do_sample=True)
    greedy = generation(max_new_tokens=16, temperature=0, until=["\n\n"])
    configs = {
        "tiny_first": clip | greedy,
        "tiny_stop": clip | generation(max_new_tokens=16, until=["e", "l"]),
        "tiny_cut": clip | generation(max_new_tokens=2, temperature=0.7, do_sample=False) | {"doc_to_text": CAPTION},
        "tiny_hot": clip | hot | {"repeats": 2},
        "tiny_scenes": data | scored | greedy | scenes,
        "tiny_choice": choice | {"doc_to_choice": "captions", "doc_to_target": "place"},
        "tiny_beams": clip | generation(num_beams=4),
        "tiny_gone": clip | greedy | {"doc_to_visual": Function("code.leave")},
        "tiny_rounds": clip | {"output_type": "generate_until_multi_round"},
        "tiny_broken": clip | greedy | {"doc_to_text": Function("code.not_there")},
    }
    configs = {name: {"task": name, **config} for name, config in configs.items()}
    configs["tiny_all"] = {"group": "tiny_all", "task": ["tiny_stop", {"group": "tiny_inner", "task": ["tiny_cut"]}]}
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def runner(tasks: Path, new_folder):
    """Give a function that runs benchmarks -> their metrics, and the logged rows of each task by document."""
    lmms._task_manager = functools.cache(lmms._task_manager)  # it reads 2,000 files

    def run(*names, out=None, **settings):
        out = out or new_folder()
        settings = {"include_path": tasks, "device": "cpu", "dtype": "float32", "num_frames": 4} | settings
        metrics = lmms.run_benchmarks(names, model=str(BASE), output_dir=out, **settings)
        paths = {path.stem.removeprefix("samples_"): path for path in out.glob("*/samples_*.jsonl")}
        return metrics, {task: list(map(json.loads, path.open())) for task, path in paths.items()}

    return run


def about(text: str, clip: str, seed: int = 0) -> Request:
    return asked(text, videos=[load_video(clip, FRAMES)], seed=seed)


def answers(rows: list[dict]) -> list:
    """The responses of a task's rows; a list of them where a question was repeated."""
    responses = [row["resps"][0] for row in rows]
    return [one[0] if len(one) == 1 else one for one in responses]
