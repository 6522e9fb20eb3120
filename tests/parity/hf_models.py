"""Small models for comparisons with transformers: random checkpoints of ours, exported, and run on both sides."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.cli import convert
from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.language_model import LanguageModel
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import build_model, compute_dtype
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.runtime.load import LoadedModel, load_model
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import PLAIN_STATE, MemorySource

transformers = pytest.importorskip("transformers", minversion="4.56")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 257  # bytes and the end of a document
PROMPT = "The bank of experts"
VOCABULARIES = ("embedding.word.weight", "output.weight")
#: --normalization and the rest that OLMoE asks for.
ONE_HEAD = {"num_attention_heads": 1, "group_query_attention": False, "num_query_groups": 1}


def random_source(layout: str, **options: Any) -> MemorySource:
    """Returns a model over bytes with random values in every tensor, biases, norms and coefficients too.

    Layers outweigh the embedding, so that greedy text is more than one token again and again.
    """
    config = tiny_config(layout, **{"seq_length": 64, "mock_data": True, **options})
    model = build_model(config, VOCABULARY, single_process_state(), compute_dtype(config))
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, parameter in model.global_parameters().items():
        spread = 0.02 if name.startswith("embedding") else 0.3
        noise = torch.randn(parameter.shape, generator=generator) * spread
        weights[name] = (parameter.detach() + noise).to(parameter.dtype)
        if name.endswith(".candidates"):  # experts that are open, closed, and half open
            weights[name] = torch.tensor([1.0, 0.0, 0.5, 1.0]).repeat(len(parameter) // 4)
    for name in set(weights) & set(VOCABULARIES):
        weights[name][VOCABULARY:] = 0.0  # padding is no part of the model
    if layout != "dense":
        shape = (
            sum(n.endswith("router.weight") for n in weights),
            max(place.num_experts for place in all_layers(config)),
        )
        weights["training.expert_fractions"] = torch.rand(shape, generator=generator)
    return MemorySource(weights, to_mapping(config), {**PLAIN_STATE, "vocab_size": VOCABULARY})


def loaded(root: Path) -> LoadedModel:
    """Returns one of our checkpoints as users load it."""
    return load_model(open_folder(root), single_process_state())


@torch.no_grad()
def our_logits(model: LoadedModel | Path, ids_BS: Tensor) -> Tensor:
    """Returns logits [B, S, V] of a model, or of that of a folder."""
    rank_model = (loaded(model) if isinstance(model, Path) else model).model
    result, _ = rank_model(ids_BS, ForwardContext(batch_size=len(ids_BS), training=False))
    return result.view(*ids_BS.shape, -1)[..., : rank_model.vocab_size]


@dataclass
class Native:
    """One of our checkpoints, and what it computes."""

    root: Path
    source: MemorySource
    loaded: LoadedModel

    def logits(self, ids_BS: Tensor) -> Tensor:
        """Returns logits [B, S, V]."""
        return our_logits(self.loaded, ids_BS)

    def greedy(self, length: int) -> list[int]:
        """Returns the ids that follow the prompt."""
        return LanguageModel(self.loaded).generate_ids(self.prompt, length, temperature=0.0)

    @property
    def prompt(self) -> list[int]:
        return self.loaded.tokenizer.encode(PROMPT)


def native(root: Path, source: MemorySource) -> Native:
    """Returns a source as a checkpoint on disk, loaded as users load it."""
    write_checkpoint(root, 7, source)
    return Native(root, source, loaded(root))


def run(*arguments: object) -> tuple[int, str, str]:
    """Returns the conversion tool's exit status, output and error output."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = convert.main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


def converted(load_dir: Path, save_dir: Path, *arguments: object) -> Path:
    """Converts, and returns `save_dir`."""
    status, _, err = run("--load-dir", load_dir, "--save-dir", save_dir, *arguments)
    assert status == 0, err
    return save_dir


def sent(folder: Path, layout: str, options: dict[str, Any], *words: object) -> tuple[Native, Path]:
    """Returns a random model below a folder, and its export there, for which `words` are of the conversion."""
    ours = native(folder / "native", random_source(layout, **options))
    return ours, converted(ours.root, folder / "hf", "--to", "hf", *words)


def theirs(folder: Path, **options: Any) -> Any:
    """Returns a folder's model as transformers loads it."""
    options = {"dtype": "auto", "trust_remote_code": True, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def their_logits(model: Any, ids_BS: Tensor) -> Tensor:
    """Returns logits [B, S, V] of plain causal attention."""
    return model(input_ids=ids_BS).logits


def their_greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    """Returns the ids that `generate` puts after a prompt."""
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False)
    new = ids[0, len(prompt) :].tolist()
    return new[:-1] if new[-1:] == [VOCABULARY - 1] else new


def some_ids(batch: int = 2, length: int = 40) -> Tensor:
    """Returns random ids [B, S]."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def exported(
    layout: str, options: dict[str, Any], folder: Path, *words: object, tolerance: float, length: int = 30
) -> tuple[Native, Path, Any]:
    """Exports a random model, holds what both sides compute against each other, and returns ours, the export and theirs.

    Args:
        words: of the conversion.
        tolerance: of a logit.
        length: tokens of greedy text, which must be the same; 0 for a model that our engine does not know.
    """
    ours, export = sent(folder, layout, options, *words)
    model, ids_BS = theirs(export), some_ids()
    assert (their_logits(model, ids_BS) - ours.logits(ids_BS)).abs().max() < tolerance
    if length:
        expected = ours.greedy(length)
        assert their_greedy(model, ours.prompt, length) == expected and len(set(expected)) > 3
    return ours, export, model
