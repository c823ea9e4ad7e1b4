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
        step: number of completed steps, as if all cycles had had this number of steps.

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

    @staticmethod
    def steps_left(state: dict[str, Any]) -> int:
        """Return the number of steps from a saved position to the end of its cycle; 0: a cycle is complete."""
        return -state["step"] % (len(state["order"]) * state["steps_per_block"])

    def is_same(self, state: dict[str, Any]) -> bool:
        """Whether a saved position has this order and ``steps_per_block``."""
        return (tuple(state["order"]), state["steps_per_block"]) == (self.order, self.steps_per_block)

    def load_state_dict(self, state: dict[str, Any], same_blocks: bool = True) -> None:
        """Continue from a saved position. With other blocks, order or ``steps_per_block``, a new cycle begins.

        Args:
            state: what :meth:`state_dict` returned.
            same_blocks: the indices in the order are those of the same blocks.

        Raises:
            ValueError: they differ, in the middle of a cycle.
        """
        if same_blocks and self.is_same(state):
            self.step = state["step"]
            return
        if left := self.steps_left(state):
            raise ValueError(
                f"the position was saved {left} steps before the end of a cycle, with other blocks, another order or "
                "another steps_per_block, which can only change with a new cycle"
            )
        cycles = state["step"] // (len(state["order"]) * state["steps_per_block"])
        self.step = cycles * self.steps_per_cycle
