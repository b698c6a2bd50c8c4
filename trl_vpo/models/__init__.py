"""Models are loaded, adapted, asked, scored and merged."""
