"""The richer small world: paraphrased captions of several things, the exact mass of their truth, and its base."""
