"""Visual preference optimization for TRL: LeanPO, RRPO and LPOI on video and images.

Names are imported when they are used: importing TRL alone takes half a minute on a slow machine. No module of the
package imports this one.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_vpo.data.collator import PreferenceCollator
    from trl_vpo.data.identity import versions
    from trl_vpo.evaluate.callback import EvaluationCallback
    from trl_vpo.trainers.ddpo import DDPOConfig, DDPOTrainer
    from trl_vpo.trainers.dpa import DPAConfig, DPATrainer
    from trl_vpo.trainers.dpo import VisualDPOConfig, VisualDPOTrainer
    from trl_vpo.trainers.leanpo import LeanPOConfig, LeanPOTrainer
    from trl_vpo.trainers.lpoi import LPOIConfig, LPOITrainer
    from trl_vpo.trainers.mdpo import MDPOConfig, MDPOTrainer
    from trl_vpo.trainers.rrpo import RRPOConfig, RRPOTrainer
    from trl_vpo.trainers.simpo import SimPOConfig, SimPOTrainer
    from trl_vpo.trainers.symmpo import SymMPOConfig, SymMPOTrainer
    from trl_vpo.trainers.tdpo import TDPOConfig, TDPOTrainer

try:
    __version__ = version("trl-vpo")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "trl_vpo.trainers.dpo": ("VisualDPOConfig", "VisualDPOTrainer"),
    "trl_vpo.trainers.leanpo": ("LeanPOConfig", "LeanPOTrainer"),
    "trl_vpo.trainers.rrpo": ("RRPOConfig", "RRPOTrainer"),
    "trl_vpo.trainers.lpoi": ("LPOIConfig", "LPOITrainer"),
    "trl_vpo.trainers.simpo": ("SimPOConfig", "SimPOTrainer"),
    "trl_vpo.trainers.tdpo": ("TDPOConfig", "TDPOTrainer"),
    "trl_vpo.trainers.ddpo": ("DDPOConfig", "DDPOTrainer"),
    "trl_vpo.trainers.mdpo": ("MDPOConfig", "MDPOTrainer"),
    "trl_vpo.trainers.dpa": ("DPAConfig", "DPATrainer"),
    "trl_vpo.trainers.symmpo": ("SymMPOConfig", "SymMPOTrainer"),
    "trl_vpo.data.collator": ("PreferenceCollator",),
    "trl_vpo.evaluate.callback": ("EvaluationCallback",),
    "trl_vpo.data.identity": ("versions",),
}
__all__ = [
    "DDPOConfig",
    "DDPOTrainer",
    "DPAConfig",
    "DPATrainer",
    "EvaluationCallback",
    "LPOIConfig",
    "LPOITrainer",
    "LeanPOConfig",
    "LeanPOTrainer",
    "MDPOConfig",
    "MDPOTrainer",
    "PreferenceCollator",
    "RRPOConfig",
    "RRPOTrainer",
    "SimPOConfig",
    "SimPOTrainer",
    "SymMPOConfig",
    "SymMPOTrainer",
    "TDPOConfig",
    "TDPOTrainer",
    "VisualDPOConfig",
    "VisualDPOTrainer",
    "__version__",
    "versions",
]


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            from trl_vpo.runs.quiet import hide_messages

            hide_messages()  # what TRL imports says some
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'trl_vpo' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted(__all__)
