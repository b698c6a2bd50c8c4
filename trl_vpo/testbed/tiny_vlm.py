"""A tiny vision-language model of the small world, shipped in `base/`; `studies/testbed/pretraining.py` taught it.

The architecture is Qwen2-VL's at width 128, with 2 vision and 3 language layers: 1,308,928 parameters, 5.2 MB in
float32. It sees clips of 8 frames, 84x56 (24 tokens), and scenes of 112x56 (8 tokens). Its tokenizer is a byte-level
BPE in which each word of the world is one token.
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
