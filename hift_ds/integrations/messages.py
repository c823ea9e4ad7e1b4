"""What the errors of integrations say."""

NO_ENGINE = (
    "nothing called deepspeed.initialize with an optimizer, so HiFT trains nothing. Let the script use DeepSpeed: "
    "TrainingArguments(deepspeed='config.json') for transformers and TRL; Accelerator(deepspeed_plugin=...) or "
    "`accelerate launch --use_deepspeed`, without cpu=True, for accelerate; strategy='deepspeed_stage_2' for Lightning"
)
