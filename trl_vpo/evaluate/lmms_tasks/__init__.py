"""Tasks in lmms-eval's format that lmms-eval does not have. `lmms_eval --include_path` takes this folder, too."""
