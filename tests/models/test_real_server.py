"""A server that is not ours: `transformers serve` with the testbed's base, on the CPU."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from studies.testbed import truth
from trl_vpo.errors import ModelError
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.local import LocalModel
from trl_vpo.models.requests import Request, Sampling
from trl_vpo.models.server import ServerModel
from trl_vpo.testbed import language, world
from trl_vpo.testbed.tiny_vlm import BASE

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
GREEDY = Sampling(max_new_tokens=72, temperature=0.0, top_p=1.0)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install transformers[serving]"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(BASE)]
    log = tmp_path_factory.mktemp("serve") / "log"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], stdout=file, stderr=file, env=env, cwd=Path.cwd()
        )
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def asked(kind, count):
    """Questions about the world's clips or scenes; scenes as images."""
    requests = []
    for sample in world.draw_samples(kind, count, 5, habits=False):
        clip = load_video({"video": sample.frames, "frames_fps": world.FRAME_RATE}, VideoOptions(num_frames=8))
        media = Media(videos=(clip,)) if kind == "clip" else Media(images=(Image.fromarray(sample.frames[0]),))
        content = [{"type": "video" if kind == "clip" else "image"}, {"type": "text", "text": language.PROMPTS[kind]}]
        requests.append(Request([{"role": "user", "content": content}], media))
    return requests


def test_images_are_answered_as_in_this_process(url):
    scenes = asked("scene", 4)
    local = LocalModel(AutoModelForImageTextToText.from_pretrained(BASE), AutoProcessor.from_pretrained(BASE))
    assert ServerModel(url, str(BASE)).answer(scenes, GREEDY) == local.answer(scenes, GREEDY)


def test_a_clip_goes_as_frames_and_not_as_a_video(url):
    clips, samples = asked("clip", 2), world.draw_samples("clip", 2, 5, habits=False)
    answers = ServerModel(url, str(BASE), media="frames").answer(clips, GREEDY)
    assert [truth.check_caption(text, sample.things).parsed for text, sample in zip(answers, samples)] == [True] * 2
    with pytest.raises(ModelError, match="set server_media: frames"):
        ServerModel(url, str(BASE), max_retries=0).answer(clips, GREEDY)
