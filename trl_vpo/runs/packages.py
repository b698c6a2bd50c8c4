"""Which optional packages the settings of a run need, and how those that are missing are installed."""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from trl_vpo.errors import did_you_mean

BITSANDBYTES = (("bitsandbytes",), "'trl-vpo[quantization]'")
DEEPSPEED = (("deepspeed",), "'trl-vpo[deepspeed]'")
# The modules of which one is needed, and what pip calls them.
SWITCHES = {
    "load_in_4bit": BITSANDBYTES,
    "load_in_8bit": BITSANDBYTES,
    "deepspeed": DEEPSPEED,
    "use_liger_kernel": (("liger_kernel",), "liger-kernel"),
}
OPTIMIZERS = {
    "bnb|paged|lion|ademamix|adamw_8bit": BITSANDBYTES,
    "adamw_torch_[48]bit": (("torchao",), "torchao"),
    "galore": (("galore_torch",), "galore-torch"),
    "apollo": (("apollo_torch",), "apollo-torch"),
    "lomo": (("lomo_optim",), "lomo-optim"),
    "schedule_free": (("schedulefree",), "schedulefree"),
    "grokadamw": (("grokadamw",), "grokadamw"),
    "stable_adamw": (("optimi",), "torch-optimi"),
}
ATTENTION = {  # transformers takes a kernel of the Hub where the package is not there
    "flash_attention_2": (("flash_attn", "kernels"), "flash-attn"),
    "flash_attention_3": (("flash_attn_interface", "kernels"), "kernels"),
    ".*/.*": (("kernels",), "kernels"),
}
REPORTERS = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "azure_ml": (("azureml",), "azureml-mlflow"),
    "flyte": (("flytekit",), "flytekit"),
}
NO_REPORTERS = {"none", "all"}
KNOWN_REPORTERS = {
    *REPORTERS,
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "mlflow",
    "neptune",
    "swanlab",
}
KNOWN_REPORTERS |= {"trackio", "wandb"}


def missing_packages(settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each package that the settings need and that is not installed.

    Args:
        settings: names and values of a run's arguments.
    """
    unknown = [name for name in _reporters(settings) if name not in KNOWN_REPORTERS]
    return [f"report_to: there is no {name}.{did_you_mean(name, KNOWN_REPORTERS)}" for name in unknown] + [
        f"{what} needs {modules[0]}, which is not installed: pip install {name}"
        for what, (modules, name) in _needed(settings)
        if not any(_installed(module) for module in modules)
    ]


def _needed(settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[tuple[str, ...], str]]]:
    for key, package in SWITCHES.items():
        if settings.get(key):
            yield key, package
    for key, table in (("optim", OPTIMIZERS), ("attn_implementation", ATTENTION)):
        value = settings.get(key)
        value = str(getattr(value, "value", value))
        for pattern, package in table.items():
            if re.search(pattern, value) if table is OPTIMIZERS else re.fullmatch(pattern, value):
                yield f"{key}: {value}", package
    for name in KNOWN_REPORTERS.intersection(_reporters(settings)):
        yield f"report_to: {name}", REPORTERS.get(name, ((name,), name.replace("_", "-")))


def _reporters(settings: Mapping[str, Any]) -> list[str]:
    given = settings.get("report_to") or []
    return [name for name in ([given] if isinstance(given, str) else given) if name and name not in NO_REPORTERS]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # half an installation
        return False
