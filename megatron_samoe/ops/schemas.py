"""The schemas of the compiled ops, as this Python code calls them. A library with other schemas was built from other
sources and is not used.

Each op is one line, as in cpp_ext/bindings. A test compares the table with the library of the same sources.
"""

from __future__ import annotations

import torch

SCHEMAS = """
instruction_set() -> str
topk_gate(Tensor logits, int topk, bool sigmoid, bool pre_softmax, int num_groups, Tensor? key=None) -> (Tensor probs, Tensor ids, Tensor counts, Tensor score_sum, Tensor z_sum, Tensor logsumexp)
topk_gate_backward(Tensor logits, Tensor logsumexp, Tensor probs, Tensor ids, Tensor? dprobs, Tensor? dscore_sum, Tensor? dz, bool sigmoid, bool pre_softmax, int num_groups) -> Tensor
make_permutation(Tensor ids, int num_experts) -> (Tensor slot_of_row, Tensor row_of_slot, Tensor counts, Tensor ends)
permute(Tensor x, Tensor slot_of_row, int topk) -> Tensor
unpermute(Tensor rows, Tensor? probs, Tensor row_of_slot) -> Tensor
unpermute_backward(Tensor dy, Tensor rows, Tensor probs, Tensor slot_of_row, Tensor row_of_slot) -> (Tensor drows, Tensor dprobs)
combine_banks(Tensor coefficients, Tensor banks, Tensor(a!) out) -> ()
combine_banks_backward(Tensor coefficients, Tensor banks, Tensor dweights, Tensor(a!) dbanks) -> Tensor
cross_entropy_parts(Tensor logits, Tensor labels, int first_id) -> (Tensor peak, Tensor sum, Tensor target)
cross_entropy_backward(Tensor logits, Tensor labels, int first_id, Tensor logsumexp, Tensor dloss) -> Tensor
grouped_mlp(Tensor x, int[] rows, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, bool gated, bool keep_hidden) -> (Tensor y, Tensor hidden)
grouped_mlp_backward(Tensor dy, Tensor x, Tensor hidden, int[] rows, Tensor w1, Tensor w2, Tensor? b1, bool gated, Tensor(a!) dw1, Tensor(b!) dw2, Tensor(c!)? db1, Tensor(d!)? db2) -> Tensor
swiglu(Tensor hidden) -> Tensor
swiglu_backward(Tensor dactivation, Tensor hidden) -> (Tensor dhidden, Tensor activation)
adamw(Tensor(a!)[] masters, Tensor(b!)[] weights, Tensor[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, float lr, float beta1, float beta2, float eps, float weight_decay, int step, float grad_scale) -> ()
decode_linear(Tensor x, Tensor w, Tensor? scale, Tensor? bias, Tensor(a!) out, bool accumulate) -> ()
decode_norm(Tensor x, Tensor weight, Tensor? bias, float epsilon, bool rms, Tensor(a!) out) -> ()
decode_attention_block(Tensor(a!) x, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor qkv_w, Tensor? qkv_scale, Tensor? qkv_bias, Tensor[] head_norms, Tensor? cos, Tensor? sin, Tensor positions, Tensor slots, Tensor pages, Tensor(b!) keys, Tensor(c!) values, Tensor out_w, Tensor? out_scale, Tensor? out_bias, Tensor(d!) scratch) -> ()
decode_experts(Tensor x, Tensor ids, Tensor probs, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2, Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated, Tensor(a!) y, bool combine, Tensor(b!) out, Tensor(c!) scratch) -> ()
decode_route(Tensor x, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor router, Tensor? norm_scale, Tensor? router_bias, Tensor? candidates, Tensor? mixing, Tensor? mixing_bias, bool sigmoid, bool pre_softmax, int num_groups, int group_topk, float factor, Tensor(a!) normed, Tensor(b!) ids, Tensor(c!) probs, Tensor(d!)? shared, Tensor(e!) scratch) -> ()
decode_moe_block(Tensor(a!) x, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor? router, int topk, bool sigmoid, bool pre_softmax, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2, Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated, Tensor(b!) scratch) -> ()
decode_plan(Tensor words, Tensor? words_scale, Tensor? positions, Tensor output, Tensor? output_scale, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor? cos, Tensor? sin, Tensor x, Tensor scratch, int max_logits) -> int
decode_plan_attention(int plan, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor qkv_w, Tensor? qkv_scale, Tensor? qkv_bias, Tensor[] head_norms, Tensor keys, Tensor values, Tensor out_w, Tensor? out_scale, Tensor? out_bias) -> ()
decode_plan_mlp(int plan, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor? router, Tensor? norm_scale, Tensor? router_bias, Tensor? candidates, Tensor? mixing, Tensor? mixing_bias, bool sigmoid, bool pre_softmax, int num_groups, int group_topk, float factor, int topk, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2, Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated) -> ()
decode_plan_shared(int plan, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2, Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated) -> ()
decode_plan_step(int plan, Tensor tokens, Tensor positions, Tensor slots, Tensor pages, Tensor rows, Tensor(a!) logits) -> ()
decode_plan_close(int plan) -> ()
combine_rows(Tensor[] banks, Tensor?[] scales, Tensor coefficients, Tensor(a!) out, Tensor(b!)? out_scale) -> ()
newton_schulz(Tensor x, int num_steps, float a, float b, float c, float epsilon, float factor, Tensor(a!) out) -> ()
has_bf16_product() -> bool
set_products(str bf16, int fp32_tokens, int bf16_tokens) -> ()
build_sample_index(Tensor lengths, Tensor documents, int seq_length, Tensor(a!) starts) -> ()
build_blending_index(Tensor weights, Tensor limits, Tensor(a!) dataset_index, Tensor(b!) dataset_sample_index) -> ()
gather_samples(Tensor bin, Tensor pointers, Tensor lengths, Tensor documents, Tensor starts, int[] samples, int dtype_code, Tensor(a!) out) -> (int, int)
shuffle_legacy(Tensor(a!) values, Tensor(b!) key, int position) -> int
all_to_all_address(int handle) -> str
all_to_all_connect(int handle, str[] addresses) -> str
all_to_all_start(int handle, Tensor input, Tensor(a!) output, int[] send_offsets, int[] send_bytes, int[] recv_offsets, int[] recv_bytes, float seconds) -> (int exchange, str state)
all_to_all_finish(int handle, int exchange, float seconds) -> str
all_to_all_abort(int handle, str reason) -> ()
all_to_all_close(int handle) -> ()
shm_create(int rank, int world, int spins, float timeout_s) -> int
shm_stage_rows(int handle, Tensor x, Tensor index, int divisor, float seconds) -> (Tensor rows, str state)
nccl_problem() -> str
nccl_library() -> str
nccl_create(int rank, int world, Device device, int stream, float timeout_s) -> int
nccl_start_even(int handle, Tensor input, Tensor(a!) output) -> (int exchange, str state)
nccl_start_hops(int handle, Tensor input, Tensor(a!) output, Tensor(b!) staging, int[] first_sends, int[] first_receives, int[] second_sends, int[] second_receives) -> (int exchange, str state)
nccl_use_staging(int handle, Tensor staging, float seconds) -> str
nccl_enqueue(int handle, float seconds) -> str
nccl_position(int handle) -> (int started, int waiting, str error)
"""  # noqa: E501


def _expected() -> dict[str, torch._C.FunctionSchema]:
    schemas = [torch._C.parse_schema(f"megatron_samoe::{line}") for line in SCHEMAS.strip().splitlines()]
    return {schema.name: schema for schema in schemas}


def registered() -> dict[str, torch._C.FunctionSchema]:
    """Returns the schemas of this namespace's ops that torch knows, by name."""
    return {
        schema.name: schema
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("megatron_samoe::") and not schema.name.endswith("all_to_all_rows")
    }


def difference() -> str:
    """Returns in words how the loaded library differs from the table; empty where it does not."""
    found = registered()
    for name, schema in _expected().items():
        if name not in found:
            return f"it lacks the op {name.split('::')[1]}"
        if str(found[name]) != str(schema):
            return f"its op {name.split('::')[1]} has another form"
    return ""
