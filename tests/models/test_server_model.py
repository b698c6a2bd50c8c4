"""A model behind a server, against a real HTTP server on loopback that behaves as each test says."""

import base64
import gzip
import io
import itertools
import json
import logging
import socket
import time
from email.utils import formatdate

import av
import numpy as np
import pytest
from chat_server import Reply, Server, refused, said
from PIL import Image

from trl_vpo.errors import GenerateError
from trl_vpo.media.load import Media, VideoOptions, load_video
from trl_vpo.models import server as server_module
from trl_vpo.models.requests import Request, Sampling
from trl_vpo.models.server import ServerModel
from trl_vpo.text.responses import Failure, without_reasoning

KEY = "sk-very-secret-0123456789"
SAMPLING = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.8)


# --- the server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(*replies: Reply, behave=None) -> Server:
        """Replies in turn, the last one for ever; or whatever `behave` says."""
        servers.append(Server(behave or (lambda number, _: replies[min(number, len(replies) - 1)])))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def fast(monkeypatch):
    """Pauses of 0.02 s at most, where the server names none."""
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.02)


def model_of(server: Server, **settings) -> ServerModel:
    return ServerModel(server.url, "tiny", **{"max_retries": 2, "concurrency": 4, **settings})


def asked(text="Why?", *, images=(), videos=(), seed=0) -> Request:
    media = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
    return Request(messages, Media(tuple(images), tuple(videos)), seed)


def stopped(model: ServerModel, requests=None) -> str:
    """The message of the error that ends the run; the whole chain of errors keeps the key to itself."""
    with pytest.raises(GenerateError) as caught:
        model.answer(requests or [asked()], SAMPLING)
    assert KEY not in str(caught.getrepr(chain=True, style="short"))
    return str(caught.value)


# --- what is sent -------------------------------------------------------------------------------------------------


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
    images = {"images": [Image.new("RGB", (8, 8))]}
    for request in (asked(videos=clips[:1]), asked(videos=clips[:2]), asked(videos=clips), asked(**images), asked()):
        model_of(server).answer([request], SAMPLING)
    model_of(server, media="frames").answer([asked(videos=clips)], SAMPLING)
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
    requests = [asked(videos=[gradient_clip()])] * 2
    assert "set server_media: frames" in stopped(model_of(server), requests)
    assert "server_media" not in stopped(model_of(server, media="frames"), requests)
    assert "server_media" not in stopped(model_of(server), [asked()] * 2)


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
    found = [Image.open(io.BytesIO(data_of(p["image_url"]["url"], "image/png"))) for p in parts if "image_url" in p]
    assert all(np.array_equal(a, b) for a, b in zip(found, images))


def test_placeholders_without_media_are_refused(serve):
    server = serve(said("a cat"))
    request = Request([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}])
    assert "1 image placeholder(s), but the row has 0" in stopped(model_of(server), [request])
    assert server.seen == []


def test_answers_come_in_order_and_concurrently(serve):
    def behave(number, body):
        text = body["messages"][0]["content"]
        return Reply(said(f"answer {text}").body, wait=0.3 - 0.03 * int(text))  # later ones are faster

    server = serve(behave=behave)
    requests = [asked(str(i)) for i in range(10)]
    assert model_of(server, concurrency=4).answer(requests, SAMPLING) == [f"answer {i}" for i in range(10)]
    assert server.most_active == 4
    assert model_of(server).answer([], SAMPLING) == []


# --- what comes back ----------------------------------------------------------------------------------------------


def test_answers_that_are_none(serve, fast):
    replies = {
        "cut": said("a long sto", finish="length"),
        "empty": said("  "),
        "zero width": said("\u200b\u2060"),
        "none": said(None),
        "filter": said("", finish="content_filter"),
        "parts": said([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]),
        "thinks": said("<think>\nwell, well\n</think>\n\nyes."),
        "thinking": said("<think>well, well", finish="stop"),
        "refused": refused(400, f"prompt of 9000 tokens is too long for {KEY}"),
        "large": Reply(b"<html>too large</html>", 413),
        "half": Reply(b'{"choices": [{"message": {"content": "a dog \\ud83d"}, "finish_reason": "stop"}]}'),
        "half error": Reply(b'{"error": {"message": "bad \\ud83d"}}', 422),
        "image": said("<image> a dog"),
        "pad": said("a dog<|image_pad|>"),
        "turn": said("a dog<|im_end|>\n<|im_start|>user"),
        "no token": said("a <b>dog</b> | <1> |>"),
    }
    server = serve(behave=lambda _, body: replies[body["messages"][0]["content"]])
    model = model_of(server)
    answers = dict(zip(replies, model.answer([asked(text) for text in replies], SAMPLING)))
    assert answers == {
        "cut": Failure("cut off after 7 tokens"),
        "empty": Failure("empty answer"),
        "zero width": Failure("empty answer"),
        "none": Failure("empty answer"),
        "filter": Failure("stopped by the server's content filter"),
        "parts": "in parts",
        "thinks": "yes.",
        "thinking": Failure("empty answer"),
        "refused": Failure("the server refused the request (400): prompt of 9000 tokens is too long for <API key>"),
        "large": Failure("the server refused the request (413): <html>too large</html>"),
        "half": Failure("the answer holds half a surrogate pair, which is no text"),
        "half error": Failure("the server refused the request (422): bad ?"),
        "image": Failure("the answer holds '<image>', a token of templates"),
        "pad": Failure("the answer holds '<|image_pad|>', a token of templates"),
        "turn": Failure("the answer holds '<|im_end|>', a token of templates"),
        "no token": "a <b>dog</b> | <1> |>",
    }
    assert len(server.seen) == len(replies)  # nothing of this was asked twice


@pytest.mark.parametrize("body", [b'{"choices": [', {"choices": []}, {"error": {"message": "engine"}}, b"<html>"])
def test_a_malformed_answer_is_asked_for_again_then_a_failure(serve, fast, body):
    server = serve(Reply(body), said("fine"))
    assert model_of(server).answer([asked()], SAMPLING) == ["fine"]
    server = serve(Reply(body))
    (failure,) = model_of(server).answer([asked()], SAMPLING)
    assert failure.reason.startswith("malformed answer: ") and "(3 attempts)" in failure.reason
    assert len(server.seen) == 3


def test_a_server_that_is_none_is_not_ten_thousand_failures(serve, fast):
    """A web page behind the URL: the first malformed answer may be one request's, the second is not."""
    assert "malformed answer" in stopped(model_of(serve(Reply(b"<html>"))), [asked(), asked()])


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>a</think>b", "b"),
        ("a</think>\n b ", "b"),  # the template had the opening tag
        ("<think>a</think><think>b</think> c", "c"),
        ("<think>\na", ""),
        ("2 < 3 <think>", "2 < 3 <think>"),
        (" plain ", "plain"),
    ],
)
def test_reasoning_is_taken_off(text, answer):
    assert without_reasoning(text) == answer


# --- trouble ------------------------------------------------------------------------------------------------------


def gaps(server: Server) -> list[float]:
    times = [seen[0] for seen in server.seen]
    return [b - a for a, b in itertools.pairwise(times)]


def test_the_pause_that_a_server_asks_for_is_kept(serve, fast):
    server = serve(refused(429, retry_after="1"), said("fine"))
    assert model_of(server).answer([asked()], SAMPLING) == ["fine"]
    assert 1.0 <= gaps(server)[0] < 1.5
    at = formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now
    server = serve(refused(503, retry_after=at), said("fine"))
    assert model_of(server).answer([asked()], SAMPLING) == ["fine"]
    assert 0.9 <= gaps(server)[0] < 2.5
    server = serve(refused(429, "quota", retry_after="7200"))
    assert "asks to wait 7200 s (status 429: quota)" in stopped(model_of(server))
    assert len(server.seen) == 1


def test_pauses_grow_and_vary(serve):
    server = serve(refused(500), refused(502), refused(529), said("fine"))
    assert model_of(server, max_retries=3).answer([asked()], SAMPLING) == ["fine"]
    for gap, least in zip(gaps(server), (0.25, 0.5, 1.0)):
        assert least <= gap < 2 * least + 0.3
    pauses = {model_of(server)._pause(1, server_module._AttemptFailed("", "server")) for _ in range(5)}
    assert len(pauses) == 5


def test_a_dropped_connection_and_a_slow_answer_are_asked_for_again(serve, fast, caplog):
    caplog.set_level(logging.INFO, logger="trl_vpo")
    server = serve(Reply(hang_up=True), Reply(said("late").body, wait=1.2), said("fine"))
    assert model_of(server, timeout=0.5).answer([asked()], SAMPLING) == ["fine"]
    assert len(server.seen) == 3
    assert "no connection (" in caplog.text and "no answer within 0.5 s; asking again in" in caplog.text


def test_a_slow_answer_is_waited_for_while_it_comes(serve):
    server = serve(Reply(said("fine").body, pauses=(0.2,) * 5))
    assert model_of(server, timeout=0.5).answer([asked()], SAMPLING) == ["fine"]
    assert len(server.seen) == 1


@pytest.mark.parametrize("key", ["sk-0123456789\nabcdef", "sk-012 345", "sk-ключ-0123456789"])
def test_a_key_that_no_header_takes_is_named_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(GenerateError, match="the API key in OPENAI_API_KEY holds a line break or another") as caught:
        ServerModel("http://127.0.0.1:9/v1", "tiny")
    assert key[:6] not in str(caught.value)


def test_endless_answers_are_not_read(serve, fast, monkeypatch):
    monkeypatch.setattr(server_module, "LARGEST_ANSWER", 1000)
    monkeypatch.setattr(server_module, "LONGEST_ANSWER", 1)
    plain = json.dumps(said("a" * 900).body).encode()
    bomb = gzip.compress(b" " * 2**20 + plain)
    server = serve(said("a" * 2000), Reply(bomb, headers={"content_encoding": "gzip"}), Reply(plain))
    assert model_of(server).answer([asked()], SAMPLING) == ["a" * 900]
    assert {headers["accept-encoding"] for _, _, headers, _ in server.seen} == {"identity"}
    assert "an answer of more than 1000 bytes" in stopped(model_of(serve(said("a" * 2000))), [asked()] * 2)
    assert "an answer of more than 1000 bytes" in stopped(model_of(serve(refused(500, "a" * 2000))), [asked()] * 2)
    drips = serve(Reply(plain, pauses=(0.1,) * 50))
    begun = time.monotonic()
    assert "an answer that takes longer than 0.3 s" in stopped(model_of(drips, timeout=0.3, max_retries=0))
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_does_not_take_the_key_along(serve, status):
    other = serve(said("stolen"))
    server = serve(Reply(b"", status, {"location": f"{other.url}/chat/completions?key={KEY}"}))
    assert f"redirects to {other.url}/chat/completions: give the address" in stopped(model_of(server))
    assert other.seen == [] and len(server.seen) == 1


@pytest.mark.parametrize("reply", [refused(500, "boom"), Reply(hang_up=True), refused(429, "slow down")])
def test_a_server_that_is_down_stops_the_run(serve, fast, reply):
    server = serve(reply)
    message = stopped(model_of(server), [asked()] * 40)
    assert server.url in message and "'tiny'" in message and "(3 attempts)" in message
    assert len(server.seen) <= 3 * 4  # the other 36 were never sent


def test_nobody_listens(monkeypatch, fast):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    message = stopped(ServerModel(url, "tiny", max_retries=1))
    assert f"{url} gives no answer from 'tiny': no connection (ConnectError" in message and "(2 attempts)" in message


def test_one_request_that_breaks_the_server_is_its_own_failure(serve, fast):
    server = serve(behave=lambda _, b: refused(500, "boom") if b["messages"][0]["content"] == "2" else said("fine"))
    model = model_of(server, concurrency=1)
    boom = Failure("status 500: boom (3 attempts)")
    requests = [asked(str(i)) for i in range(4)]
    assert model.answer(requests, SAMPLING) == ["fine", "fine", boom, "fine"]
    assert model.answer(requests[2:3], SAMPLING) == [boom]


@pytest.mark.parametrize("concurrency", [1, 8])
def test_requests_that_break_the_server_are_their_own_failures(serve, fast, concurrency):
    """Whether they give up one after the other, behind all the others, or in between."""
    bad = {"2", "3", "7"}
    breaks = Reply({"error": {"message": "boom"}}, 500, wait=0.05)  # the others are quicker
    server = serve(behave=lambda _, b: breaks if b["messages"][0]["content"] in bad else said("fine"))
    model = model_of(server, concurrency=concurrency)
    boom = Failure("status 500: boom (3 attempts)")
    expected = [boom if str(i) in bad else "fine" for i in range(8)]
    assert model.answer([asked(str(i)) for i in range(8)], SAMPLING) == expected
    assert model.answer([asked("2")], SAMPLING) == model.answer([asked("3")], SAMPLING) == [boom]


def test_a_server_that_breaks_down_halfway_stops_the_run(serve, fast):
    server = serve(*[said("fine")] * 5, refused(500, "boom"))
    model = model_of(server, concurrency=1)
    assert "boom" in stopped(model, [asked()] * 40)
    assert len(server.seen) == 5 + 3 * 3  # two requests, and one that was answered before


@pytest.mark.parametrize("status, remedy", [(401, "OPENAI_API_KEY"), (404, "check the model's name")])
def test_what_every_request_would_meet_stops_at_once(serve, caplog, status, remedy):
    caplog.set_level(logging.DEBUG)
    server = serve(refused(status, f"wrong key {KEY} or model"))
    message = stopped(model_of(server, concurrency=1), [asked()] * 5)
    assert server.url in message and "'tiny'" in message and str(status) in message and remedy in message
    assert "wrong key <API key> or model" in message and len(server.seen) == 1
    assert KEY not in caplog.text


def test_a_server_that_refuses_everything_stops_the_run(serve):
    server = serve(refused(400, "video_url is not supported"))
    model = model_of(server)
    message = stopped(model, [asked()] * 3)
    assert "refused all of the first 3 requests" in message and "video_url is not supported" in message


def test_a_server_that_refuses_everything_one_by_one_stops_the_run(serve):
    server = serve(refused(400, "video_url is not supported"))
    model = model_of(server)
    refusal = Failure("the server refused the request (400): video_url is not supported")
    assert model.answer([asked()], SAMPLING) == [refusal]  # it may be this one's fault
    message = stopped(model)
    assert "refused all of the first 2 requests" in message and "video_url is not supported" in message
    assert model.answer([], SAMPLING) == []


def test_refusals_of_a_server_that_answers_are_their_requests_own(serve):
    server = serve(refused(400, "too long"), said("fine"), refused(400, "too long"))
    model = model_of(server)
    answers = [model.answer([asked()], SAMPLING)[0] for _ in range(5)]
    refusal = Failure("the server refused the request (400): too long")
    assert answers == [refusal, "fine", refusal, refusal, refusal]


def test_the_budget_counts_every_attempt(serve, fast):
    server = serve(refused(500), said("fine"))
    model = model_of(server, max_requests=3, concurrency=1)
    assert model.answer([asked()] * 2, SAMPLING) == ["fine", "fine"]
    assert len(server.seen) == 3
    assert "request budget is used up: max_requests is 3" in stopped(model)
    assert len(server.seen) == 3


def test_requests_in_flight_end_before_the_budgets_error(serve):
    server = serve(Reply(said("fine").body, wait=0.3))
    assert "budget" in stopped(model_of(server, max_requests=3, concurrency=4), [asked()] * 9)
    assert len(server.seen) == 3 and server.active == 0


def test_an_address_that_is_none():
    with pytest.raises(GenerateError, match=r"'localhost:8000' is no address of a server: give it as http://"):
        ServerModel("localhost:8000", "tiny")


def test_without_the_client_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)  # what Python does for a package that is missing
    with pytest.raises(GenerateError, match=r"pip install trl-vpo\[judge\]"):
        ServerModel("http://127.0.0.1:1/v1", "tiny")
