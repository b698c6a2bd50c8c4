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

_HOMES = {  # of what is no method's
    "EvaluationCallback": "evaluate.callback",
    "PreferenceCollator": "data.collator",
    "versions": "data.identity",
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
    from trl_vpo.runs.quiet import hide_messages
    from trl_vpo.training.methods import METHODS

    homes = _HOMES | {each: f"trainers.{method}" for method, names in METHODS.items() for each in names}
    if name not in homes:
        raise AttributeError(f"module 'trl_vpo' has no attribute {name!r}; it has {', '.join(__all__)}")
    hide_messages()  # what TRL imports says some
    return getattr(importlib.import_module(f"trl_vpo.{homes[name]}"), name)


def __dir__():
    return sorted(__all__)
