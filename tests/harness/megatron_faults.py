"""What the plug-in for Megatron-Core could do wrong, for tests that must see it."""

from __future__ import annotations

from typing import Any


def _sum_over_the_wrong_group(shares: Any) -> None:
    for parameter in shares._shared.parameters():
        parameter.allreduce = not parameter.allreduce


def _count_once_a_stage(shares: Any) -> None:
    for parameter in shares._shared.parameters():
        parameter.shared = False


def _leave_one_copy_alone(shares: Any) -> None:
    finish = shares.finalize_model_grads

    def without_gradient(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        for parameter in shares._shared.parameters() if shares.state.pp.rank else ():
            parameter.main_grad.zero_()

    shares.finalize_model_grads = without_gradient


def _send_before_the_end(shares: Any) -> None:
    """Completes gradients after the optimizer has them."""
    finish = shares.finalize_model_grads

    def late(model: Any, *args: Any, **kwargs: Any) -> None:
        lender = shares._lender
        end = lender.finish_step
        lender.finish_step = lambda: None
        finish(model, *args, **kwargs)
        lender.finish_step = end
        end()

    shares.finalize_model_grads = late


def _combine_once(shares: Any) -> None:
    shares.forget = lambda: None


def _leave_moments(shares: Any) -> None:
    """Moves experts without what Adam keeps of them."""
    from megatron_samoe.plugins.megatron_core import candidates

    kept = candidates._kept

    def without_moments(*args: Any) -> Any:
        main, moments, begin = kept(*args)
        return main, [None for _ in moments], begin

    candidates._kept = without_moments  # type: ignore[assignment]


#: What a plug-in could do wrong, planted after the model is attached.
FAULTS: dict[str, Any] = {
    "summed over the wrong group": _sum_over_the_wrong_group,
    "counted once a stage": _count_once_a_stage,
    "one stage's copy not updated": _leave_one_copy_alone,
    "sent before the last micro-batch": _send_before_the_end,
    "a stale combination": _combine_once,
    "a lock that leaves moments": _leave_moments,
}
