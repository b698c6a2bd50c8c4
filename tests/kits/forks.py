"""A process that has imported what is slow to import, and forks a process for each job that a test gives it."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

KITS = Path(__file__).parent


class Server:
    """Starts a script that calls `serve`, and asks it: a job and its answer are a line of JSON each."""

    def __init__(self, script: str, *args):
        env = os.environ | {"PYTHONPATH": str(KITS.parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, str(KITS / script), *map(str, args)], stdin=-1, stdout=-1, text=True, env=env
        )
        assert self.process.stdout.readline() == '"ready"\n'

    def ask(self, job: dict):
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self, pid: int) -> int:
        return self.ask({"wait": pid})

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable, warm_up: Callable = lambda: None) -> None:
    """Answer the jobs of stdin; what else is printed goes to stderr, that of imports, too."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up()
    print('"ready"', file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def in_forks(child: Callable) -> Callable:
    """Return what answers a job with the pid of a fork that does it, and {"wait": pid} with its exit code."""

    def answer(job):
        if "wait" in job:
            return os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
        pid = os.fork()
        if not pid:
            child(job)
        return pid

    return answer


def run_and_exit(main: Callable, log: Path | str) -> None:
    """End this process as `main` ends, with its output in a file."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = main() or 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
