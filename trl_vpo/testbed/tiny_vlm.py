"""A tiny vision-language model of the small world, shipped in `base/`; `studies/testbed/pretraining.py` taught it.

The architecture is Qwen2-VL's at width 96, with 2 vision and 2 language layers: 587,424 parameters, 2.4 MB in
float32. It sees clips of 8 frames, 56x56 (64 tokens), and scenes of 112x56 (32 tokens). Its tokenizer is a byte-level
BPE in which each word of the world is one token.
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
