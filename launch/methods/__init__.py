"""The training methods: what each trains, its settings, how it takes a step, and engines without DeepSpeed."""
