"""What training costs: time, memory and FLOPs."""
