"""Preference data made by the model itself, by the pipelines of the three papers."""

METHODS = {  # method: (module, config, pipeline)
    "leanpo": ("trl_vpo.generate.leanpo", "LeanPOGenerateConfig", "LeanPOPipeline"),
    "rrpo": ("trl_vpo.generate.rrpo", "RRPOGenerateConfig", "RRPOPipeline"),
    "lpoi": ("trl_vpo.generate.lpoi", "LPOIGenerateConfig", "LPOIPipeline"),
}
