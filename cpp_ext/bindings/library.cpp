// The schemas of the ops, once; kernels join per backend in the other files of this directory.
#include <string>

#include "../kernels/kernels.h"
#include "torch_abi.h"

namespace {
std::string instruction_set() { return samoe::cpu::kernels().instruction_set; }
}  // namespace

STABLE_TORCH_LIBRARY(megatron_samoe, m) {
  m.def("instruction_set() -> str");
  m.def(
      "topk_gate(Tensor logits, int topk, bool sigmoid, bool pre_softmax, int num_groups, Tensor? key=None)"
      " -> (Tensor probs, Tensor ids, Tensor counts, Tensor score_sum, Tensor z_sum, Tensor logsumexp)");
  m.def(
      "topk_gate_backward(Tensor logits, Tensor logsumexp, Tensor probs, Tensor ids, Tensor? dprobs,"
      " Tensor? dscore_sum, Tensor? dz, bool sigmoid, bool pre_softmax, int num_groups) -> Tensor");
  m.def(
      "make_permutation(Tensor ids, int num_experts)"
      " -> (Tensor slot_of_row, Tensor row_of_slot, Tensor counts, Tensor ends)");
  m.def("permute(Tensor x, Tensor slot_of_row, int topk) -> Tensor");
  m.def("unpermute(Tensor rows, Tensor? probs, Tensor row_of_slot) -> Tensor");
  m.def(
      "unpermute_backward(Tensor dy, Tensor rows, Tensor probs, Tensor slot_of_row, Tensor row_of_slot)"
      " -> (Tensor drows, Tensor dprobs)");
  m.def("combine_banks(Tensor coefficients, Tensor banks, Tensor(a!) out) -> ()");
  m.def("combine_banks_backward(Tensor coefficients, Tensor banks, Tensor dweights, Tensor(a!) dbanks) -> Tensor");
  m.def("cross_entropy_parts(Tensor logits, Tensor labels, int first_id) -> (Tensor peak, Tensor sum, Tensor target)");
  m.def("cross_entropy_backward(Tensor logits, Tensor labels, int first_id, Tensor logsumexp, Tensor dloss) -> Tensor");
  m.def(
      "grouped_mlp(Tensor x, int[] rows, Tensor w1, Tensor w2, Tensor? b1, Tensor? b2, bool gated, bool keep_hidden)"
      " -> (Tensor y, Tensor hidden)");
  m.def(
      "grouped_mlp_backward(Tensor dy, Tensor x, Tensor hidden, int[] rows, Tensor w1, Tensor w2, Tensor? b1, bool gated,"
      " Tensor(a!) dw1, Tensor(b!) dw2, Tensor(c!)? db1, Tensor(d!)? db2) -> Tensor");
  m.def("swiglu(Tensor hidden) -> Tensor");
  m.def("swiglu_backward(Tensor dactivation, Tensor hidden) -> (Tensor dhidden, Tensor activation)");
  m.def(
      "adamw(Tensor(a!)[] masters, Tensor(b!)[] weights, Tensor[] grads, Tensor(c!)[] exp_avgs,"
      " Tensor(d!)[] exp_avg_sqs, float lr, float beta1, float beta2, float eps, float weight_decay, int step,"
      " float grad_scale) -> ()");
  m.def(
      "newton_schulz(Tensor x, int num_steps, float a, float b, float c, float epsilon, float factor, Tensor(a!) out)"
      " -> ()");
  m.def(
      "decode_linear(Tensor x, Tensor w, Tensor? scale, Tensor? bias, Tensor(a!) out, bool accumulate) -> ()");
  m.def("decode_norm(Tensor x, Tensor weight, Tensor? bias, float epsilon, bool rms, Tensor(a!) out) -> ()");
  m.def(
      "decode_attention_block(Tensor(a!) x, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms,"
      " Tensor qkv_w, Tensor? qkv_scale, Tensor? qkv_bias, Tensor[] head_norms, Tensor? cos, Tensor? sin,"
      " Tensor positions, Tensor slots, Tensor pages, Tensor(b!) keys, Tensor(c!) values, Tensor out_w,"
      " Tensor? out_scale, Tensor? out_bias, Tensor(d!) scratch) -> ()");
  m.def(
      "decode_experts(Tensor x, Tensor ids, Tensor probs, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1,"
      " Tensor? b1, Tensor w2, Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated, Tensor(a!) y,"
      " bool combine, Tensor(b!) out, Tensor(c!) scratch) -> ()");
  m.def(
      "decode_route(Tensor x, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor router,"
      " Tensor? norm_scale, Tensor? router_bias, Tensor? candidates, Tensor? mixing, Tensor? mixing_bias, bool sigmoid, bool pre_softmax,"
      " int num_groups, int group_topk, float factor, Tensor(a!) normed, Tensor(b!) ids, Tensor(c!) probs,"
      " Tensor(d!)? shared, Tensor(e!) scratch) -> ()");
  m.def(
      "decode_moe_block(Tensor(a!) x, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor? router,"
      " int topk, bool sigmoid, bool pre_softmax, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1, Tensor? b1,"
      " Tensor w2, Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated, Tensor(b!) scratch) -> ()");
  m.def(
      "decode_plan(Tensor words, Tensor? words_scale, Tensor? positions, Tensor output, Tensor? output_scale,"
      " Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor? cos, Tensor? sin, Tensor x, Tensor"
      " scratch, int max_logits) -> int");
  m.def(
      "decode_plan_attention(int plan, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor"
      " qkv_w, Tensor? qkv_scale, Tensor? qkv_bias, Tensor[] head_norms, Tensor keys, Tensor values, Tensor out_w,"
      " Tensor? out_scale, Tensor? out_bias) -> ()");
  m.def(
      "decode_plan_mlp(int plan, Tensor norm_weight, Tensor? norm_bias, float epsilon, bool rms, Tensor? router,"
      " Tensor? norm_scale, Tensor? router_bias, Tensor? candidates, Tensor? mixing, Tensor? mixing_bias, bool sigmoid, bool pre_softmax,"
      " int num_groups, int group_topk, float factor, int topk, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1, Tensor?"
      " b1, Tensor w2, Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated) -> ()");
  m.def(
      "decode_plan_shared(int plan, Tensor index1, Tensor index2, Tensor w1, Tensor? scale1, Tensor? b1, Tensor w2,"
      " Tensor? scale2, Tensor? b2, Tensor? factor1, Tensor? factor2, bool gated) -> ()");
  m.def(
      "decode_plan_step(int plan, Tensor tokens, Tensor positions, Tensor slots, Tensor pages, Tensor rows,"
      " Tensor(a!) logits) -> ()");
  m.def(
      "combine_rows(Tensor[] banks, Tensor?[] scales, Tensor coefficients, Tensor(a!) out, Tensor(b!)? out_scale)"
      " -> ()");
}

// Of no tensors.
SAMOE_LIBRARY_IMPL(megatron_samoe, CompositeExplicitAutograd, m) { SAMOE_IMPL(m, "instruction_set", instruction_set);  }
