"""`accelerate launch scripts/generate.py rrpo --config recipes/rrpo/generate.yaml`: `trl-vpo generate`, as a file."""

import sys

from trl_vpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
