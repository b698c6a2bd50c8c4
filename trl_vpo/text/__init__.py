"""Phrases, inflection, the words of answers and what they say, similarity, and objects that are mentioned."""
