"""The frame cache: the same clips, nothing decoded twice, and never a reason to stop."""

import multiprocessing
import os
import resource
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import build
from helpers import row, write_clip
from media_files import write_video
from torch.utils.data import DataLoader

import trl_vpo
from trl_vpo.data.check import prepare_dataset
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.errors import MediaError
from trl_vpo.media import frame_cache
from trl_vpo.media.load import VideoOptions, load_video

FOUR = VideoOptions(num_frames=4, max_pixels=1000)


@pytest.fixture
def clip(tmp_path):
    return write_video(tmp_path / "clip.mp4")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deep" / "cache"


def assert_same(a, b):
    np.testing.assert_array_equal(a.frames, b.frames, strict=True)
    np.testing.assert_array_equal(a.timestamps, b.timestamps, strict=True)
    for name in ("fps", "total_frames", "duration", "span", "sample_fps"):
        assert type(getattr(a, name)) is type(getattr(b, name)) and getattr(a, name) == getattr(b, name)


def spoil(path):
    """Garbage of the same size and time: whoever decodes it fails, the cache cannot tell."""
    stat = path.stat()
    path.write_bytes(b"\xa5" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(MediaError):
        load_video(path, FOUR)


def entries(cache):
    return sorted(cache.iterdir())


def test_a_hit_is_the_same_clip_and_decodes_nothing(clip, cache):
    want = load_video(clip, FOUR)
    assert_same(load_video(clip, FOUR, cache=cache), want)
    assert [path.suffix for path in entries(cache)] == [".npz"]
    spoil(clip)
    hit = load_video(clip, FOUR, cache=cache)
    assert_same(hit, want)
    hit.frames[:] = 0  # a clip of one's own, as without the cache
    assert_same(load_video(str(clip), FOUR, cache=str(cache)), want)


def test_the_name_is_that_of_the_source_at_hand(clip, cache, monkeypatch):
    link = clip.with_name("link.mp4")
    link.symlink_to(clip)
    load_video(clip, FOUR, cache=cache)
    spoil(clip)
    assert load_video(link, FOUR, cache=cache).source == str(link)
    monkeypatch.chdir(clip.parent)
    assert load_video("clip.mp4", FOUR, cache=cache).source == "clip.mp4"
    assert len(entries(cache)) == 1


def test_every_way_of_sampling_has_its_own_entry(clip, cache):
    ways = [replace(FOUR, **more) for more in ({}, {"num_frames": 5}, {"max_pixels": 900}, {"video_start": 1.0})]
    ways += [VideoOptions(fps=4, max_frames=3), VideoOptions(fps=4, max_frames=4)]
    want = [load_video(clip, way) for way in ways]
    for _ in range(2):
        for way, clip_of_way in zip(ways, want):
            assert_same(load_video(clip, way, cache=cache), clip_of_way)
    own = {"path": str(clip), "num_frames": np.int64(5)}  # a row's own options count, however they are written
    assert_same(load_video(own, FOUR, cache=cache), want[1])
    assert len(entries(cache)) == len(ways)


def test_a_changed_file_is_decoded_again(clip, cache):
    load_video(clip, FOUR, cache=cache)
    write_video(clip, frames=30)
    assert_same(load_video(clip, FOUR, cache=cache), load_video(clip, FOUR))
    spoil(clip)
    stat = clip.stat()
    os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))  # the same size, another time
    with pytest.raises(MediaError):
        load_video(clip, FOUR, cache=cache)


def test_only_whole_video_files_are_kept(clip, cache):
    load_video(clip.read_bytes(), FOUR, cache=cache)
    load_video([np.zeros((8, 8, 3), np.uint8)] * 3, FOUR, cache=cache)
    assert not cache.exists()
    clip.write_bytes(b"no video")
    with pytest.raises(MediaError):
        load_video(clip, FOUR, cache=cache)
    assert not cache.exists()


def test_broken_entries_are_decoded_again_and_replaced(clip, cache):
    want = load_video(clip, FOUR)
    load_video(clip, FOUR, cache=cache)
    (path,) = entries(cache)
    good = path.read_bytes()
    damages = [b"", b"not an archive", good[: len(good) // 2], good[:-1]]
    for place in range(5, len(good), len(good) // 60):  # headers, keys, frames, the directory at the end
        damages.append(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
    for damaged in [*damages, good[:100]]:
        path.write_bytes(damaged)
        assert_same(load_video(clip, FOUR, cache=cache), want)
    spoil(clip)
    assert_same(load_video(clip, FOUR, cache=cache), want)


def test_an_entry_of_another_format_is_not_taken(clip, cache, monkeypatch):
    load_video(clip, FOUR, cache=cache)
    monkeypatch.setattr(frame_cache, "FORMAT", frame_cache.FORMAT + 1)
    spoil(clip)
    with pytest.raises(MediaError):
        load_video(clip, FOUR, cache=cache)


def write_again_and_again(video, cache):
    warnings.simplefilter("error")
    clip, entry = load_video(video, FOUR), frame_cache.Entry(cache, video, FOUR)
    for _ in range(300):
        entry.write({name: getattr(clip, name) for name in frame_cache.FIELDS})
        assert entry.read() is not None  # never half a file


def test_two_processes_write_the_same_clip_at_once(clip, cache):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_again_and_again, args=(clip, cache)) for _ in range(2)]
    for step in ("start", "join"):
        for writer in writers:
            getattr(writer, step)()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.suffix for path in entries(cache)] == [".npz"]
    assert_same(load_video(clip, FOUR, cache=cache), load_video(clip, FOUR))


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(frame_cache, "_warned", False)


def test_a_folder_that_cannot_be_written_warns_once(clip, tmp_path, unwarned):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.warns(UserWarning, match="frame_cache: nothing can be written to .*file"):
        assert_same(load_video(clip, FOUR, cache=tmp_path / "file" / "cache"), load_video(clip, FOUR))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_video(clip, FOUR, cache=tmp_path / "file" / "cache")


def test_a_full_disk_leaves_no_halves(clip, cache, unwarned):
    """A limit on the size of files stands in for the end of the disk: the write fails in its middle."""
    want = load_video(clip, FOUR)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.warns(UserWarning, match="clips are decoded without it"):
            assert_same(load_video(clip, FOUR, cache=cache), want)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(cache) == []
    assert_same(load_video(clip, FOUR, cache=cache), want)
    assert len(entries(cache)) == 1


@pytest.fixture(scope="module")
def qwen():
    return build("Qwen2.5-VL")[1]


def same_batch(a, b):
    assert set(a) == set(b) and a["names"] == b["names"]
    for x, y in [(a, b), *zip(a["media"], b["media"])]:
        assert set(x) == set(y) and all(torch.equal(v, y[k]) for k, v in x.items() if torch.is_tensor(v))


def test_check_media_decode_fills_what_the_collator_reads(qwen, tmp_path, cache):
    paths = [Path(write_clip(tmp_path / f"{i}.mp4", seed=i)) for i in range(2)]
    kept = {"num_frames": 4, "check_media": "decode", "frame_cache": str(cache)}
    args = trl_vpo.VisualDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **kept)
    data = Dataset.from_list([row("video", [str(path)]) for path in paths])
    kwargs = {"name": "train", "processing_class": qwen, "phrases": False}
    rows = prepare_dataset(data, args, **kwargs)
    assert len(entries(cache)) == 2
    want = PreferenceCollator(qwen, video=args.video_options())(list(rows))
    for path in paths:
        spoil(path)
    collator = trl_vpo.VisualDPOTrainer.make_collator(qwen, args)
    same_batch(collator(list(rows)), want)
    prepare_dataset(data, args, **kwargs)  # a second run decodes nothing either


def test_a_clip_is_opened_once_for_both_responses(qwen, clip):
    """Counted by the interpreter itself: the files that Python opens."""
    opened = []
    sys.addaudithook(lambda event, args: event == "open" and str(args[0]) == str(clip) and opened.append(1))
    load_video(clip, FOUR)
    once = len(opened)
    PreferenceCollator(qwen, video=FOUR).encode(row("video", [str(clip)]))
    assert once > 0 and len(opened) == 2 * once


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_workers_with_pinned_memory_give_the_same_batches(qwen, tmp_path, cache):
    """Two workers fill the cache; the second epoch, of the same workers, only reads it."""
    paths = [Path(write_clip(tmp_path / f"{i}.mp4", seed=i % 3, frames=8 + i)) for i in range(4)]
    rows = [row("video", [str(path)], id=str(i)) for i, path in enumerate(paths)]
    plain = PreferenceCollator(qwen, video=FOUR)
    want = [plain(rows[:2]), plain(rows[2:])]
    options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 2, "pin_memory": True}
    loader = DataLoader(rows, batch_size=2, collate_fn=replace(plain, frame_cache=str(cache)), **options)
    for _ in range(2):
        for got, expected in zip(loader, want, strict=True):
            same_batch(got, expected)
        assert len(entries(cache)) == 4
        for path in paths:
            spoil(path)
