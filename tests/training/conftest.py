"""Fixtures that several files of this folder use."""

from resume_runs import runs, straight  # noqa: F401
