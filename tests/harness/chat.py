"""A tiny chat model of transformers: random weights, a tokenizer with control tokens, and chat templates in the usual styles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.harness.program import REPOSITORY
from tests.harness.tables import table

CORPUS = REPOSITORY / "megatron_samoe/cli/quickstart_data/austen_emma_mansfield.txt"
CONTEXT = 256
TEMPLATES: dict[str, str] = table(__file__)
CHATML = TEMPLATES["chatml"]


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
