"""The training methods: HiFT, full fine-tuning, adapters, MeZO and other packages."""
