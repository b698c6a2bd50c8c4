"""The pipeline of each method: where its code is. Importing this table imports none of it."""

PIPELINES = {  # method: (module, config, pipeline)
    "leanpo": ("trl_vpo.generate.leanpo", "LeanPOGenerateConfig", "LeanPOPipeline"),
    "rrpo": ("trl_vpo.generate.rrpo", "RRPOGenerateConfig", "RRPOPipeline"),
    "lpoi": ("trl_vpo.generate.lpoi", "LPOIGenerateConfig", "LPOIPipeline"),
}
