"""The settings of a run: reading the YAML file, and checking it section by section and as a whole."""
