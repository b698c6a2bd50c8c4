"""The pipeline of each method: where its code is. Importing this table imports none of it."""

from importlib import import_module

PIPELINES = {  # method: (module, config, pipeline)
    "leanpo": ("trl_vpo.generate.leanpo", "LeanPOGenerateConfig", "LeanPOPipeline"),
    "rrpo": ("trl_vpo.generate.rrpo", "RRPOGenerateConfig", "RRPOPipeline"),
    "lpoi": ("trl_vpo.generate.lpoi", "LPOIGenerateConfig", "LPOIPipeline"),
}


def pipeline_help(method: str, everything: bool) -> str:
    """Return the help of a method's pipeline: the keys of its recipes."""
    from trl_vpo.runs.help import CONFIG, HELP_ALL, LAUNCH, help_page

    module, name, _ = PIPELINES[method]
    config = getattr(import_module(module), name)
    usage = f"trl-vpo generate {method} --config RECIPE [--key value ...]"
    return help_page(usage, [config], (method, config), first=(CONFIG, *LAUNCH, HELP_ALL), everything=everything)
