"""Decoding before and after a fork: data-loader workers are forks of a process that may have decoded."""

import gc
import multiprocessing

import av
from helpers import write_clip


def test_a_worker_leaves_its_parents_decoders_alone(tmp_path):
    """Freeing them joins threads that a fork does not have: a worker's garbage collection never came back."""
    import trl_vpo.media.video  # noqa: F401

    with av.open(write_clip(tmp_path / "a.mp4", size=(640, 360))) as container:
        container.streams.video[0].thread_type = "AUTO"
        frames = list(container.decode(video=0))
    pictures = [frame.to_ndarray(format="rgb24", width=320, height=180) for frame in frames]
    assert pictures[0].shape == (180, 320, 3)
    frames.append(frames)  # as a traceback keeps the frame that it is about
    del frames
    worker = multiprocessing.get_context("fork").Process(target=gc.collect, daemon=True)
    worker.start()
    worker.join(20)
    code = worker.exitcode
    worker.kill()
    assert code == 0
