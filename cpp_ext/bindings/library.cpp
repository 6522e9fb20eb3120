// The schemas of the ops, once; kernels join per backend in the other files of this directory.
#include <torch/library.h>

#include <string>

#include "../kernels/kernels.h"

namespace {
std::string instruction_set() { return samoe::cpu::kernels().instruction_set; }
}  // namespace

TORCH_LIBRARY(megatron_samoe, m) {
  m.def("instruction_set() -> str", instruction_set);
  m.def(
      "topk_gate(Tensor logits, int topk, bool sigmoid, bool pre_softmax, int num_groups)"
      " -> (Tensor probs, Tensor ids, Tensor counts, Tensor score_sum, Tensor z_sum, Tensor logsumexp)");
  m.def(
      "topk_gate_backward(Tensor logits, Tensor logsumexp, Tensor probs, Tensor ids, Tensor? dprobs,"
      " Tensor? dscore_sum, Tensor? dz, bool sigmoid, bool pre_softmax, int num_groups) -> Tensor");
  m.def("make_permutation(Tensor ids, int num_experts) -> (Tensor slot_of_row, Tensor row_of_slot, Tensor counts)");
  m.def("permute(Tensor x, Tensor slot_of_row, int topk) -> Tensor");
  m.def("unpermute(Tensor rows, Tensor? probs, Tensor row_of_slot) -> Tensor");
  m.def(
      "unpermute_backward(Tensor dy, Tensor rows, Tensor probs, Tensor slot_of_row, Tensor row_of_slot)"
      " -> (Tensor drows, Tensor dprobs)");
  m.def("combine_banks(Tensor coefficients, Tensor banks, Tensor(a!) out) -> ()");
  m.def("combine_banks_backward(Tensor coefficients, Tensor banks, Tensor dweights, Tensor(a!) dbanks) -> Tensor");
  m.def("cross_entropy_parts(Tensor logits, Tensor labels, int first_id) -> (Tensor peak, Tensor sum, Tensor target)");
  m.def("cross_entropy_backward(Tensor logits, Tensor labels, int first_id, Tensor logsumexp, Tensor dloss) -> Tensor");
}
