"""A tiny chat model of transformers: random weights, a tokenizer with control tokens, and chat templates in the usual styles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.harness.program import REPOSITORY

CORPUS = REPOSITORY / "megatron_samoe/cli/quickstart_data/austen_emma_mansfield.txt"
CONTEXT = 256
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
#: What templates do: a default system prompt, turns that must alternate, dates, namespaces, JSON, thoughts cut off, loop controls.
TEMPLATES = {
    "chatml": CHATML,
    "alternating": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set told = messages[0]['content'] | trim + '\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate: user, assistant.') }}{% endif %}
{% if loop.first %}{% set text = told + message['content'] %}{% else %}{% set text = message['content'] %}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + text | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}""",
    "thinking": """{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou answer. ' ~ strftime_now('%Y') ~ '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if '</think>' in content and loop.index0 < ns.last %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + message.role }}
{% generation %}{{ content }}{{- '<|im_end|>' }}{% endgeneration %}

{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>' }}{%- endif %}""",
    "odd": """{% for message in messages if message.content %}{% if loop.index > 3 %}{% break %}{% endif %}
{{ message | tojson }}{{ eos_token }}
{% endfor %}{{ documents is none and tools is none }}{{ messages | map(attribute='role') | join('<') }}{{ pad_token }}""",
}


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """Returns a tokenizer of transformers: byte-level BPE, three control tokens, and <think> and </think> as tokens of their own."""
    import tokenizers
    import transformers

    made = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator([CORPUS.read_text()[:60_000]], 400, special_tokens=special, show_progress=False)
    names = {"bos_token": special[0], "pad_token": special[0], "eos_token": special[2]}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, model_max_length=CONTEXT, **names)
    theirs.add_tokens(["<think>", "</think>"])
    theirs.chat_template = template
    return theirs


def chat_folder(folder: Path, template: str | None = CHATML, eos: int | list[int] | None = None) -> Path:
    """Saves a Llama of random weights over `chat_tokenizer` as transformers does, and returns its folder."""
    import torch
    import transformers

    words = chat_tokenizer(template)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(words)}
    ends = {"bos_token_id": 0, "eos_token_id": words.eos_token_id}
    config = transformers.LlamaConfig(**sizes, **ends, initializer_range=0.3)
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [words.eos_token_id, 0] if eos is None else eos
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
