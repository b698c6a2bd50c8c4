"""Check a CUDA machine in at most eight minutes: parity, speed, memory. Nothing is downloaded; weights are random.

    python scripts/gpu_check.py
    python scripts/gpu_check.py --parts parity --seconds 150
    python scripts/gpu_check.py --device cpu --tiny

Parts, in this order: parity (our pass against every branch alone), step (speed and peak memory against stock TRL), kl
(the kernels over the vocabulary), memory (the doctor's estimate), qlora (RRPO on video files). Each has its share of
the seconds, and what an earlier one leaves. The work is done in a process of its own; one that hangs or crashes is
replaced, and its cell says so. Results are in OUTPUT/gpu_check.json and gpu_check.md after every cell; what libraries
print is in gpu_check.log. The exit status is 1 if something is wrong: a parity or a kernel beyond its limit, an error.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARES = {"parity": 95, "step": 240, "kl": 30, "memory": 45, "qlora": 65}  # seconds of 475
SECONDS = 475
CELL_SECONDS = 150  # a cell that takes longer hangs


@dataclass
class Options:
    """What a part has to know."""

    device: str = "cuda"
    tiny: bool = False
    scratch: str | None = None  # folder of what is written on the way
    measured: list[dict] = field(default_factory=list)  # rows of steps


class Worker:
    """A process that runs cells (`gpu_checks.worker`), started when it is needed."""

    def __init__(self, options: Options, log: Path):
        self._options, self._log = options, log
        self._process = None
        # A fork of what has imported everything starts at once, but CUDA does not live through it.
        self._context = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")

    def ask(self, what: str, part: str, cell: dict | None, measured: list[dict], seconds: float) -> tuple[str, object]:
        """Return ("ok", result), or what is wrong: ("missing" | "memory" | "error" | "time", a line)."""
        if self._process is None:
            self._start()
        begin = time.monotonic()
        try:
            self._connection.send((what, part, cell, measured))
            if not self._connection.poll(max(0.0, seconds)):
                self.stop()
                return "time", f"stopped after {time.monotonic() - begin:.0f} s"
            answer = self._connection.recv()
        except (EOFError, OSError):  # the process is gone
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            return "error", f"the process ended with status {code} (see {self._log.name})"
        if answer[0] == "error" and "CUDA" in answer[1]:
            self.stop()
        return answer

    def _start(self) -> None:
        from gpu_checks.worker import serve

        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs, self._options, self._log))
        self._process.start()
        theirs.close()

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._connection.close()
            self._process = None


class Check:
    """A run: asks a worker for one cell after the other and writes all results after each."""

    def __init__(self, options: Options, parts: list[str], seconds: float, folder: Path, command: str):
        self._options, self._parts, self._folder, self._command = options, parts, folder, command
        self._end = time.monotonic() + seconds
        self.rows: list[dict] = []
        self._machine: dict[str, object] = {"device": options.device, "tiny": options.tiny}
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "gpu_check.log"
        log.unlink(missing_ok=True)
        self._worker = Worker(options, log)

    def run(self) -> tuple[Path, Path]:
        """Run all parts, and return the two files."""
        try:
            kind, answer = self._worker.ask("machine", "", None, [], self._end - time.monotonic())
            self._machine |= answer if kind == "ok" else {"problem": answer}
            print("; ".join(f"{name} {value}" for name, value in self._machine.items()), flush=True)
            deadline = time.monotonic()  # what the imports took is nobody's share
            second = (self._end - deadline) / sum(SHARES[part] for part in self._parts)
            for part in self._parts:
                deadline += SHARES[part] * second
                if kind == "ok":
                    self._run_part(part, deadline)
                else:
                    self._add(part, {}, [{"note": answer, "ok": False}])
        finally:
            self._worker.stop()
        return self._write()

    def _run_part(self, part: str, deadline: float) -> None:
        kind, cells = self._ask("cells", part, None, deadline)
        if kind != "ok":
            self._add(part, {}, [{"note": cells} | ({} if kind == "missing" else {"ok": False})])
            return
        if not cells:
            self._add(part, {}, [{"note": "nothing to compare: no step was measured"}])
        for cell in cells:
            if time.monotonic() >= deadline:
                self._add(part, cell, [{"note": "not reached: the time of this part was over"}])
                continue
            kind, answer = self._ask("run", part, cell, deadline)
            wrong = {"ok": False} if kind == "error" else {}
            self._add(part, cell, answer if kind == "ok" else [{"note": answer} | wrong])

    def _ask(self, what: str, part: str, cell: dict | None, deadline: float) -> tuple[str, object]:
        measured = [row for row in self.rows if row["part"] == "step"]
        left = deadline - time.monotonic()
        kind, answer = self._worker.ask(what, part, cell, measured, min(left, CELL_SECONDS))
        if kind == "time":
            answer += ": it hangs" if left > CELL_SECONDS else ": the time of this part was over"
            kind = "error" if left > CELL_SECONDS else kind
        return kind, answer

    def _add(self, part: str, cell: dict, results: list[dict]) -> None:
        for result in results:
            self.rows.append({"part": part} | cell | result)
            shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in self.rows[-1].items() if v is not None}
            print(" ".join(f"{k}={v}" for k, v in shown.items() if k not in ("parts", "kernels")), flush=True)
        self._write()

    def _write(self) -> tuple[Path, Path]:
        from gpu_checks.report import write

        return write(self._folder, self.rows, self._machine, self._command)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="narrow models and short prompts: a dry run")
    parser.add_argument("--parts", default=",".join(SHARES), metavar="P,P", help="some of " + ", ".join(SHARES))
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all parts together; default {SECONDS}")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check"), metavar="FOLDER")
    args = parser.parse_args(argv)
    args.parts = [part for part in SHARES if part in args.parts.split(",")]
    if not args.parts:
        parser.error(f"--parts: none of {', '.join(SHARES)}")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny: models of real width take hours on a CPU")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU is measured
    if str(ROOT) not in sys.path:
        sys.path.insert(1, str(ROOT))  # the package that lies beside this script, installed or not
    command = " ".join(["python scripts/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        check = Check(Options(args.device, args.tiny, scratch), args.parts, args.seconds, args.output, command)
        files = check.run()
    bad = sum(row.get("ok") is False for row in check.rows)
    unmeasured = sum("note" in row for row in check.rows)
    took = f"{time.monotonic() - begin:.0f} s"
    print(f"{len(check.rows)} rows in {took}: {bad} wrong, {unmeasured} not measured")
    print("gpu_check:", *files)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
