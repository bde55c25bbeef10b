"""The embedded data set: scenes rendered from a seed, with captions, questions and ground truth."""
