"""What people do with an exported class in TRL and peft, each held against plain forwards of one text and a formula.

It is a program of torch, transformers, TRL and peft, so that it can run under any version of these:

    python -m tests.parity.finetune_uses FOLDER [FOLDER ...]

FOLDER is a model over bytes, of our class or of a stock one. Each fault is a line, and the exit status is 1.

    torchrun --nproc-per-node 2 -m tests.parity.finetune_uses --ranks FOLDER

holds a step of several processes against one of all texts; `accelerate launch` itself starts processes on CPUs by MPI.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import torch
import torch.nn.functional as F
import transformers
import trl
from torch import Tensor

from tests.parity.class_uses import Use, differs, load, outcome, registering

END, RATE = 256, 100.0
#: Question and answer, of unequal lengths.
ROWS = [("What is 2 + 3? ", "5"), ("Say it: ", "a bank of experts"), ("1 + 1 = ", "two"), ("And? ", "or")]
#: Question, the better answer and the worse one.
PAIRS = [("2 + 3 = ", "5", "23, or so"), ("Say it. ", "experts", "no"), ("Is it so? ", "yes", "maybe it is")]
USES: dict[str, Use] = {}
use = registering(USES)


def ids_of(*texts: str) -> list[int]:
    return [*"".join(texts).encode(), END]


def log_probabilities(model: Any, question: str, answer: str) -> Tensor:
    """Returns those of an answer's tokens and of its end, by a forward of this text."""
    ids = torch.tensor(ids_of(question, answer))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[len(question) - 1 :, 0]


def answers_loss(model: Any, rows: Sequence[tuple[str, str]] = ROWS) -> Tensor:
    """Returns the mean loss of all answers' tokens."""
    return -torch.cat([log_probabilities(model, *row) for row in rows]).mean()


def balance_loss(model: Any, rows: Sequence[tuple[str, str]] = ROWS) -> Tensor:
    """Returns E * sum_e f_e s_e over the tokens of all layers: f_e how many of a token's places expert e takes, s_e its score."""
    found = [model(input_ids=torch.tensor([ids_of(*row)]), output_router_logits=True).router_logits for row in rows]
    scores_TE = torch.cat([layer for row in found for layer in row]).float().softmax(-1)
    chosen_TK = scores_TE.topk(model.config.num_experts_per_tok).indices
    f_E = F.one_hot(chosen_TK, scores_TE.shape[1]).sum(1).float().mean(0)
    return scores_TE.shape[1] * (f_E * scores_TE.mean(0)).sum()


def gradients(loss: Callable[[Any], Tensor], model: Any) -> list[Tensor]:
    loss(model).backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def has_balance_loss(model: Any) -> bool:
    return hasattr(model.config, "output_router_logits")


def new(model: Any, balance: float = 0.0, **options: Any) -> Any:
    """Returns the folder's model once more, to be trained; `balance` weighs the balance loss."""
    trained = load(model.name_or_path, **options).train()
    if has_balance_loss(model):
        trained.config.output_router_logits, trained.config.router_aux_loss_coef = balance > 0, balance
    return trained


@functools.cache
def tokenizer(folder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def configured(kind: type, folder: str, **options: Any) -> Any:
    """Returns a trainer's options: one step of plain descent, by which weights' changes are gradients."""
    quiet = {"output_dir": folder, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    step = {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 64, "gradient_checkpointing": False}
    descent = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    given = {**quiet, **step, **descent, "use_cpu": True, "bf16": False}
    # Both outlive a trainer.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return kind(**{**given, **options})


def trained_by(
    kind: type, options: type, model: Any, trained: Any, rows: list[dict[str, str]], adapter: Any, **given: Any
) -> Any:
    """Returns one of TRL's trainers after it has trained a model; `given` are options of the trainer's."""
    data = datasets.Dataset.from_list(rows)
    sets = {"train_dataset": data, "eval_dataset": data}
    words = {"processing_class": tokenizer(model.name_or_path), "peft_config": adapter}
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(model=trained, args=configured(options, folder, **given), **sets, **words)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer


def tuned(model: Any, trained: Any, adapter: Any = None, **options: Any) -> Any:
    """Returns TRL's trainer after it has trained on questions and answers."""
    rows = [{"prompt": question, "completion": answer} for question, answer in ROWS]
    return trained_by(trl.SFTTrainer, trl.SFTConfig, model, trained, rows, adapter, **options)


def stepped(model: Any, balance: float = 0.0, loaded: Iterable[tuple[str, Any]] = (), **options: Any) -> list[Tensor]:
    """Returns the gradients that TRL's step took."""
    trained = new(model, balance, **dict(loaded))
    before = [p.detach().clone() for p in trained.parameters()]
    tuned(model, trained, **options)
    return [(old - p.detach()) / RATE for old, p in zip(before, trained.parameters(), strict=True)]


def _steps(name: str, **options: Any) -> None:
    USES[f"sft_{name}"] = lambda model: (stepped(model, **options), gradients(answers_loss, new(model)))


_steps("of_padded_batches")
_steps("of_padded_batches_in_turn", per_device_train_batch_size=2, gradient_accumulation_steps=2)
_steps("of_single_texts_in_turn", per_device_train_batch_size=1, gradient_accumulation_steps=4)
_steps("of_packed_texts", packing=True)
_steps("with_checkpointing", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
_steps("with_a_device_map", loaded={"device_map": {"": "cpu"}}.items())


def _balanced(name: str, **options: Any) -> None:
    def balanced(model: Any) -> tuple[Any, Any]:
        if not has_balance_loss(model):
            return None, None
        expected = gradients(lambda m: answers_loss(m) + 0.5 * balance_loss(m), new(model))
        return stepped(model, balance=0.5, **options), expected

    USES[f"sft_balanced_{name}"] = balanced


_balanced("in_padded_batches")
_balanced("in_packed_texts", packing=True)
for reentrant in (False, True):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _balanced(f"with_checkpointing_{reentrant}", **options)


@use
def sft_in_bf16(model: Any) -> tuple[Any, Any]:
    """Losses are near those in fp32, and routers' logits of an input are the same."""
    trainer = tuned(model, new(model), bf16=True, learning_rate=0.0)
    routers = [module for module in new(model).modules() if type(module).__name__ == "Router"]
    x_TH = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [router(x_TH) for router in routers]
    exact = [router(x_TH) for router in routers]
    found, expected = trainer.state.log_history[0]["loss"], float(answers_loss(model))
    return [*rounded, torch.tensor(float(abs(found - expected) < 0.03 * expected))], [*exact, torch.tensor(1.0)]


def adapters(model: Any) -> dict[str, dict[str, Any]]:
    """Returns what LoRA is put on, by what it is."""
    names = [name for name, _ in model.named_parameters()]

    def ending(*ends: str) -> list[str]:
        return [name for name in names if name.endswith(ends)]

    packed = ending("gate_up_proj", "up_proj", "down_proj")
    found = {
        "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "own_experts": {"target_parameters": [name for name in packed if ".layers." in name]},
        "shared_experts": {"target_parameters": [name for name in packed if ".expert_pool." in name]},
        "routers": {"target_parameters": ending("router.weight")},
        "mixing_coefficients": {"target_parameters": ending("mlp.combination")},
    }
    found = {name: given for name, given in found.items() if given.get("target_parameters") != []}
    # peft wraps the module that has coefficients, and then finds nothing within: no routers with them in one adapter.
    apart = ("routers",) if "mixing_coefficients" in found else ()
    most = [name for part, given in found.items() if part not in apart for name in given.get("target_parameters", [])]
    return found | ({"most": {**found["attention"], "target_parameters": most}} if most else {})


def lora(**given: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **{"target_modules": [], **given})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids_of(*row)]), use_cache=False).logits[0] for row in ROWS])


@use
def lora_on_each_part(model: Any) -> tuple[Any, Any]:
    """An adapter begins as nothing, and TRL trains it and nothing else; saved and loaded, or merged, it computes the same."""
    got: list[Any] = []
    expected: list[Any] = []
    for part, given in adapters(model).items():
        base = new(model)
        before = {name: p.detach().clone() for name, p in base.named_parameters()}
        adapted = tuned(model, base, lora(**given), max_steps=2, learning_rate=1.0).model
        with tempfile.TemporaryDirectory() as folder:
            adapted.eval().save_pretrained(folder)
            again = peft.PeftModel.from_pretrained(new(model), folder).eval()
        changed = logits(adapted)
        difference = (changed - logits(model)).abs().max()
        merged = adapted.merge_and_unload()
        plain = {name: p for name, p in again.named_parameters() if "lora_" not in name}
        own = {name.replace(".base_layer", "").replace("base_model.model.", ""): p for name, p in plain.items()}
        kept = all(torch.equal(p, before[name]) for name, p in own.items())
        got += [logits(again), logits(merged), (part, bool(difference > 1e-3), kept, len(before))]
        expected += [changed, changed, (part, True, True, len(list(merged.parameters())))]
    return _flat(got), _flat(expected)


def _flat(values: list[Any]) -> list[Any]:
    """Returns tensors first, for `differs`; what is not one is compared here."""
    return [v if isinstance(v, Tensor) else torch.tensor([float(hash(v) % 10**6)]) for v in values]


@use
def dpo_against_the_base_under_lora(model: Any) -> tuple[Any, Any]:
    """The loss on pairs is the formula's, with the model before any adapter as reference; it begins at log 2, and falls."""
    rows = [{"prompt": q, "chosen": better, "rejected": worse} for q, better, worse in PAIRS]
    options = {"beta": 0.5, "learning_rate": 0.003, "max_steps": 3, "per_device_eval_batch_size": 3}
    adapter = lora(**list(adapters(model).values())[-1])
    trainer = trained_by(trl.DPOTrainer, trl.DPOConfig, model, new(model), rows, adapter, **options)
    found = trainer.evaluate()["eval_loss"]
    first = trainer.state.log_history[0]["loss"]
    policy = trainer.model.merge_and_unload().eval()
    with torch.no_grad():
        gains = [
            [(log_probabilities(policy, q, text) - log_probabilities(model, q, text)).sum() for text in answers]
            for q, *answers in PAIRS
        ]
        margins = [better - worse for better, worse in gains]
        expected = -F.logsigmoid(0.5 * torch.stack(margins)).mean()
    return torch.tensor([found, first, float(found < first)]), torch.tensor([expected, math.log(2), 1.0])


def versions() -> str:
    libraries = (torch, transformers, trl, peft, accelerate, datasets)
    return ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)


def ranks_differ(model: Any) -> str | None:
    """Returns what is wrong with a step in which each of several processes has an equal part of the texts; None if nothing."""
    got = stepped(model, per_device_train_batch_size=len(ROWS) // int(os.environ["WORLD_SIZE"]))
    return differs(got, gradients(answers_loss, new(model)))


def main(folders: list[str]) -> int:
    torch.set_num_threads(1)
    if folders[0] == "--ranks":
        wrong = ranks_differ(load(folders[1]))
        print(f"rank {os.environ['RANK']} of {torch.distributed.get_world_size()}: {wrong}", flush=True)
        return wrong is not None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    found = []
    for folder in folders:
        model = load(folder)
        wrong = {name: outcome(check, model) for name, check in USES.items()}
        found += [f"{Path(folder).name}: {name}: {fault}" for name, fault in wrong.items() if fault is not None]
    print(f"{versions()}: {len(USES)} uses of {len(folders)} models", *found, sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
