"""The former name of `convert`, and of what `fit` has of surgery."""

from megatron_samoe.moved import modules_moved

__path__ = modules_moved(
    __name__,
    {
        **{kind: f"convert.{kind}" for kind in ("hf", "megatron", "gguf")},
        "vllm": "plugins.vllm",
        **{name: f"convert.{name}" for name in ("edited_model", "layer_experts", "output_folder")},
        **{f"convert_{name}": f"convert.{name}" for name in ("target", "read_ahead")},
        **{f"inspect_{name}": f"convert.inspect.{name}" for name in ("health", "numbers", "sharing")},
        **dict.fromkeys(("convert_source", "inspect_open"), "convert.opener"),
        "hf.native": "convert.native",
        "pool_surgery": "fit.surgery.pool",
        "unpool_surgery": "fit.surgery.select",
        "student_surgery": "fit.surgery.student",
        "upcycle": "fit.surgery.upcycle",
        "bank_fit": "fit.bank_fit",
        "gram": "fit.gram",
    },
)
