"""HiFT inside training code that calls ``deepspeed.initialize`` itself: transformers, TRL, accelerate, Lightning."""
