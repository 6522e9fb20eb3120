"""What people do with an exported class in transformers, each held against plain forwards of one text without a cache; how it trains
is in `finetune_uses`.

It is a program of torch and transformers, so that it can run under any version of these:

    python class_uses.py FOLDER STOCK [FOLDER STOCK ...]

FOLDER is a model of the class; STOCK is one of a stock class. What the stock class cannot do either in a version is left
out, and said. Each fault is a line, and the exit status is 1.
"""

from __future__ import annotations

import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

NEW, PAD, UNUSED = 9, 0, 256
SHORT, LONG = [84, 104, 101, 32, 98, 97], [32, 101, 120, 112, 101, 114, 116, 115, 32, 111, 102, 7, 9, 40]
Use = Callable[[Any], tuple[Any, Any]]
USES: dict[str, Use] = {}


def registering(uses: dict[str, Use]) -> Callable[[Use], Use]:
    """Returns what registers a function that returns a result and the expected one."""
    return lambda function: uses.setdefault(function.__name__, function)


use = registering(USES)


def load(folder: str | Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, **{"trust_remote_code": True, "dtype": torch.float32, **options}
    ).eval()


@torch.no_grad()
def plain_logits(model: Any, ids: list[int]) -> Tensor:
    """Returns logits [S, V] of one text."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def plain_greedy(model: Any, ids: list[int], count: int = NEW) -> list[int]:
    """Returns the `count` ids that follow, each by a forward of all before it."""
    text = list(ids)
    for _ in range(count):
        text.append(int(plain_logits(model, text)[-1].argmax()))
    return text[len(ids) :]


def batch(side: str = "left") -> dict[str, Tensor]:
    """Returns two texts of unequal length, padded, with the positions that `generate` gives them."""
    filler = [PAD] * (len(LONG) - len(SHORT))
    pad, text = [0] * len(filler), [1] * len(SHORT)
    ids = [filler + SHORT if side == "left" else SHORT + filler, LONG]
    mask = torch.tensor([pad + text if side == "left" else text + pad, [1] * len(LONG)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": torch.tensor(ids), "attention_mask": mask, "position_ids": positions}


def generated(model: Any, drop: int = len(LONG), **options: Any) -> list[list[int]]:
    """Returns what `generate` puts after the two texts, padded on the left."""
    greedy = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": None}
    given: dict[str, Any] = {**batch(), "position_ids": ..., **greedy, **options}
    return model.generate(**{name: value for name, value in given.items() if value is not ...})[:, drop:].tolist()


@functools.cache
def both_greedy(model: Any) -> list[list[int]]:
    return [plain_greedy(model, SHORT), plain_greedy(model, LONG)]


def single(ids: list[int]) -> dict[str, Any]:
    """Returns one text as `generate` takes it, and how much of the result it is."""
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "drop": len(ids),
    }


def of_texts(logits_BSV: Tensor, mask_BS: Tensor) -> Tensor:
    return logits_BSV[mask_BS.bool()]


def both_logits(model: Any) -> Tensor:
    return torch.cat([plain_logits(model, SHORT), plain_logits(model, LONG)])


def _padding(side: str) -> None:
    @torch.no_grad()
    def padding(model: Any) -> tuple[Any, Any]:
        return of_texts(model(**batch(side)).logits, batch(side)["attention_mask"]), both_logits(model)

    USES[f"padding_on_the_{side}"] = padding


for side in ("left", "right"):
    _padding(side)


@use
@torch.no_grad()
def packed_texts(model: Any) -> tuple[Any, Any]:
    """Two texts in one row, told apart by their positions, do not see each other."""
    positions = torch.cat((torch.arange(len(SHORT)), torch.arange(len(LONG))))[None]
    logits_BSV = model(input_ids=torch.tensor([SHORT + LONG]), position_ids=positions, use_cache=False).logits
    return logits_BSV[0], both_logits(model)


@use
@torch.no_grad()
def a_mask_of_queries_and_keys(model: Any) -> tuple[Any, Any]:
    """It is taken as all that a query may see; where layers differ, there is one for each kind."""
    full = torch.ones(len(LONG), len(LONG), dtype=torch.bool).tril()[None, None]
    window = getattr(model.config, "sliding_window", None)
    masks = {"full_attention": full, "sliding_attention": full.triu(1 - (window or len(LONG)))}
    kinds = set(getattr(model.config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"]))
    mask = masks if len(kinds) > 1 else masks[kinds.pop()]
    return model(input_ids=torch.tensor([LONG]), attention_mask=mask).logits[0], plain_logits(model, LONG)


def _in_two_parts(model: Any, given: dict[str, Tensor], cut: int = 9) -> Tensor:
    """Returns logits [B, S, V] by two forwards, the second of which has the first one's cache."""
    first = model(**{name: value[:, :cut] for name, value in given.items()}, use_cache=True)
    cache = getattr(first, "past_key_values", None)
    rest = {name: value if name == "attention_mask" else value[:, cut:] for name, value in given.items()}
    second = model(**rest, past_key_values=first.cache if cache is None else cache)
    return torch.cat((first.logits, second.logits), 1)


@use
@torch.no_grad()
def text_in_two_parts(model: Any) -> tuple[Any, Any]:
    """Without positions, which follow from the cache."""
    return _in_two_parts(model, {"input_ids": torch.tensor([LONG])})[0], plain_logits(model, LONG)


@use
@torch.no_grad()
def padded_text_in_two_parts(model: Any) -> tuple[Any, Any]:
    return of_texts(_in_two_parts(model, batch()), batch()["attention_mask"]), both_logits(model)


def _generation(name: str, **options: Any) -> None:
    USES[name] = lambda model: (generated(model, **options), both_greedy(model))


_generation("greedy")
_generation("greedy_without_a_cache", use_cache=False)
_generation("greedy_in_parts", prefill_chunk_size=4)
_generation("sampling_the_best_alone", do_sample=True, top_k=1)
for kind in ("static", "offloaded", "offloaded_static", "dynamic"):
    _generation(f"greedy_with_a_{kind}_cache", cache_implementation=kind)


@use
def greedy_of_embeddings(model: Any) -> tuple[Any, Any]:
    embedded = model.get_input_embeddings()(batch()["input_ids"]).detach()
    return generated(model, drop=0, input_ids=..., inputs_embeds=embedded), both_greedy(model)


@use
def greedy_with_eager_attention(model: Any) -> tuple[Any, Any]:
    return generated(load(model.name_or_path, attn_implementation="eager")), both_greedy(model)


def _beams(cache: str | None) -> None:
    """Beams of a padded batch with a cache are those of each text by itself without."""

    def beams(model: Any) -> tuple[Any, Any]:
        options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
        alone = [generated(model, **single(ids), use_cache=False, **options) for ids in (SHORT, LONG)]
        expected = [row for rows in alone for row in rows]
        return generated(model, **options, **({} if cache is None else {"cache_implementation": cache})), expected

    USES[f"beams_with_{cache or 'the usual'}_cache"] = beams


for each in (None, "static"):
    _beams(each)


@use
def assisted(model: Any) -> tuple[Any, Any]:
    """A draft that is often wrong: what it adds is taken back."""
    draft = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            scale = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * scale)
    return generated(model, **single(LONG), eos_token_id=UNUSED, assistant_model=draft), [plain_greedy(model, LONG)]


@use
def assisted_by_the_prompt(model: Any) -> tuple[Any, Any]:
    text = LONG + LONG[:5]
    found = generated(model, **single(text), eos_token_id=UNUSED, prompt_lookup_num_tokens=3)
    return found, [plain_greedy(model, text)]


@use
def continued_from_its_cache(model: Any) -> tuple[Any, Any]:
    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None, "max_new_tokens": NEW}
    first = model.generate(torch.tensor([LONG]), return_dict_in_generate=True, **options)
    further = torch.cat((first.sequences, torch.tensor([[5, 6, 7]])), 1)
    out = model.generate(further, past_key_values=first.past_key_values, **options)
    return out[0, further.shape[1] :].tolist(), plain_greedy(model, further[0].tolist())


@use
def generating_while_it_could_train(model: Any) -> tuple[Any, Any]:
    """With checkpointing switched on, as trainers leave it; dropout is 0."""
    trained = copy.deepcopy(model).train()
    trained.gradient_checkpointing_enable()
    trained.eval()
    return generated(trained), both_greedy(model)


@use
def on_disk(model: Any) -> tuple[Any, Any]:
    """Every module but those that accelerate keeps whole in this test is read from a file around its forward."""
    import accelerate

    with tempfile.TemporaryDirectory() as folder:
        split = accelerate.disk_offload(copy.deepcopy(model), folder, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in split.parameters())
        return plain_logits(split, LONG), plain_logits(model, LONG)


def differs(got: Any, expected: Any) -> str | None:
    """Returns what differs, or None."""
    if isinstance(expected, list) and expected and isinstance(expected[0], Tensor):
        if len(got) != len(expected):
            return f"{len(got)} gradients, expected {len(expected)}"
        return next(filter(None, map(differs, got, expected)), None)
    if not isinstance(expected, Tensor):
        return None if got == expected else f"{got}, expected {expected}"
    # Gradients of fp32 in another order of sums.
    off = (got - expected).abs().max().item() / max(expected.abs().max().item(), 1e-3)
    return None if off < 1e-4 else f"off by {off:.1e} of the largest"


def outcome(check: Use, model: Any) -> str | None:
    """Returns what is wrong with a use, or None."""
    try:
        return differs(*check(model))
    except ImportError as error:
        return f"not tried: {error}"
    except Exception as error:  # any error is what a user would meet
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def faults(folder: str, stock: str) -> Iterator[str]:
    """Yields a line for each use that the class fails."""
    model, control = load(folder), load(stock)
    for name, check in USES.items():
        wrong = outcome(check, model)
        if wrong is None:
            continue
        also = outcome(check, control)
        if also is not None:
            print(f"left out, since the stock class fails too: {name}: {also}")
        else:
            yield f"{Path(folder).name}: {name}: {wrong}"


def main(paths: list[str]) -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = [line for folder, stock in zip(paths[::2], paths[1::2], strict=True) for line in faults(folder, stock)]
    print(f"transformers {transformers.__version__}: {len(USES)} uses of {len(paths) // 2} models", *found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
