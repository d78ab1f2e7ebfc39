"""The HOPE predictor as plain PyTorch modules: no process groups, no configuration loading, no files."""
