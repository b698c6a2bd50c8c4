"""`accelerate launch scripts/evaluate.py --model BASE --data ROWS.jsonl --output_dir RUN`: `trl-vpo evaluate`."""

import sys

from trl_vpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
