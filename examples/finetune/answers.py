#!/usr/bin/env python3
"""Teaches an exported model to answer questions in a format: LoRA by TRL and peft, on questions made from a text.

    megatron-samoe convert --load-dir runs/quickstart/moe/checkpoints --save-dir hf --to hf --hf-model-type samoe
    python examples/finetune/answers.py hf tuned
    megatron-samoe convert --load-dir tuned --save-dir tuned-native

A question shows a passage of a book and asks which book it is from. Passages of the test are from each book's last tenth, which
training does not see. The answer's tokens alone count in the loss. The adapter is merged, and the folder `tuned` has the
model, its tokenizer and the template by which messages become a prompt.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}\nAnswer:{% endif %}{% endfor %}"
)
#: Words of a passage, and the most tokens of an answer.
WORDS, ANSWER = 40, 16


def quickstart_books() -> dict[str, str]:
    """Returns the quickstart's two novels by title."""
    from megatron_samoe.cli.quickstart import NOVELS

    emma, _, mansfield_park = NOVELS.read_text(encoding="utf-8").partition("MANSFIELD PARK")
    return {"Emma": emma, "Mansfield Park": mansfield_park}


def questions(books: dict[str, list[str]], count: int, seed: int) -> list[dict[str, Any]]:
    """Returns conversations of a question and its answer; `books` are their words by title."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        title = draw.choice(list(books))
        start = draw.randrange(len(books[title]) - WORDS)
        question = f"Which book is this from? {' '.join(books[title][start : start + WORDS])}"
        answer = f"It is from {title}."
        found.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return found


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: list[dict[str, Any]]) -> list[str]:
    """Returns the model's greedy answers."""
    prompts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False) for row in asked]
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    given = {name: given[name].to(model.device) for name in ("input_ids", "attention_mask")}
    ids = model.eval().generate(**given, max_new_tokens=ANSWER, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def report(when: str, trainer: SFTTrainer, tokenizer: Any, test: list[dict[str, Any]]) -> None:
    """Prints the loss of the test's answers, how many are right, and three of them."""
    loss = trainer.evaluate()["eval_loss"]
    said = answers(trainer.model, tokenizer, test)
    right = sum(text == row["completion"][0]["content"] for text, row in zip(said, test, strict=True))
    print(f"{when}: loss {loss:.3f} on the answers of {len(test)} new questions, {right} answered right", flush=True)
    for text, row in list(zip(said, test, strict=True))[:3]:
        words = row["prompt"][0]["content"].split()
        print(f"    {' '.join(words[:12])} ... -> {text.splitlines()[0] if text else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of `megatron-samoe convert --to hf`")
    parser.add_argument("out", help="folder to be made for the tuned model")
    parser.add_argument(
        "--books", nargs="+", type=Path, help="text files, named as the answers; the quickstart's novels if none"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--questions", type=int, default=50, help="of the test")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()
    texts = {p.stem: p.read_text(encoding="utf-8") for p in given.books} if given.books else quickstart_books()
    books = {title: text.split() for title, text in texts.items()}
    seen = {title: words[: len(words) * 9 // 10] for title, words in books.items()}
    unseen = {title: words[len(words) * 9 // 10 :] for title, words in books.items()}
    train, test = questions(seen, 8 * given.steps, seed=1), questions(unseen, given.questions, seed=2)

    tokenizer = AutoTokenizer.from_pretrained(given.model, trust_remote_code=True)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(given.model, trust_remote_code=True, dtype=torch.float32)

    def fits(row: dict[str, Any]) -> bool:
        """Returns whether a question and its answer are within the model's context; a passage of rare words may not be."""
        ids = tokenizer.apply_chat_template(row["prompt"], return_dict=False)
        return len(ids) + ANSWER <= model.config.max_position_embeddings

    train, test = list(filter(fits, train)), list(filter(fits, test))
    # Experts are packed in parameters of three dims, own ones and banks; coefficients that mix banks have three as well.
    experts = [name for name, p in model.named_parameters() if p.dim() == 3 and not name.endswith("combination")]
    adapter = LoraConfig(
        r=given.rank,
        lora_alpha=2 * given.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=experts,
        task_type="CAUSAL_LM",
    )
    options = SFTConfig(
        output_dir=given.out,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=50,
        max_steps=given.steps,
        learning_rate=given.lr,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(model, options, train_dataset=Dataset.from_list(train), eval_dataset=Dataset.from_list(test),
                         processing_class=tokenizer, peft_config=adapter)  # fmt: skip
    trainer.model.print_trainable_parameters()
    report("before", trainer, tokenizer, test)
    trainer.train()
    report("after", trainer, tokenizer, test)
    trainer.model.merge_and_unload().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
