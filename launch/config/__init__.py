"""The settings of a training run: dataclasses, the YAML file and its checks."""
