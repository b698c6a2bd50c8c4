"""The optional packages that the settings of a run need, and how those that are missing are installed."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from trl_vpo.errors import did_you_mean

# A package: the modules of which one is needed, and what pip calls it.
BITSANDBYTES = (("bitsandbytes",), "'trl-vpo[quantization]'")
DEEPSPEED = (("deepspeed",), "'trl-vpo[deepspeed]'")
SWITCHES = {
    "load_in_4bit": BITSANDBYTES,
    "load_in_8bit": BITSANDBYTES,
    "deepspeed": DEEPSPEED,
    "use_liger_kernel": (("liger_kernel",), "liger-kernel"),
}
VALUES = {  # key: the packages of its values, by regular expressions
    "optim": {".*(bnb|paged|lion|ademamix|adamw_8bit).*": BITSANDBYTES},  # transformers names those of rarer ones
    "attn_implementation": {  # transformers takes a kernel of the Hub where the package is missing
        "flash_attention_2": (("flash_attn", "kernels"), "flash-attn"),
        "flash_attention_3": (("flash_attn_interface", "kernels"), "kernels"),
        ".*/.*": (("kernels",), "kernels"),
    },
}
REPORTERS = {
    "tensorboard": (("tensorboard", "tensorboardX"), "'trl-vpo[tensorboard]'"),
    "azure_ml": (("azureml",), "azureml-mlflow"),
    "flyte": (("flytekit",), "flytekit"),
    "comet_ml": (("comet_ml",), "comet-ml"),
}
for name in ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "trackio", "wandb"):
    REPORTERS[name] = ((name,), name)


def missing_packages(settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each package that a run's arguments need and that is not installed."""
    needed = {key: package for key, package in SWITCHES.items() if settings.get(key)}
    for key, packages in VALUES.items():
        value = str(getattr(settings.get(key), "value", settings.get(key)))
        needed |= {f"{key}: {value}": package for pattern, package in packages.items() if re.fullmatch(pattern, value)}
    sentences = []
    reporters = settings.get("report_to") or []
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name in REPORTERS:
            needed[f"report_to: {name}"] = REPORTERS[name]
        elif name not in ("none", "all", None):
            sentences.append(f"report_to: there is no {name}.{did_you_mean(name, REPORTERS)}")
    return sentences + [
        f"{what} needs {modules[0]}, which is not installed: pip install {name}"
        for what, (modules, name) in needed.items()
        if not any(map(_installed, modules))
    ]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # half an installation
        return False
