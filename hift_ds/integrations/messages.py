"""What errors and warnings of the integrations say."""

from typing import Any

NO_ENGINE = (
    "nothing called deepspeed.initialize with an optimizer and a model whose parameters require gradients, so HiFT "
    "trains nothing. Let the script use DeepSpeed: "
    "TrainingArguments(deepspeed='config.json') for transformers and TRL; Accelerator(deepspeed_plugin=...) or "
    "`accelerate launch --use_deepspeed`, without cpu=True, for accelerate; strategy='deepspeed_stage_2' for Lightning"
)

MODEL_INIT = (
    "the Trainer makes another model in train(), because it has a model_init, and a callback holds for the model that "
    "the Trainer had before. Leave HiFTCallback out, and put the call into a block: with hift_ds.enabled(...): "
    "trainer.train()"
)

KEPT_ENGINE = (
    "the Trainer keeps the DeepSpeed engine of its first train() or evaluate(), and cannot train with it again, with "
    "HiFT or without. Make a new Trainer for each train(); to evaluate before training, set "
    "TrainingArguments(eval_on_start=True), or use another Trainer"
)


def too_short(engine: Any, run: str) -> str:
    """Return the warning about a run that is shorter than a cycle.

    Args:
        engine: a HiFT engine.
        run: the run and its number of steps.
    """
    return (
        f"{run}, and a cycle over all {len(engine.blocks)} blocks takes {engine.steps_per_cycle}: the other blocks are "
        "not trained. Train longer, or put more layers into a block (layers_per_block)"
    )
