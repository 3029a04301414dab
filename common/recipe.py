"""The Recipe protocol: all that the train loop asks of a paper."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import optax

from common.metrics import Metrics

# Called with the current TrainState; yields (name, value) pairs. Owns its data and its jitted functions.
EvalFn = Callable[[Any], Iterable[tuple[str, float]]]


class Recipe(Protocol):
    """A training method as pure functions; a frozen dataclass implements it. See jepa/recipe.py."""

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer, its schedules included."""
        ...

    def init(self, key: jax.Array) -> Any:
        """Trainable parameters, a nested dict."""
        ...

    def init_extra(self, params: Any) -> dict:
        """Other state than the parameters, such as an EMA target. {} for none."""
        ...

    def loss(
        self, params: Any, extra: dict, batch: dict, key: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The scalar loss of one batch and its metrics. `key` is the step's own."""
        ...

    def update_extra(self, extra: dict, params: Any, step: jax.Array) -> dict:
        """`extra` after an update; `step` counts from 0, `params` are the new ones."""
        ...

    def param_axes(self, abstract: Any) -> Any:
        """Logical axes of every parameter."""
        ...

    def extra_axes(self, abstract: Any) -> Any:
        """Logical axes of everything in `extra`."""
        ...

    def log(self, opt_state: Any, step: jax.Array, /) -> dict[str, jax.Array]:
        """Scalars of update `step` for the log, such as its learning rate: scheduled, or learned and in the optimizer's
        state after the update. Runs inside the jitted step."""
        ...
