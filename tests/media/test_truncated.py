"""Files that end too early or are damaged inside, and the healthy ones of every kind, none of which may be refused."""

import io
import random
from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import needs_pyav, numbers, picture, refused, remux_shifted, write_video
from PIL import Image

from trl_vpo.errors import MediaError
from trl_vpo.media import decode
from trl_vpo.media.load import VideoOptions, check_video, load_video
from trl_vpo.media.truncation import find_truncation

ALL = VideoOptions(num_frames=1000)
FRAMES = 40
OPEN = "scenecut=0:open-gop=1"
LIVE = {"movflags": "empty_moov+frag_keyframe+default_base_moof"}
HEALTHY = {  # name: how it is written
    "h264.mp4": {},
    "fast.mp4": {"options": {"movflags": "faststart"}},
    "fragments.mp4": {"options": LIVE},
    "open.mp4": {"x264": OPEN, "bframes": 3},
    "refresh.mp4": {"x264": "intra-refresh=1"},
    "fields.mp4": {"x264": "interlaced=1"},
    "sound.mp4": {"audio_seconds": 2},
    "h264.mov": {},
    "prores.mov": {"codec": "prores_ks"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "hevc.mp4": {"codec": "libx265"},
    "av1.mp4": {"codec": "libsvtav1"},
    "h264.mkv": {},
    "open.mkv": {"x264": OPEN, "bframes": 3},
    "sound.mkv": {"audio_seconds": 2},
    "hevc.mkv": {"codec": "libx265", "x265": "open-gop=1"},
    "live.mkv": {"options": {"live": "1"}},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "live.webm": {"codec": "libvpx-vp9", "options": {"live": "1"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg"},
    "h264.ts": {},
    "open.ts": {"x264": OPEN, "bframes": 3},
    "hevc.ts": {"codec": "libx265", "x265": "open-gop=1"},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg2.mpg": {"codec": "mpeg2video", "fps": 25},
    "flv1.flv": {"codec": "flv"},
    "wmv2.wmv": {"codec": "wmv2"},
    "ffmpeg.gif": {"codec": "gif", "fps": 25},
    "h264.h264": {},
}
NO_END = {"h264.h264"}  # a raw stream


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, how in HEALTHY.items():
        write_video(folder / name, FRAMES, **how)
    first, *others = [Image.fromarray(picture(i)) for i in range(FRAMES)]
    first.save(folder / "pillow.gif", save_all=True, append_images=others, duration=100)
    return folder


@pytest.mark.parametrize("name", [*HEALTHY, "pillow.gif"])
def test_healthy_files_pass(corpus, name):
    if name.endswith((".mpg", ".flv")):
        needs_pyav(17, 0, "opening these with a protocol_whitelist, on which FFmpeg 7 crashes,")
    check_video(corpus / name, ALL)
    clip = load_video(corpus / name, ALL)
    assert clip.total_frames == FRAMES and numbers(clip.frames) == list(range(FRAMES))
    data = (corpus / name).read_bytes()
    assert find_truncation(io.BytesIO(data), len(data)) is None


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "pillow.gif", "mpeg4.avi"])
@pytest.mark.parametrize("more", [bytes(1000), b"junk" * 250])
def test_bytes_behind_the_end_do_no_harm(corpus, tmp_path, name, more):
    (tmp_path / name).write_bytes((corpus / name).read_bytes() + more)
    assert load_video(tmp_path / name, ALL).total_frames == FRAMES


def assert_last_frames(path, more_than):
    """A video gives its last frames, and not all of them."""
    shown = numbers(load_video(path, ALL).frames)
    assert more_than < len(shown) < FRAMES and shown == list(range(FRAMES - len(shown), FRAMES))


@pytest.mark.parametrize("name", ["h264.ts", "open.ts", "hevc.ts", "mpeg2.ts"])
def test_a_recording_may_begin_between_keyframes(corpus, tmp_path, name):
    if name == "hevc.ts":
        needs_pyav(17, 0, "leaving out pictures that need what is gone")
    data = (corpus / name).read_bytes()
    (tmp_path / name).write_bytes(data[len(data) // 5 // 188 * 188 :])
    check_video(tmp_path / name, ALL)
    assert_last_frames(tmp_path / name, 10)


@pytest.mark.parametrize("name", ["open.mkv", "hevc.mkv", "open.mp4"])
def test_a_remux_may_begin_at_an_open_keyframe(corpus, tmp_path, name):
    """Its leading pictures need what is missing; FFmpeg leaves them out."""
    with av.open(str(corpus / name)) as old, av.open(str(tmp_path / name), "w") as new:
        stream, keys = new.add_stream_from_template(old.streams.video[0]), 0
        for packet in old.demux(old.streams.video[0]):
            keys += bool(packet.size) and packet.is_keyframe
            if packet.size and keys >= 2:
                packet.stream = stream
                new.mux(packet)
    assert_last_frames(tmp_path / name, 20)


def test_an_edit_list_may_begin_inside_an_open_group(corpus, tmp_path):
    assert_last_frames(remux_shifted(corpus / "open.mp4", tmp_path / "edit.mp4", -14), 20)


@pytest.mark.parametrize("name", sorted({*HEALTHY, "pillow.gif"} - NO_END))
def test_a_file_cut_anywhere_is_noticed(corpus, tmp_path, name):
    """At 60 places, all but those where one unit of a stream ends and the next begins."""
    data = (corpus / name).read_bytes()
    places = np.linspace(len(data) * 0.1, len(data) - 1, 60).astype(int)
    unnoticed = [at for at in places if find_truncation(io.BytesIO(data[:at]), at) is None]
    if name.endswith((".mp4", ".mov")):  # without its index, FFmpeg refuses it
        unnoticed = [at for at in unnoticed if b"moov" in data[:at]]
    assert len(unnoticed) <= (2 if name.endswith((".ts", ".mpg", "live.mkv", "live.webm", "fragments.mp4")) else 0)
    for at in places[[0, 20, 40, 50, 57, 59]]:
        if at not in unnoticed:
            (tmp_path / name).write_bytes(data[:at])
            refused(tmp_path / name, "truncated: .* [Ff]etch or write it again|no moov atom")


def test_a_stream_that_ends_inside_a_picture(corpus, tmp_path):
    """Cut between two packets of a picture: every packet is whole, the picture is not."""
    data = (corpus / "h264.ts").read_bytes()
    starts = [at for at in range(0, len(data), 188) if data[at + 1 : at + 3] == b"\x41\x00"]  # of video, each frame's
    (tmp_path / "half.ts").write_bytes(data[: starts[20] + 188])
    for options in (ALL, VideoOptions(num_frames=2, video_end=0.2)):  # also where the end is not wanted
        # Which of the two says it depends on the threads of the decoder.
        refused(tmp_path / "half.ts", "ends in a broken picture|breaks off: frame 20", options=options)


@pytest.mark.parametrize("name, most", [("h264.mp4", 13), ("h264.mkv", 13), ("mpeg4.mp4", 15)])
def test_flipped_bits_are_mostly_noticed(name, most, tmp_path, monkeypatch):
    """H.264 has no checksums: some flips are another valid picture. FFmpeg patches the others; that is refused.

    x264 writes the same packets in every run only without its assembly, and of several threads that decode, one may
    miss what another patched.
    """
    monkeypatch.setattr(decode, "max_threads", lambda: 1)
    path = write_video(tmp_path / name, FRAMES, **HEALTHY[name] | {"x264": "scenecut=0:asm=0"})
    good = load_video(path, ALL).frames.astype(int)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    passed = noticed = 0
    rng = random.Random(0)
    for _ in range(40):
        (position, size), data = rng.choice(packets), bytearray(path.read_bytes())
        data[position + rng.randrange(size)] ^= 1 << rng.randrange(8)
        try:
            frames = load_video(data, ALL).frames
            passed += len(frames) < FRAMES or bool(np.abs(frames - good).max() > 40)
        except MediaError:
            noticed += 1
    assert noticed >= 20 and passed <= most


def test_what_is_predicted_from_a_patched_picture_is_refused(tmp_path):
    """The wanted frame itself decodes without a complaint."""
    path = write_video(tmp_path / "h264.mp4", FRAMES, x264="scenecut=0:asm=0")
    with av.open(str(path)) as container:
        second = [packet for packet in container.demux(video=0) if packet.size][1]  # shown as number 3, behind two Bs
        begin = second.pos + second.size // 10
    data = bytearray(path.read_bytes())
    data[begin : begin + 8] = b"\xa5" * 8
    with av.open(io.BytesIO(bytes(data))) as container:
        container.streams.video[0].codec_context.thread_count = 1  # several lose the mark at times
        assert [i for i, frame in enumerate(container.decode(video=0)) if frame.is_corrupt] == [3]
    with pytest.raises(MediaError, match=r"breaks off: frame 6 of 40.*damaged"):
        load_video(bytes(data), VideoOptions(num_frames=1, video_start=0.2, video_end=0.21))
    assert numbers(load_video(bytes(data), VideoOptions(num_frames=2, video_start=1.0)).frames) == [30, 39]


def write_sizes(path, sizes, codec):
    """A stream that changes its size: ten frames of each."""
    with av.open(str(path), "w") as container:
        stream, count = None, 0
        for width, height in sizes:
            encoder = av.CodecContext.create(codec, "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 10), Fraction(10)
            packets = []
            for at in range(count, count + 10):
                frame = av.VideoFrame.from_ndarray(picture(at, width, height), format="rgb24")
                frame.pts = at
                packets += encoder.encode(frame)
            packets += encoder.encode()
            if stream is None:
                stream = container.add_stream(codec, rate=10)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for packet in packets:
                packet.stream = stream
                container.mux(packet)
            count += 10
    return path


@pytest.mark.parametrize("name, codec", [("a.webm", "libvpx-vp9"), ("a.webm", "libvpx"), ("a.ts", "libx264")])
def test_a_change_of_size_is_scaled_and_one_of_shape_refused(tmp_path, name, codec):
    same = load_video(write_sizes(tmp_path / name, [(64, 48), (128, 96)], codec), ALL)
    assert same.frames.shape == (20, 48, 64, 3) and numbers(same.frames) == list(range(20))
    path = write_sizes(tmp_path / f"b{name}", [(64, 48), (64, 96)], codec)
    refused(path, r"its shape: frame 10, at 1.00 s, is 64x96, frame 0 is 64x48.*Write", uses=[load_video])
    before = load_video(path, VideoOptions(num_frames=4, video_end=0.9))
    assert before.frames.shape == (4, 48, 64, 3)
