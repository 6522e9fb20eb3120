"""Processes that decode for contestants.py: each loads one model once and is asked for measurements.

A worker prints `@@` and a JSON object when it is ready, then one for each line `batch prompt_length new_tokens` that it
reads: seconds until every sequence has its first token, seconds of the rest, and the tokens of the first sequence. Ours
takes a fourth number: count the experts that are hit, which makes times useless.
llama.cpp's bindings come from PyPI (llama-cpp-python) and may live in an environment of their own; this file needs
nothing else there.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spec = dict[str, Any]
Measure = Callable[..., Spec]
#: Of the repository.
ROOT = str(Path(__file__).parents[2])


def prompts(batch: int, length: int, vocab: int) -> list[list[int]]:
    """Returns prompts that are the same for all contestants, whatever their Python."""
    chance = random.Random(12345)
    return [[int(chance.random() * (vocab - 2)) for _ in range(length)] for _ in range(batch)]


def join_control_group(limit: int) -> None:
    """Puts this process into a control group that may hold so many bytes of what is read from here on: mapped weights, above all.
    What it has allocated before does not count. The group goes when the process has ended and another is made."""
    root = Path("/sys/fs/cgroup")
    one = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    folder, file = one
    try:
        for old in folder.glob("samoe-decode-*"):
            if not (old / "cgroup.procs").read_text().strip():
                old.rmdir()
        group = folder / f"samoe-decode-{os.getpid()}"
        group.mkdir()
        (group / file).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise SystemExit(f"--memory-limit needs the right to make control groups in {folder}: {error}") from None


def never(*_: int) -> Spec:
    """What a refused contestant measures."""
    raise AssertionError("nobody asks a contestant that was refused")


def ours(spec: Spec) -> tuple[Spec, Measure]:
    """The engine of this package over a checkpoint."""
    from megatron_samoe.convert.opener import open_folder
    from megatron_samoe.errors import ConfigError
    from megatron_samoe.inference import Engine, Request, SamplingOptions, load_model
    from megatron_samoe.inference.single_runner import SingleRunner
    from megatron_samoe.ops import extension
    from megatron_samoe.parallel_state import backend, single_process_state

    backend.set_num_threads(spec["threads"])
    loaded = load_model(open_folder(spec["checkpoint"]), single_process_state(), combine=False)
    context = min(loaded.config.model.max_positions, spec["context"])
    try:
        sizes: Spec = {"max_tokens": spec["max_batch"] * context, "max_step_tokens": spec["step_tokens"]}
        options: Spec = {name: spec.get(name) for name in ("max_batch", "serving", "dtype", "weights_folder")}
        engine = Engine(loaded, **options, **sizes)
    except ConfigError as error:
        return {"refused": str(error)}, never
    vocab = loaded.model.vocab_size
    kernels = extension.build_info().get("instruction_set", "torch")
    runner = engine._runner
    assert isinstance(runner, SingleRunner)
    weights, layers = runner._model.weights(), runner._model.layers
    caches = [t for layer in layers for t in (layer.attention.keys, layer.attention.values)]
    weights_mb = (sum(t.nbytes for t in weights) - sum(t.nbytes for t in caches)) / 1e6
    info = {"serving": engine.serving, "dtype": engine.dtype, "version": kernels, "weights_mb": weights_mb}
    del loaded, weights, caches
    if spec.get("memory_limit"):
        join_control_group(spec["memory_limit"])

    def measure(batch: int, length: int, new: int, count: int = 0) -> Spec:
        counts: list[int] = []
        if count:
            runner.observer = lambda _, ids_TK: counts.append(len(set(ids_TK.flatten().tolist())))
        cache = runner.expert_cache
        before = (cache.num_hits, cache.num_misses) if cache else (0, 0)
        started = time.perf_counter()
        options = SamplingOptions(new, temperature=0.0, ignore_eod=True)
        first_id, *_ = (engine.submit(Request(ids, options)) for ids in prompts(batch, length, vocab))
        begun, tokens, first_token_s = 0, [], 0.0
        while engine.has_work:
            for event in engine.step():
                begun += 1
                if event.request_id == first_id:
                    tokens.append(event.token_id)
            if begun >= batch and not first_token_s:
                first_token_s = time.perf_counter() - started
                counts.clear()
        rest_s = time.perf_counter() - started - first_token_s
        result: Spec = {"first_s": first_token_s, "rest_s": rest_s, "tokens": tokens}
        runner.observer = None
        if counts:
            result["distinct"] = sum(counts) / len(counts)
        if cache:
            result["hits"], result["misses"] = cache.num_hits - before[0], cache.num_misses - before[1]
        return result

    return info, measure


def transformers(spec: Spec) -> tuple[Spec, Measure]:
    """`generate` of transformers over the exported model."""
    import torch
    import transformers as hf

    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(spec["threads"])
    dtype = torch.bfloat16 if spec["dtype"] == "bf16" else torch.float32
    implementation = spec.get("implementation", "default")
    options: Spec = {} if implementation == "default" else {"experts_implementation": implementation}
    options["trust_remote_code"] = True  # our own class lies in the folder
    model = hf.AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype, **options).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    vocab = model.config.vocab_size

    def generate(ids: Any, new: int) -> tuple[float, Any]:
        started = time.perf_counter()
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        with torch.inference_mode():
            y = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        return time.perf_counter() - started, y

    def measure(batch: int, length: int, new: int) -> Spec:
        ids = torch.tensor(prompts(batch, length, vocab))
        first_s, _ = generate(ids, 1)
        whole_s, y = generate(ids, new)
        return {"first_s": first_s, "rest_s": whole_s - first_s, "tokens": y[0, length:].tolist()}

    experts = getattr(model.config, "_experts_implementation", "")
    return {"version": hf.__version__, "experts": experts}, measure


def llama_cpp(spec: Spec) -> tuple[Spec, Measure]:
    """llama.cpp over a GGUF file, driven by the same loop: whole prompts, then a token for each sequence."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(spec["file"].encode(), options)
    assert model, "llama.cpp does not load the file"
    wanted = lib.llama_context_default_params()
    wanted.n_ctx, wanted.n_seq_max = spec["context"] * spec["max_batch"], spec["max_batch"]
    wanted.n_batch, wanted.n_ubatch = spec["step_tokens"], min(512, spec["step_tokens"])
    wanted.n_threads = wanted.n_threads_batch = spec["threads"]
    context = lib.llama_init_from_model(model, wanted)
    assert context, "llama.cpp makes no context"
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch_of = lib.llama_batch_init(spec["step_tokens"], 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        for start in range(0, len(rows), spec["step_tokens"]):
            part = rows[start : start + spec["step_tokens"]]
            batch_of.n_tokens = len(part)
            for j, (token, position, sequence, wants) in enumerate(part):
                batch_of.token[j], batch_of.pos[j], batch_of.n_seq_id[j] = token, position, 1
                batch_of.seq_id[j][0], batch_of.logits[j] = sequence, wants
            status = lib.llama_decode(context, batch_of)
            assert status == 0, f"llama_decode gave {status}"

    def measure(batch: int, length: int, new: int) -> Spec:
        assert batch * length <= spec["step_tokens"], "prompts must fit into one batch"
        ids = prompts(batch, length, vocab)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        started = time.perf_counter()
        decode([(t, i, s, i == length - 1) for s in range(batch) for i, t in enumerate(ids[s])])
        last = [lib.llama_get_logits_ith(context, length * (s + 1) - 1) for s in range(batch)]
        current = [int(np.ctypeslib.as_array(row, (vocab,)).argmax()) for row in last]
        first_s, tokens = time.perf_counter() - started, [current[0]]
        for i in range(1, new):
            decode([(current[s], length + i - 1, s, True) for s in range(batch)])
            logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (batch, vocab))
            current = logits.argmax(1).tolist()
            tokens.append(current[0])
        return {"first_s": first_s, "rest_s": time.perf_counter() - started - first_s, "tokens": tokens}

    return {"version": lib.__version__}, measure


def quantize(source: str, target: str) -> None:
    """Writes llama.cpp's file in its 8 bits (q8_0), by llama.cpp itself."""
    import ctypes

    import llama_cpp as lib

    lib.llama_backend_init()
    options = lib.llama_model_quantize_default_params()
    options.ftype = lib.LLAMA_FTYPE_MOSTLY_Q8_0
    status = lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    assert status == 0, f"llama_model_quantize gave {status}"


PROGRAMS = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}


def main() -> None:
    """Serves measurements until standard input ends, or quantizes a GGUF file."""
    sys.path[0] = ROOT  # not this folder, whose files have names of others
    if sys.argv[1] == "quantize":
        quantize(sys.argv[2], sys.argv[3])
        return
    spec = json.loads(sys.argv[1])
    info, measure = PROGRAMS[spec["program"]](spec)
    for batch, length in [] if "refused" in info else spec["warm_up"]:
        measure(batch, length, 3)
    print("@@" + json.dumps(info), flush=True)
    for line in sys.stdin:
        print("@@" + json.dumps(measure(*map(int, line.split()))), flush=True)


if __name__ == "__main__":
    main()
