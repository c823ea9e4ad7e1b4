"""What HiFT reports through the Trainer of transformers while it trains."""

from collections.abc import Callable
from typing import Any

from deepspeed.utils import logger
from transformers.trainer_callback import TrainerCallback

from hift_ds.engine import HiFTEngine
from hift_ds.integrations.messages import KEPT_ENGINE, NO_ENGINE, too_short
from hift_ds.optim.rates import needs_metrics


class TrainerReports(TrainerCallback):
    """Follows the engine of a Trainer while it trains; an open interception adds it to the Trainer.

    Args:
        engine_of: returns the engine that was made of a model, or None.
        kept: the engine that the Trainer has before it trains, or None.
    """

    _engine: Any = None
    _advanced_at = 0  # the step after which a metric last advanced the schedule
    _others: tuple[str, ...] = ()  # the metrics of evaluations after a step, if the schedule's is not among them

    def __init__(self, engine_of: Callable[[Any], Any], kept: Any = None):
        self._engine_of = engine_of
        self._kept = kept

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find the engine; it is an error if there is none. Warn if the run is shorter than a cycle."""
        self._engine = self._engine_of(model)
        if self._kept is not None and self._engine in (None, self._kept):
            raise RuntimeError(f"the Trainer trains without a new engine: {KEPT_ENGINE}")
        if self._engine is None:
            raise RuntimeError(f"the Trainer trains without a HiFT engine: {NO_ENGINE}")
        if isinstance(self._engine, HiFTEngine) and state.max_steps < self._engine.steps_per_cycle:
            logger.warning(too_short(self._engine, f"the run takes {state.max_steps} steps"))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the learning rate, block and cycle of the last step to the log."""
        if isinstance(self._engine, HiFTEngine) and logs is not None:
            values = self._engine.log_values()
            logs.update(values)
            state.log_history[-1].update(values)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Advance a schedule that follows a metric, where DeepSpeed owns it: the Trainer advances only its own."""
        schedule = getattr(self._engine, "lr_scheduler", None)
        if schedule is None or not needs_metrics(schedule) or not metrics or state.global_step == 0:
            return
        if (name := _followed(args)) in metrics:
            schedule.step(metrics[name])
            self._advanced_at, self._others = state.global_step, ()
        elif self._advanced_at != state.global_step:  # with several sets to evaluate, another one may have the metric
            self._others += tuple(one for one in metrics if one.startswith("eval_"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise an error if the schedule's metric was in none of the evaluations after the last step."""
        if self._others:
            raise KeyError(
                f"metric_for_best_model={args.metric_for_best_model!r}: the schedule "
                f"{type(self._engine.lr_scheduler).__name__} follows {_followed(args)!r}, which is no "
                f"metric; set metric_for_best_model to one of {', '.join(self._others)}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let all parameters require gradients as before."""
        if isinstance(self._engine, HiFTEngine):
            self._engine.unfreeze()


def _followed(args: Any) -> str:
    """Return the name of the metric that a schedule follows, as the Trainer finds it."""
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"
