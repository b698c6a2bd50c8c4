"""The training methods, by their names on the command line."""

from importlib import import_module

METHODS = {  # method: the names of its config and its trainer in `trl_vpo.trainers.METHOD`
    "dpo": ("VisualDPOConfig", "VisualDPOTrainer"),
    "leanpo": ("LeanPOConfig", "LeanPOTrainer"),
    "rrpo": ("RRPOConfig", "RRPOTrainer"),
    "lpoi": ("LPOIConfig", "LPOITrainer"),
    "simpo": ("SimPOConfig", "SimPOTrainer"),
    "tdpo": ("TDPOConfig", "TDPOTrainer"),
    "ddpo": ("DDPOConfig", "DDPOTrainer"),
    "mdpo": ("MDPOConfig", "MDPOTrainer"),
    "dpa": ("DPAConfig", "DPATrainer"),
}


def method_classes(method: str) -> tuple[type, type]:
    """The config and the trainer of a method. Imports TRL, which takes seconds."""
    module = import_module(f"trl_vpo.trainers.{method}")
    config, trainer = METHODS[method]
    return getattr(module, config), getattr(module, trainer)
