"""The content of a request as a server gets it: texts, images, clips as one mp4 or as frames."""

import base64
import io

import av
import numpy as np
import pytest
from chat_server import KEY, SAMPLING, model_of, refused, said, stopped
from local_kit import asked
from PIL import Image

from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models.requests import Request


def test_a_text_request_arrives_as_it_was_meant(serve):
    server = serve(said("  because. "))
    model = model_of(server)
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {"role": "user", "content": [{"type": "text", "text": "But why?"}]},
    ]
    assert model.answer([Request(turns, seed=2**62 + 5)], SAMPLING) == ["because."]
    ((_, path, headers, body),) = server.seen
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert [(m["role"], m["content"]) for m in body.pop("messages")] == [
        ("system", "Be brief."),
        ("user", "Why?"),
        ("assistant", "No."),
        ("user", "But why?"),
    ]
    assert body == {"model": "tiny", "temperature": 0.5, "top_p": 0.8, "max_tokens": 7, "seed": 5}
    assert model.record() == {"model": "tiny", "adapter": None, "revision": None, "server": server.url}


def gradient_clip(frames=5, height=48, width=64, fps=2.5):
    """A smooth picture whose brightness tells its number: 40, 80, 120, ..."""
    shade = np.linspace(-20, 20, width)[None, :, None] + 40 * np.arange(1, frames + 1)[:, None, None, None]
    array = np.broadcast_to(shade, (frames, height, width, 3)).round().astype(np.uint8)
    return load_video({"video": array, "frames_fps": fps}, VideoOptions(num_frames=frames))


def data_of(url: str, mime: str) -> bytes:
    head, _, data = url.partition(",")
    assert head == f"data:{mime};base64"
    return base64.b64decode(data)


@pytest.mark.parametrize("height, width, shown", [(48, 64, (48, 64)), (35, 51, (36, 52))])
def test_a_clip_arrives_as_one_mp4(serve, height, width, shown):
    server = serve(said("a cat"))
    clip = gradient_clip(height=height, width=width)
    assert model_of(server).answer([asked("What?", videos=[clip])], SAMPLING) == ["a cat"]
    (message,) = server.bodies[0]["messages"]
    video, text = message["content"]
    assert text == {"type": "text", "text": "What?"} and video["type"] == "video_url"
    with av.open(io.BytesIO(data_of(video["video_url"]["url"], "video/mp4"))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and float(stream.average_rate) == 2.5
        frames = list(container.decode(stream))
    assert len(frames) == 5
    assert [frame.time for frame in frames] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6], abs=1e-3)
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    assert pixels.shape[1:3] == shown
    assert np.abs(pixels[:, :height, :width].astype(int) - clip.frames).mean() < 3
    assert np.allclose(pixels.mean((1, 2, 3)), [40, 80, 120, 160, 200], atol=3)


def test_a_server_is_asked_to_show_every_frame(serve):
    server = serve(said("a cat"))
    clips = [gradient_clip(frames=64, fps=2.5), gradient_clip(frames=3, fps=2.5), gradient_clip(frames=8, fps=0.1)]
    image = Image.new("RGB", (8, 8))
    for media in ({"videos": clips[:1]}, {"videos": clips[:2]}, {"videos": clips}, {"images": [image]}, {}):
        model_of(server).answer([asked("?", **media)], SAMPLING)
    model_of(server, media="frames").answer([asked("?", videos=clips)], SAMPLING)
    loaded = {"video": {"num_frames": 64, "fps": 4}}  # limits: neither is below what the mp4 has
    sent = [(body.get("media_io_kwargs"), body.get("mm_processor_kwargs")) for body in server.bodies]
    assert sent == [
        (loaded, {"do_sample_frames": False, "fps": 2.5}),
        (loaded, {"do_sample_frames": False, "fps": 2.5}),
        (loaded, {"do_sample_frames": False}),  # one rate for all is not to be had
        *[(None, None)] * 3,
    ]


@pytest.mark.parametrize("status", [500, 400])
def test_a_server_that_takes_no_video_names_the_remedy(serve, fast, status):
    server = serve(refused(status, "Internal Server Error"))
    requests = [asked("?", videos=[gradient_clip()])] * 2
    assert "set server_media: frames" in stopped(model_of(server), requests)
    assert "server_media" not in stopped(model_of(server, media="frames"), requests)
    assert "server_media" not in stopped(model_of(server), [asked("?")] * 2)


def test_a_clip_arrives_as_frames(serve):
    server = serve(said("a cat"))
    clip = gradient_clip(frames=3)
    model_of(server, media="frames", max_pixels=32 * 24).answer([asked("What?", videos=[clip])], SAMPLING)
    head, *frames, text = server.bodies[0]["messages"][0]["content"]
    assert head == {"type": "text", "text": "A video as 3 frames, shown at 0.0, 0.4, 0.8 seconds:"}
    assert text == {"type": "text", "text": "What?"} and len(frames) == 3
    for number, part in enumerate(frames, start=1):
        image = Image.open(io.BytesIO(data_of(part["image_url"]["url"], "image/jpeg")))
        assert part["type"] == "image_url" and image.size == (32, 24)
        assert np.asarray(image).mean() == pytest.approx(40 * number, abs=2)


def test_images_arrive_unchanged_and_in_order(serve):
    server = serve(said("a cat"))
    images = [Image.new("RGB", (10 + i, 6), (50 * i, 0, 9)) for i in range(3)]
    image, text = {"type": "image"}, {"type": "text", "text": "or"}
    messages = [{"role": "user", "content": [image, text, image]}, {"role": "user", "content": [image]}]
    model_of(server).answer([Request(messages, Media(images=tuple(images)))], SAMPLING)
    parts = [part for message in server.bodies[0]["messages"] for part in message["content"]]
    assert [part["type"] for part in parts] == ["image_url", "text", "image_url", "image_url"]
    arrived = [Image.open(io.BytesIO(data_of(p["image_url"]["url"], "image/png"))) for p in parts if "image_url" in p]
    assert all(np.array_equal(a, b) for a, b in zip(arrived, images))


def test_placeholders_without_media_are_refused(serve):
    server = serve(said("a cat"))
    request = Request([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}])
    assert "1 image placeholder(s), but the row has 0" in stopped(model_of(server), [request])
    assert server.seen == []
