"""A warning where routers stay collapsed."""

from __future__ import annotations

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.log import logger
from megatron_samoe.moe.scores import score_of
from megatron_samoe.optimizer.schedule import training_length, warmup_length
from megatron_samoe.training.hook import Hook, Training
from megatron_samoe.training.router_health import RouterHealth
from megatron_samoe.training.train_step import StepResult

#: A warning names a layer whose load entropy stays below the first for the second's number of steps after warm-up.
LOW_ENTROPY, PATIENCE_STEPS = 0.5, 20


class RouterWatch(Hook):
    """Warns once when a layer's load entropy stays low after warm-up, and again if it recovers and falls anew."""

    rank_0_only = True

    def __init__(self, config: PretrainConfig):
        self.config = config
        self.warmup = warmup_length(config.optimizer, training_length(config.training))
        self.low_steps: dict[int, int] = {}

    def post_step(self, run: Training, result: StepResult) -> None:
        if result.routing is not None:
            in_samples = self.config.training.train_samples is not None
            done = run.state.consumed_samples if in_samples else run.state.iteration
            self.step(run.state.iteration, result.routing.health, done)

    def step(self, iteration: int, health: RouterHealth, done: int | None = None) -> None:
        """Takes in the health of the step that ended with `iteration` steps done.

        Args:
            done: progress in the unit of the warm-up, where that is not steps.
        """
        if (iteration if done is None else done) <= self.warmup:
            return
        low = {layer for layer, entropy in enumerate(health.load_entropy) if entropy < LOW_ENTROPY}
        self.low_steps = {layer: self.low_steps.get(layer, 0) + 1 for layer in low}
        due = [layer for layer, steps in sorted(self.low_steps.items()) if steps == PATIENCE_STEPS]
        if due:
            named = ", ".join(f"{layer} ({health.load_entropy[layer]:.2f})" for layer in due)
            logger.warning(
                f"iteration {iteration}: the routers of MoE layers {named} have sent most tokens to few experts for "
                f"{PATIENCE_STEPS} steps (load entropy under {LOW_ENTROPY}; 1 is even). Try {self._advice()}."
            )

    def _advice(self) -> str:
        moe = self.config.moe
        advice = []
        if moe.moe_router_load_balancing_type == "none" or moe.moe_aux_loss_coeff == 0:
            advice.append("--moe-router-load-balancing-type seq_aux_loss with --moe-aux-loss-coeff 0.01")
        else:
            advice.append(f"a larger --moe-aux-loss-coeff (now {moe.moe_aux_loss_coeff:g})")
        if score_of(moe).topk == 1:
            advice.append("--moe-router-topk 2 with experts of half the width")
        if moe.moe_z_loss_coeff == 0:
            advice.append("--moe-z-loss-coeff 0.001")
        return ", ".join([*advice, "a longer warm-up or a lower --lr"])
