"""The methods that make preference data, where their code lies. Importing this imports none of it."""

METHODS = {  # method: (module, config, pipeline)
    "leanpo": ("trl_vpo.generate.leanpo", "LeanPOGenerateConfig", "LeanPOPipeline"),
    "rrpo": ("trl_vpo.generate.rrpo", "RRPOGenerateConfig", "RRPOPipeline"),
    "lpoi": ("trl_vpo.generate.lpoi", "LPOIGenerateConfig", "LPOIPipeline"),
}
