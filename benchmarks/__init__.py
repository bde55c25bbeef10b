"""Speed and memory of our hot paths vs the usual way. Run from the repository: python -m benchmarks [NAME ...]"""
