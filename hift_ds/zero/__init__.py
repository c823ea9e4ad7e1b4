"""One DeepSpeed optimizer for each block, by ZeRO stage."""
