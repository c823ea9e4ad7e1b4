"""Which block a step trains: integers only, so that it can be proved and saved by itself.

Source: the paper, Algorithm 1 (the queue Q and its update strategy) and section 3.1.
"""

import random
from typing import Any

STRATEGIES = ("bottom2up", "top2down", "random")


class BlockSchedule:
    """The order in which blocks are trained, and the position in it.

    A *step* is one optimizer update. Each block is trained for ``steps_per_block`` consecutive steps;
    a *cycle* is ``num_blocks * steps_per_block`` steps, in which every block had its turn once.

    Args:
        num_blocks: how many blocks the model was cut into (k in the paper), at least 1.
        strategy: ``bottom2up`` (embeddings first), ``top2down`` (head first) or ``random``
            (shuffled once with ``seed``, and kept for all cycles).
        steps_per_block: consecutive steps on a block before the next one's turn, at least 1.
        seed: of the shuffle; has no effect on the other strategies.
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
        return len(self.order) * self.steps_per_block

    @property
    def active_block(self) -> int:
        """Index of the block that the next step trains."""
        return self.block_at(self.step)

    @property
    def cycle(self) -> int:
        """Completed cycles."""
        return self.step // self.steps_per_cycle

    def block_at(self, step: int) -> int:
        """Index of the block that step number ``step`` (from 0) trains."""
        return self.order[step // self.steps_per_block % len(self.order)]

    def advance(self) -> bool:
        """Record one applied step; True where it completed a cycle."""
        self.step += 1
        return self.step % self.steps_per_cycle == 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "steps_per_block": self.steps_per_block, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            ValueError: the saved run used another order, so that its position means nothing here.
        """
        saved = (tuple(state["order"]), state["steps_per_block"])
        if saved != (self.order, self.steps_per_block):
            raise ValueError(
                f"the checkpoint was saved with block order {saved[0]} and steps_per_block={saved[1]}, this run has "
                f"{self.order} and {self.steps_per_block}; resume with the layers_per_block, max_block_numel, "
                "balance, strategy, seed, freeze and steps_per_block it was saved with"
            )
        self.step = state["step"]
