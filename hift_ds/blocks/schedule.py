"""The order in which steps train blocks (HiFT paper, section 3.1 and Algorithm 1: the queue Q and its strategy).

The schedule works with block indices only and does not depend on PyTorch.
"""

import random
from typing import Any

STRATEGIES = ("bottom2up", "top2down", "random")


class BlockSchedule:
    """The order in which blocks are trained, and the position in it.

    A *step* is one optimizer update. A block is trained for ``steps_per_block`` consecutive steps, then the next block
    follows. A *cycle* is ``num_blocks * steps_per_block`` steps, which train every block once.

    Args:
        num_blocks: number of blocks (k in the paper), at least 1.
        strategy: ``bottom2up`` (embeddings first), ``top2down`` (head first) or ``random`` (shuffled once, with the
            same order in all cycles).
        steps_per_block: consecutive steps on a block, at least 1.
        seed: seed of the shuffle; the other strategies ignore it.

    Attributes:
        order: block indices in the order of training.
        steps_per_block: as given.
        step: number of completed steps.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(self, num_blocks: int, strategy: str = "bottom2up", steps_per_block: int = 1, seed: int = 0):
        if num_blocks < 1 or steps_per_block < 1:
            raise ValueError(f"num_blocks={num_blocks} and steps_per_block={steps_per_block} must be at least 1")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
        order = list(range(num_blocks))
        if strategy == "top2down":
            order.reverse()
        elif strategy == "random":
            random.Random(seed).shuffle(order)
        self.order = tuple(order)
        self.steps_per_block = steps_per_block
        self.step = 0

    @property
    def steps_per_cycle(self) -> int:
        """Number of steps in a cycle."""
        return len(self.order) * self.steps_per_block

    @property
    def active_block(self) -> int:
        """Index of the block that the next step trains."""
        return self.block_at(self.step)

    @property
    def following_block(self) -> int:
        """Index of the block that the step after the next one trains, if the next one is applied."""
        return self.block_at(self.step + 1)

    @property
    def cycle(self) -> int:
        """Number of completed cycles."""
        return self.step // self.steps_per_cycle

    def block_at(self, step: int) -> int:
        """Return the index of the block that step number ``step`` (from 0) trains."""
        return self.order[step // self.steps_per_block % len(self.order)]

    def advance(self) -> bool:
        """Count one applied step, and return whether it completed a cycle."""
        self.step += 1
        return self.step % self.steps_per_cycle == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the order and the position in it."""
        return {"order": list(self.order), "steps_per_block": self.steps_per_block, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            ValueError: the position was saved with another order or ``steps_per_block``.
        """
        saved = (tuple(state["order"]), state["steps_per_block"])
        if saved != (self.order, self.steps_per_block):
            raise ValueError(
                f"the checkpoint was saved with block order {saved[0]} and steps_per_block={saved[1]}, this run has "
                f"{self.order} and {self.steps_per_block}; resume with the layers_per_block, max_block_numel, "
                "balance, strategy, seed, freeze and steps_per_block it was saved with"
            )
        self.step = state["step"]
