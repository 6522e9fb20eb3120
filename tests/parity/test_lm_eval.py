"""Sample-by-sample agreement with lm-evaluation-harness on the exported Hugging Face model.

The harness's own model class runs the exported model, and its own task files read the same rows in the Hub's form, which is
made here without the package's readers. Besides made-up rows, all items of the real files of MEGATRON_SAMOE_EVAL_DATA are
compared where it is given.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_samoe.config import PretrainConfig
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.datasets.train_tokenizer import train_byte_bpe
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.zero_shot.harness_model import harness_model
from megatron_samoe.evaluation.zero_shot.predictors import ModelPredictor
from megatron_samoe.evaluation.zero_shot.results import evaluate_task
from megatron_samoe.evaluation.zero_shot.tasks import FOLDER, TaskLoader, local_data
from megatron_samoe.language_model import load
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.runtime.load import load_model
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.setup import build_setup, initial_state
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout
from tests.unit.evaluation.zero_shot_data import lines

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
pytest.importorskip("lm_eval.api.model")
pytest.importorskip("lm_eval.tasks")
pytestmark = pytest.mark.parity
DATA = os.environ.get("MEGATRON_SAMOE_EVAL_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEGATRON_SAMOE_EVAL_DATA names no folder with the real data sets")
TABLE = table(__file__)
#: The harness's own task files.
STOCK: dict[str, str] = {**TABLE["stock"], "multirc": str(FOLDER / "own_tasks/multirc.yaml")}
#: Tasks with real files, and their items.
REAL: dict[str, int] = TABLE["real"]
#: Made-up rows as the Hub has them.
ROWS: dict[str, Any] = {
    **TABLE["rows"],
    "openbookqa": [{**row, "question_stem": row["question"]} for row in TABLE["rows"]["arc_easy"]],
}
WORDS = "the cat sat on a mat while 3 dogs, or more: ran äround it. So it is said"
#: Of models of made-up rows, whose contexts are cut, and of real ones: the harness's class takes no longer continuations.
SEQ_LENGTH, LONG = 64, 1536
#: Samples of a task and its figures.
Found = tuple[list[dict[str, Any]], dict[str, float]]


def as_the_hub_has_it(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of a real file in the Hub's form."""
    if task == "lambada_openai":
        return {"text": f"{row['context']} {row['continuation']}"}
    if task == "piqa":
        first, second = row["choices"]
        goal = row["query"].removeprefix("Question: ").removesuffix("\n")
        return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}
    if task == "winogrande":
        first, second = row["context_options"]
        number = next(n for n, (a, b) in enumerate(zip(f"{first}.", f"{second}!", strict=False)) if a != b)
        same = first[: first.rfind(" ", 0, number) + 1]
        options = {"option1": first.removeprefix(same), "option2": second.removeprefix(same)}
        return {"sentence": f"{same}_ {row['continuation']}", **options, "answer": str(row["gold"] + 1)}
    if task in ("arc_easy", "openbookqa"):
        names = list("ABCDE")[: len(row["choices"])]
        question = row["query"].removeprefix("Question: ")
        choices = {"text": row["choices"], "label": names}
        return {"question": question, "question_stem": question, "choices": choices, "answerKey": names[row["gold"]]}
    return row


def real_rows(task: str) -> list[dict[str, Any]]:
    (path,) = Path(DATA).glob(f"{task}*.jsonl.xz")
    with lzma.open(path, "rt") as file:
        return [as_the_hub_has_it(task, json.loads(line)) for line in file]


def theirs(model: Any, task: str, rows: list[dict[str, Any]], folder: Path) -> Found:
    """Returns the samples and figures of the harness's own task file, which reads the rows in the Hub's form."""
    data = folder / f"{task}_hub.jsonl"
    data.write_text(lines(*rows))
    task_file = str(Path(lm_eval.__file__).parent / "tasks" / STOCK[task])
    files = {"dataset_kwargs": {"data_files": {"validation": str(data)}}}
    content = {"include": task_file, "task": f"local_{task}", **TABLE["of local rows"], **files}
    path = folder / f"{task}.yaml"
    path.write_text(yaml.safe_dump(content))
    loaded = lm_eval.tasks.TaskManager(include_defaults=False).load([str(path)])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=1234)
    found = lm_eval.evaluate(model, loaded, bootstrap_iters=0)
    figures = {
        name.removesuffix(",none"): value for name, value in found["results"][f"local_{task}"].items() if "," in name
    }
    return in_order(found["samples"][f"local_{task}"]), figures


def in_order(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def assert_agree(task: str, found: Found, expected: Found) -> None:
    """Asserts that prompts, answers and what counts as right are the same, item by item, and the figures."""
    assert len(found[0]) == len(expected[0]) > 0
    for name, value in found[1].items():
        known = name.replace(" (", ",").rstrip(")")
        assert task == "multirc" or value == pytest.approx(expected[1][known], rel=1e-4), "multirc's figures are ours"
    for a, b in zip(found[0], expected[0], strict=True):
        assert a["arguments"] == b["arguments"] and a["target"] == b["target"] and a["metrics"] == b["metrics"]
        for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
            assert x == y if isinstance(x, str) else (x[0] == pytest.approx(y[0], rel=1e-4) and x[1] == y[1])
        for name in a["metrics"]:
            assert a[name] == (pytest.approx(b[name], rel=1e-4) if isinstance(b[name], float) else b[name]), name


def save(config: PretrainConfig) -> None:
    setup = build_setup(config, 300, initialize_model_parallel(config.parallel))
    with torch.no_grad():
        for name, parameter in setup.model.global_parameters().items():
            if "norm" not in name:  # larger than at the start of training, so that predictions differ much
                parameter.mul_(3)
    save_run(setup, initial_state(setup))


@pytest.fixture(scope="module")
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PretrainConfig, Any]]:
    """A checkpoint by its configuration, and the harness's own class on the exported model."""
    from lm_eval.models.huggingface import HFLM

    folder, seq_length = tmp_path_factory.mktemp("model"), getattr(request, "param", SEQ_LENGTH)
    text = [WORDS, "Question: Answer: yes no True False"] * 50
    path, _ = train_byte_bpe(iter(text), 300, str(folder / "tokenizer"))
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": path}
    sizes = {"seq_length": seq_length, "max_position_embeddings": seq_length}
    config = tiny_config("samoe", style="llama", mock_data=True, save=str(folder / "run"), **own, **sizes)
    run_ranks(save, 1, with_layout(config))
    load(folder / "run").save_pretrained(folder / "hf")
    their_model = HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=1, trust_remote_code=True)
    assert their_model.max_length == seq_length
    with pytest.MonkeyPatch.context() as patch:
        # Of 64 tokens none is left before an answer of the 256 that are usual; our adapter takes half of a short model.
        patch.setattr(HFLM, "max_gen_toks", seq_length // 2)
        yield config, their_model


def ours(config: PretrainConfig, tasks: str, data_dir: Path) -> dict[str, Found]:
    """Returns the results of our own command's functions, on every rank."""
    parallel = initialize_model_parallel(config.parallel)
    asked = TaskLoader(data_dir).load(tasks)
    answering = harness_model(load_model(open_folder(config.checkpoint.save), parallel, config.parallel))
    results = [result for task in asked for result in evaluate_task(task, answering)]
    return {r.task: (in_order(list(r.samples)), {name: m.value for name, m in r.metrics.items()}) for r in results}


LAYOUTS: list[tuple[int, dict[str, Any]]] = [(4, {"tp": 2, "ep": 2}), (1, {}), (2, {"pp": 2})]


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", first_by_day([LAYOUTS[:1], LAYOUTS[1:]]))
def test_made_up_rows(
    model: tuple[PretrainConfig, Any], layouts: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    config, their_model = model
    for task in STOCK:
        (tmp_path / f"{local_data()[task].files[0]}.jsonl").write_text(lines(*ROWS[task]))
    expected = {task: theirs(their_model, task, ROWS[task], tmp_path) for task in STOCK}
    assert len({sample["filtered_resps"][0][0] for sample in expected["boolq"][0]}) == 6
    for sample in expected["multirc"][0]:  # by a task file of our own: the harness's has the labels the wrong way round
        assert sample["arguments"][sample["target"]][1] == (" yes" if sample["doc"]["label"] else " no")
    for num_ranks, layout in layouts:
        for found in run_ranks(ours, num_ranks, with_layout(config, **layout), ",".join(STOCK), tmp_path):
            for task in STOCK:
                assert_agree(task, found[task], expected[task])


@needs_data
@pytest.mark.parametrize("model", [LONG], indirect=True)
@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=[pytest.mark.night] if items > 110 else []) for task, items in REAL.items()]
)
def test_all_items_of_real_files(model: tuple[PretrainConfig, Any], task: str, tmp_path: Path) -> None:
    config, their_model = model
    rows = real_rows(task)
    assert len(rows) == REAL[task]
    expected = theirs(their_model, task, rows, tmp_path)
    for num_ranks, layout in LAYOUTS[:2]:
        found = run_ranks(ours, num_ranks, with_layout(config, **layout), task, Path(DATA), timeout_s=3600)[-1]
        assert_agree(task, found[task], expected)


def test_generation_through_the_adapter(model: tuple[PretrainConfig, Any]) -> None:
    from lm_eval.api.instance import Instance

    loaded = load(model[0].checkpoint.save or "").loaded
    options: list[dict[str, Any]] = [
        {"until": ["e"], "max_gen_toks": 5},
        {"until": "x"},
        {"until": [], "max_gen_toks": 3, "temperature": 0.0},
        {"do_sample": True},
    ]
    requests = [Instance("generate_until", {}, (f"Prompt {n}\n", option), 0) for n, option in enumerate(options)]
    predictor = ModelPredictor(loaded)
    ends = ((("e",), 5), (("x",), SEQ_LENGTH // 2), ((), 3))
    expected = [predictor.generate([f"Prompt {n}\n"], *end) for n, end in enumerate(ends)]
    adapter = harness_model(loaded)
    assert adapter.generate_until(requests[:3]) == [made[0][0] for made in expected]
    with pytest.raises(ConfigError, match="only greedy generation is offered"):
        adapter.generate_until(requests)


def test_rolling_windows(model: tuple[PretrainConfig, Any]) -> None:
    from lm_eval.api.instance import Instance

    texts = ["short", "exactly " * 16, WORDS * 9, "a"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    adapter = harness_model(load(model[0].checkpoint.save or "").loaded)
    expected = model[1].loglikelihood_rolling(requests)
    assert adapter.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-4)
