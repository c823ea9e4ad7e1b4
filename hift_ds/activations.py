"""Activation checkpointing that goes with training one block at a time."""

import warnings
from typing import Any


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer in the backward pass, of a Hugging Face model, and only from the active block up.

    transformers' own switch also makes the outputs of the embeddings require gradients, for adapters in frozen models.
    Backward would then go through all the frozen layers below the active block, and keep what they need. That is taken
    back here, and the form of checkpointing chosen that can do without (the non-reentrant one).

    Raises:
        ValueError: the model does not support activation checkpointing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method's next name
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
