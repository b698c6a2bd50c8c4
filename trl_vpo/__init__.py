"""Visual preference optimization for TRL: LeanPO, RRPO and LPOI on video and images.

Names are imported when they are used: importing TRL alone takes half a minute on a slow machine.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("trl-vpo")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_WHERE = {
    "VisualDPOConfig": "trl_vpo.trainers.dpo",
    "VisualDPOTrainer": "trl_vpo.trainers.dpo",
    "LeanPOConfig": "trl_vpo.trainers.leanpo",
    "LeanPOTrainer": "trl_vpo.trainers.leanpo",
    "RRPOConfig": "trl_vpo.trainers.rrpo",
    "RRPOTrainer": "trl_vpo.trainers.rrpo",
    "LPOIConfig": "trl_vpo.trainers.lpoi",
    "LPOITrainer": "trl_vpo.trainers.lpoi",
    "PreferenceCollator": "trl_vpo.data.collator",
    "EvaluationCallback": "trl_vpo.evaluate.callback",
    "versions": "trl_vpo.data.identity",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'trl_vpo' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__():
    return sorted(__all__)
