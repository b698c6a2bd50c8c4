"""The driver of resumable work over inputs, for `trl-vpo generate` and `trl-vpo evaluate`.

Inputs are decoded ahead by threads, worked on in batches, and written as soon as they are finished. Under `accelerate
launch`, or wherever RANK and WORLD_SIZE are set, every process works on its own share of the inputs, and the last
one to finish writes the results.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from trl_vpo.errors import RunError
from trl_vpo.files import THREADS
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.results import Report
from trl_vpo.runs.store import Run, read_outcomes

DECODERS = 2  # threads that decode the next batch while the model works on this one
PROGRESS = "{n_fmt}/{total_fmt} inputs [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # fits 80 columns
Item = TypeVar("Item")


def rank() -> int:
    """Return this process' rank among those that share the inputs."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return how many processes share the inputs."""
    return int(os.environ.get("WORLD_SIZE", 1))


def work_through(
    folder: str,
    settings: dict[str, Any],
    ids: Sequence[str],  # the ids of all inputs, in order
    *,
    # Position of an input -> the item for `make`, or the outcome of an input that cannot be used. Called by threads.
    load: Callable[[int], Item | Outcome],
    make: Callable[[list[Item]], Iterable[Outcome]],  # loaded items -> their outcomes, in order
    identity: Callable[[int], Any],  # position of an input -> what `check_unchanged` compares, as JSON
    report: Report,
    batch_size: int,
) -> dict[str, Any] | None:
    """Work through the unfinished inputs of this process' share. Return the summary; None while others are at work."""
    with Run(folder, settings, rank=rank(), world_size=world_size()) as run:
        todo, share = run.remaining(ids), len(range(run.rank, len(ids), run.world_size))
        if sys.stderr.isatty():
            show = {"bar_format": PROGRESS}
        else:  # lines of a log
            show = {"bar_format": PROGRESS + "\n", "mininterval": 30, "maxinterval": 60}
        if not todo and run.rank == 0:
            print(f"{share} inputs: all finished before.", file=sys.stderr)
        bar = tqdm(total=share, initial=share - len(todo), unit="input", disable=run.rank != 0 or not todo, **show)
        identities: dict[str, Any] = {}

        def identified(place: int) -> Item | Outcome:
            identities[ids[place]] = identity(place)
            return load(place)

        counts, decoders = {"kept": 0, "rejected": 0}, ThreadPoolExecutor(DECODERS)
        try:
            for batch in decoded_ahead(decoders, identified, todo, batch_size):
                outcomes = [item for item in batch if isinstance(item, Outcome)]
                usable = [item for item in batch if not isinstance(item, Outcome)]
                for outcome in chain(outcomes, make(usable) if usable else ()):
                    run.write(replace(outcome, notes={**outcome.notes, "row": identities.pop(outcome.id)}))
                    counts["kept" if outcome.rows else "rejected"] += 1
                    bar.set_postfix(counts, refresh=False)
                    bar.update()
                    if _ignored:
                        raise KeyboardInterrupt
        finally:  # Ctrl-C and errors do not wait for a batch that nobody will use
            bar.close()
            decoders.shutdown(wait=False, cancel_futures=True)
        summary = run.finish(ids, report)
    if summary is None and run.rank == 0:
        print("This worker is done; the last one writes the results. If a worker died, run the same command again.")
    return summary


def check_unchanged(folder: str, ids: Sequence[str], identity: Callable[[int], dict[str, str]]) -> list[Outcome]:
    """Return the finished outcomes of these inputs; raise RunError if one's row or media have changed since.

    `identity` gives the digests of an input by name, that of the row itself as `row`. One that is not known on both
    sides, as of media that are missing, is not compared.
    """
    if not (Path(folder) / "settings.json").exists():
        return []
    places = {name: place for place, name in enumerate(ids)}
    known = [outcome for outcome in read_outcomes(folder) if outcome.id in places]
    with ThreadPoolExecutor(THREADS) as pool:
        now = pool.map(lambda outcome: identity(places[outcome.id]), known)
        changed = [outcome.id for outcome, is_now in zip(known, now) if _differs(outcome, is_now)]
    if changed:
        raise RunError(
            f"{folder}: {len(changed)} rows, or their media, have changed after they were finished, the first is "
            f"{changed[0]!r}. Put them back, name another output_dir, or delete this folder."
        )
    return known


def _differs(outcome: Outcome, now: dict[str, str]) -> bool:
    before = outcome.notes.get("row") or {}  # earlier versions of generate noted none
    if isinstance(before, str):  # and those of evaluate only that of the row
        before = {"row": before}
    compared = before.keys() & now.keys()
    if outcome.kind == "unreadable media":  # they may be repaired
        compared &= {"row"}
    return any(before[name] != now[name] for name in compared)


def decoded_ahead(decoders: ThreadPoolExecutor, load: Callable, todo: Sequence[int], size: int) -> Iterator[list]:
    """Yield each batch, while the next one is being decoded."""
    waiting = []
    for start in range(0, len(todo) + size, size):
        loading, waiting = waiting, [decoders.submit(load, place) for place in todo[start : start + size]]
        if loading:
            yield [future.result() for future in loading]


_ignored: list[type] = []  # a KeyboardInterrupt that came within a finalizer, where Python drops it


@contextmanager
def ctrl_c_says_how_to_continue(folder: str) -> Iterator[None]:
    """Turn Ctrl-C into one line on the terminal and exit code 130, at the next outcome at the latest."""
    hook = sys.unraisablehook

    def remember(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            _ignored.append(dropped.exc_type)
        else:
            hook(dropped)

    sys.unraisablehook = remember
    try:
        yield
    except KeyboardInterrupt:
        if rank() == 0:
            print(f"Stopped. The same command continues with what is finished in {folder}.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        sys.unraisablehook = hook
        _ignored.clear()
