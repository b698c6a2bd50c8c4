"""`python -m studies.real`, as `make study-real` runs it in .venv-real: the study on text, then that on pictures."""

import argparse
import os

from studies import interrupt
from studies.real import study
from studies.real.pictures import study as pictures


def main() -> None:
    argparse.ArgumentParser(prog="python -m studies.real", description=__doc__).parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spin more than they help
    study.main()
    pictures.main()


if __name__ == "__main__":
    interrupt.run(main)
