"""Models that can be trained, sampled and scored."""
