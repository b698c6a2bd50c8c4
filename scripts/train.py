"""`accelerate launch scripts/train.py rrpo --config recipes/rrpo/qwen2_5_vl_7b.yaml`: `trl-vpo train`, as a file."""

import sys

from trl_vpo.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
