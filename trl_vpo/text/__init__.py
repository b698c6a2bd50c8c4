"""Read and compare English text: phrases, inflection, answers, similarity, mentioned objects."""
