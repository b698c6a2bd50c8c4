"""Workers of a run as processes of their own, forked quickly from one that has the store imported, to be killed."""

import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

from forks import in_forks, serve

from trl_vpo.errors import RunError
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.store import Run

CALLS = ("write", "ftruncate", "fsync", "replace")  # all by which the store changes the disk, but for opening files


def outcome(name: str) -> Outcome:
    """Return what always comes of the input `name`. Every fourth is rejected, every fifth gives two rows."""
    number = int(name[1:])
    if number % 4 == 3:
        return Outcome(name, reason=f"the answer {number} is right", kind="answered correctly", notes={"n": number})
    rows = [
        {
            "id": f"{name}-{j}",
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Wie heißt das? " + "x" * 40 * number}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": f"{number}"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": f"{number}, {j}"}]}],
            **({"images": [f"/media/{name}.png"]} if number == 6 else {}),
        }
        for j in range(2 if number % 5 == 0 else 1)
    ]
    return Outcome(name, rows=tuple(rows), notes={"n": number})


class Sum:
    def select(self, outcomes):
        return outcomes

    def summarize(self, outcomes):
        return {"sum": sum(o.notes["n"] for o in outcomes)}


def work(folder, count, rank=0, world_size=1):
    """The whole life of a worker; gives the summary or None."""
    ids = [f"r{i}" for i in range(count)]
    with Run(folder, {"seed": 0}, rank=rank, world_size=world_size) as run:
        for i in run.remaining(ids):
            run.write(outcome(ids[i]))
        return run.finish(ids, Sum())


def die_at(point: int) -> None:
    """Kill this process at a point: there is one before and one after each call, before a line with half of it out."""
    points = iter(range(point + 1))

    def passes() -> bool:
        return next(points) < point

    def watched(name, real):
        def call(*args):
            if not passes():
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args)
            if not passes():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))


def slowly() -> None:
    """Lines go out in small pieces, and files are put in place after a pause."""
    write, replace = os.write, os.replace

    def pieces(file, data):
        time.sleep(0.0002)
        return write(file, data[:64])

    def late(*args):
        time.sleep(0.005)
        replace(*args)

    os.write, os.replace = pieces, late


def child(job: dict) -> None:
    """A worker's process. Ends with 0: the run is complete, 1: others have work, 2: an error, in the file `errors`."""
    errors = job.pop("errors", None)
    if (limit := job.pop("file_size", None)) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if (point := job.pop("die_at", None)) is not None:
        die_at(point)
    if job.pop("slow", False):
        slowly()
    try:
        if job.pop("hold", False):
            with Run(job["folder"], {"seed": 0}, rank=job.get("rank", 0), world_size=job.get("world_size", 1)):
                orphan = os.fork()
                if orphan:
                    Path(errors).write_text(str(orphan))
                time.sleep(60)
        os._exit(0 if work(**job) else 1)
    except RunError as error:
        Path(errors).write_text(str(error))
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(3)


if __name__ == "__main__":
    assert not {"torch", "transformers", "datasets"} & sys.modules.keys(), "the store must start quickly"
    serve(in_forks(child))
