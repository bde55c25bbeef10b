"""The embedded data set: compositional scenes rendered from a seed, with captions, questions and exact ground truth."""
