"""The former name of `fit.compress`, and of what `fit` has of its parts."""

from megatron_samoe.moved import modules_moved

_STAGES = (
    *("baselines", "fitting", "healing", "judge", "options"),
    *("pipeline", "report", "sharing_plan", "stage_folder", "text"),
)
__path__ = modules_moved(
    __name__,
    {
        **{name: f"fit.compress.{name}" for name in _STAGES},
        **{name: f"fit.{name}" for name in ("calibration", "expert_math", "matching")},
        "compressed_model": "fit.shared_model",
        "weighted_fit": "fit.bank_fit",
    },
)
