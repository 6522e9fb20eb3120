"""A GGUF file holds what llama.cpp computes from: read back by gguf's reader and run as its source does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.gguf.tokenizer import _byte_level, _sentencepiece, vocabulary
from megatron_samoe.convert.hf.tokenizer_files import tokenizer_files
from megatron_samoe.datasets.chat_template import Chat
from megatron_samoe.errors import ConfigError
from tests.harness.tables import table
from tests.parity.hf_models import Native, converted, native, random_source, run, some_ids

TABLE = table(__file__, tuples=False)
gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

CASES: dict[str, tuple[str, str, dict[str, Any]]] = TABLE["models"]


def written(ours: Native, folder: Path, *words: object) -> Any:
    """Exports, and returns gguf's reader of the file."""
    return gguf.GGUFReader(converted(ours.root, folder, "--to", "gguf", *words) / "model.gguf")


class Reference:
    """llama.cpp's graphs in a few lines: src/models/{llama,qwen2,qwen3,qwen3moe,olmoe,qwen2moe,gpt2}.cpp."""

    def __init__(self, reader: Any):
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
        self.name = self.fields["general.architecture"]

    def field(self, name: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.name}.{name}", default)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if self.name == "gpt2":
            return F.layer_norm(x, weight.shape, weight, bias, self.field("attention.layer_norm_epsilon"))
        return F.rms_norm(x, weight.shape, weight, self.field("attention.layer_norm_rms_epsilon"))

    def rope(self, x_SAD: Tensor) -> Tensor:
        if self.name == "gpt2":
            return x_SAD
        size, length = self.field("rope.dimension_count"), len(x_SAD)
        angles = torch.arange(length)[:, None] * self.field("rope.freq_base") ** (-torch.arange(0, size, 2) / size)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        neighbours = self.name == "llama"  # LLAMA_ROPE_TYPE_NORM; others turn channels half a head apart
        a, b = (x_SAD[..., ::2], x_SAD[..., 1::2]) if neighbours else x_SAD.chunk(2, -1)
        turned = a * cos - b * sin, a * sin + b * cos
        return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)

    def attention(self, x_SH: Tensor, block: str) -> Tensor:
        heads = self.field("attention.head_count")
        kv_heads = self.field("attention.head_count_kv", heads)
        if self.name == "gpt2":
            q, k, v = self.linear(x_SH, f"{block}.attn_qkv").chunk(3, -1)
        else:
            q, k, v = (self.linear(x_SH, f"{block}.attn_{n}") for n in "qkv")
        if self.name == "olmoe":
            q, k = self.norm(q, f"{block}.attn_q_norm"), self.norm(k, f"{block}.attn_k_norm")
        size, wide = self.field("attention.key_length", -1), self.field("attention.value_length", -1)
        q, k, v = (
            t.unflatten(-1, sizes) for t, sizes in ((q, (heads, size)), (k, (kv_heads, size)), (v, (kv_heads, wide)))
        )
        if self.name in ("qwen3", "qwen3moe"):
            q, k = self.norm(q, f"{block}.attn_q_norm"), self.norm(k, f"{block}.attn_k_norm")
        q, k = self.rope(q), self.rope(k)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.linear(y[0].transpose(0, 1).flatten(1), f"{block}.attn_output")

    def mlp(self, x: Tensor, block: str, suffix: str = "") -> Tensor:
        up = self.linear(x, f"{block}.ffn_up{suffix}")
        if self.name == "gpt2":
            return self.linear(F.gelu(up, approximate="tanh"), f"{block}.ffn_down")
        gate = F.silu(self.linear(x, f"{block}.ffn_gate{suffix}"))
        return self.linear(gate * up, f"{block}.ffn_down{suffix}")

    def experts(self, x_SH: Tensor, block: str) -> Tensor:
        chosen = self.linear(x_SH, f"{block}.ffn_gate_inp").softmax(-1).topk(self.field("expert_used_count"))
        weights = chosen.values
        if self.name in ("llama", "qwen3moe"):  # norm_w of build_moe_ffn
            weights = weights / weights.sum(-1, keepdim=True)
        gate, up, down = (self.tensors[f"{block}.ffn_{n}_exps.weight"][chosen.indices] for n in ("gate", "up", "down"))
        h = F.silu(torch.einsum("sh,skfh->skf", x_SH, gate)) * torch.einsum("sh,skfh->skf", x_SH, up)
        y = torch.einsum("skf,skhf,sk->sh", h, down, weights)
        if self.name == "qwen2moe":
            mixed = torch.sigmoid(x_SH @ self.tensors[f"{block}.ffn_gate_inp_shexp.weight"])
            y = y + mixed[:, None] * self.mlp(x_SH, block, "_shexp")
        return y

    def logits(self, ids_S: Tensor) -> Tensor:
        x = self.tensors["token_embd.weight"][ids_S]
        if self.name == "gpt2":
            x = x + self.tensors["position_embd.weight"][: len(ids_S)]
        for layer in range(self.field("block_count")):
            block = f"blk.{layer}"
            x = x + self.attention(self.norm(x, f"{block}.attn_norm"), block)
            y = self.norm(x, f"{block}.ffn_norm")
            x = x + (self.experts(y, block) if self.field("expert_count") else self.mlp(y, block))
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.norm(x, "output_norm") @ head.T


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_our_logits(case: str, tmp_path: Path) -> None:
    name, layout, options = CASES[case]
    ours = native(tmp_path / "native", random_source(layout, seq_length=300, **options))
    reference = Reference(written(ours, tmp_path / "gguf"))
    assert reference.name == name and reference.field("context_length") == 300
    fields, tokens = reference.fields, reference.fields["tokenizer.ggml.tokens"]  # bytes, without merges
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(tokens) == 257 and tokens[65] == "A" and fields["tokenizer.ggml.eos_token_id"] == 256
    assert fields["tokenizer.ggml.token_type"][256] == 3 and not fields["tokenizer.ggml.add_bos_token"]
    ids_BS = some_ids(1, 300)
    torch.testing.assert_close(reference.logits(ids_BS[0]), ours.logits(ids_BS)[0], rtol=1e-4, atol=1e-4)


def test_bf16_rounds_matrices_alone(tmp_path: Path) -> None:
    ours = native(tmp_path / "native", random_source("samoe", **CASES["mixtral"][2]))
    kinds = {t.name: t.tensor_type.name for t in written(ours, tmp_path / "gguf", "--dtype", "bf16").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_up_exps.weight"] == "BF16"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    packed = next(t for t in reader.tensors if t.name == "token_embd.weight")
    words = torch.from_numpy(packed.data.copy()).view(torch.bfloat16)
    assert torch.equal(words, ours.source.weights["embedding.word.weight"][:257].bfloat16())


@pytest.mark.parametrize(("layout", "options", "named"), TABLE["refused"])
def test_what_llama_cpp_does_not_compute_is_refused_by_name(
    layout: str, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    ours = native(tmp_path / "native", random_source(layout, **options))
    status, _, error = run("--load-dir", ours.root, "--save-dir", tmp_path / "gguf", "--to", "gguf")
    assert status != 0 and "no architecture" in error and any(name in error for name in named.split("|"))
    assert not (tmp_path / "gguf").exists()


def byte_level(**changes: Any) -> dict[str, Any]:
    """Returns a tokenizer.json with one merge."""
    files = tokenizer_files(DataConfig(tokenizer_type="ByteTokenizer", mock_data=True))
    content: dict[str, Any] = json.loads(files.files["tokenizer.json"])
    content["model"]["vocab"]["Th"] = 257
    content["model"]["merges"] = [["T", "h"]]
    return {**content, **changes}


LAST = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def test_known_ways_to_cut_a_text_have_their_names() -> None:
    whole = {**LAST, "use_regex": True}
    assert _byte_level(byte_level(pre_tokenizer=whole), 256).pre == "gpt-2"
    for name, digits in (("llama-bpe", r"\p{N}{1,3}"), ("qwen2", r"\p{N}")):
        pattern = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        steps = {"type": "Sequence", "pretokenizers": [split(pattern), LAST]}
        found = _byte_level(byte_level(pre_tokenizer=steps), 256)
        assert found.pre == name and found.merges == ["T h"] and found.tokens[257] == "Th"


@pytest.mark.parametrize(("changes", "named"), TABLE["cuts"])
def test_unknown_ways_to_cut_a_text_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _byte_level(byte_level(**changes), 256)


@pytest.mark.parametrize(("options", "named"), TABLE["sentencepiece"])
def test_sentencepiece(options: dict[str, Any], named: str | None, tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("the bank of experts shares its experts with all of the layers\n" * 20)
    usual = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 290, "hard_vocab_limit": False, "minloglevel": 2}
    plain = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    settings = {**usual, **plain, **options}
    if not settings["byte_fallback"]:
        settings["vocab_size"] = 40
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), **settings)
    data = DataConfig(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "m.model"), mock_data=True
    )
    if named is not None:
        with pytest.raises(ConfigError, match=named):
            vocabulary(data, Chat())
        return
    found = vocabulary(data, Chat())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", True)
    assert found.tokens == [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert found.types[0] == 2 and found.types.count(6) == 256 and found.types[found.tokens.index("\n")] == 1
    assert [kind == 3 for kind in found.types] == [processor.is_control(i) for i in range(processor.vocab_size())]
    # Scores have the order of SentencePiece's, which is all that counts.
    joined = [i for i, piece in enumerate(found.tokens) if found.types[i] == 1 and len(piece) > 1]
    assert len(joined) > 9 and found.scores is not None
    assert sorted(joined, key=found.scores.__getitem__) == sorted(joined, key=processor.get_score)
    written = json.loads(tokenizer_files(data).files["tokenizer.json"])
    merges = written["model"]["merges"]
    for changed in (merges[1:], [*merges, merges[0]]):
        with pytest.raises(ConfigError, match="merges other than SentencePiece's"):
            _sentencepiece({**written, "model": {**written["model"], "merges": changed}}, found.eod)
    with pytest.raises(ConfigError, match=r"a Unigram model without byte fallback \(it has BPE with that\)"):
        _sentencepiece({**written, "model": {"type": "Unigram"}}, found.eod)
    with pytest.raises(ConfigError, match="what is done to a text before its BPE: Prepend, Replace"):
        _sentencepiece({**written, "pre_tokenizer": {"type": "Metaspace"}}, found.eod)


def test_without_the_package_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = native(tmp_path / "native", random_source("moe", **CASES["mixtral"][2]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, _, error = run("--load-dir", ours.root, "--save-dir", tmp_path / "gguf", "--to", "gguf")
    assert status != 0 and "megatron_samoe[gguf]" in error and not (tmp_path / "gguf").exists()
