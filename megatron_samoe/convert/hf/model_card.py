"""The README.md of an exported model."""

from __future__ import annotations

from megatron_samoe.convert.edited_model import moe_layers
from megatron_samoe.convert.hf.export_plan import ExportPlan
from megatron_samoe.dist_checkpointing.global_tensors import name_of
from megatron_samoe.moe.scores import score_of
from megatron_samoe.planning.accounting import count_parameters

_USE = """```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{trust})
{tokenizer_use}```
"""


def model_card(plan: ExportPlan) -> str:
    """Returns the text: what the model is, how it is loaded, how it was trained as far as the checkpoint says."""
    native, family = plan.native, plan.target.family
    count = count_parameters(native.config, native.vocab_size)
    own = family.name == "samoe"
    with_tokenizer = plan.tokenizer is not None and "tokenizer.json" in plan.tokenizer.files
    trust = ", trust_remote_code=True" if own else ""  # for the tokenizer too: it reads the configuration's class
    use = _USE.format(
        tokenizer_import=", AutoTokenizer" if with_tokenizer else "",
        trust=trust,
        tokenizer_use=_TOKENIZER_USE.format(trust=trust) if with_tokenizer else "",
    )
    state = plan.source.train_state
    rows = {
        "class": family.architecture,
        "parameters": f"{count.total:,}",
        "of experts": f"{count.expert:,}",
        "active per token": f"{count.active:,}",
        "layers, hidden size": f"{native.model.num_layers}, {native.model.hidden_size}",
        "vocabulary": f"{native.vocab_size:,}",
        "longest sequence": f"{native.model.max_positions:,}",
        "experts": _experts(plan),
        "dtype": name_of(plan.dtype),
        "trained": f"{state.get('iteration', 0):,} steps, {state.get('consumed_tokens', 0):,} tokens",
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    front = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- {family.name}\n- megatron_samoe\n---\n"
    why = "".join(f"- {line}\n" for line in plan.target.why)
    return (
        f"{front}\n# A {native.moe.expert_layout} language model\n\nTrained with megatron_samoe and exported from its "
        f"checkpoint.\n\n| | |\n|---|---|\n{table}\n{use}\nThe class was chosen so:\n\n{why}"
    )


_TOKENIZER_USE = """tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
"""


def _experts(plan: ExportPlan) -> str:
    moe, layers = plan.native.moe, sum(plan.native.is_moe)
    if not layers:
        return "none"
    shared = f", shared: {moe.sharing}" if moe.shares_experts else ""
    if moe.has_pool:
        shared += f", {moe.num_expert_banks} banks"
    counts = " or ".join(map(str, sorted({place.num_experts for place in moe_layers(plan.native.config)})))
    return f"{counts} in each of {layers} layers, {score_of(moe).topk} per token{shared}"
