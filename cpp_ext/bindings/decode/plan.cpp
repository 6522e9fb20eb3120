// Plans of whole models for the CPU: what their steps have in common is checked once, and a step is one call. Python owns
// a plan's life by its number; see ops/decode_plan.py.

#include <map>
#include <memory>
#include <mutex>

#include "arguments.h"

namespace {

using namespace samoe;
using namespace samoe::decode;
using samoe::cpu::DecodeLayer;

struct Plan {
  samoe::cpu::DecodeStep step = {};
  std::vector<DecodeLayer> layers;
  Tensor x, scratch, last, ones, zeros, shared_weights;
  MaybeTensor cos, sin;
  int64_t max_tokens = 0, max_logits = 0, num_pages = -1, weight_bytes = 0;
  std::optional<int64_t> num_positions;  // of the tables by position
  std::vector<Tensor> kept;              // whose memory the step's arguments point to

  void keep(std::initializer_list<MaybeTensor> tensors) {
    for (const MaybeTensor& tensor : tensors) {
      if (!tensor.has_value()) continue;
      kept.push_back(*tensor);
      weight_bytes += bytes_of(*tensor);
    }
  }
  DecodeLayer& last_layer() {
    SAMOE_CHECK(!layers.empty(), "the plan has no layer yet");
    return layers.back();
  }
};

std::mutex registry_mutex;

std::map<int64_t, std::shared_ptr<Plan>>& registry() {
  static std::map<int64_t, std::shared_ptr<Plan>> plans;
  return plans;
}

std::shared_ptr<Plan> find_plan(int64_t number) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(number);
  SAMOE_CHECK(found != registry().end(), "there is no plan ", number);
  return found->second;
}

int64_t decode_plan(const Tensor& words, const MaybeTensor& words_scale, const MaybeTensor& positions,
                    const Tensor& output, const MaybeTensor& output_scale, const Tensor& norm_weight,
                    const MaybeTensor& norm_bias, double epsilon, bool rms, const MaybeTensor& cos,
                    const MaybeTensor& sin, const Tensor& x, const Tensor& scratch, int64_t max_logits) {
  samoe::check_contiguous(x, "x", 2, kFloat);
  const int64_t T = x.size(0), H = x.size(1);
  SAMOE_CHECK(words.dim() == 2 && words.size(1) == H, "words are ", words.sizes(), ", not [V, ", H, "]");
  SAMOE_CHECK(output.sizes().equals(words.sizes()), "output is ", output.sizes(), ", words ", words.sizes());
  check_range(max_logits, "max_logits", 0, INT64_MAX);
  max_logits = std::min(max_logits, T);  // a step has no more tokens
  auto plan = std::make_shared<Plan>();
  plan->x = x;
  plan->scratch = scratch;
  plan->cos = cos;
  plan->sin = sin;
  plan->last = uninitialized({2, max_logits, H}, x);
  plan->ones = torch::stable::full({T}, 1.0, kFloat);
  plan->zeros = torch::stable::full({T}, 0.0, kLong);
  plan->shared_weights = torch::stable::full({T}, 1.0, kFloat);
  plan->max_tokens = T;
  plan->max_logits = max_logits;
  plan->keep({words, words_scale, positions, output, output_scale, norm_weight, norm_bias});
  auto& step = plan->step;
  step.hidden = H;
  step.words_VH = matrix_of(words, words_scale, "words");
  if (positions.has_value()) {
    SAMOE_CHECK(positions->dim() == 2 && positions->size(1) == H, "positions are ", positions->sizes());
    step.positions_PH = floats_or_null(positions, "positions", positions->numel());
    plan->num_positions = positions->size(0);
  }
  if (cos.has_value()) plan->num_positions = std::min(cos->size(0), plan->num_positions.value_or(cos->size(0)));
  step.x_TH = x.mutable_data_ptr<float>();
  step.last_NH = plan->last.mutable_data_ptr<float>();
  float* normed = step.last_NH + max_logits * H;
  step.final_norm = norm_of(step.last_NH, 0, H, norm_weight, norm_bias, epsilon, rms, normed);
  step.head = linear_of(normed, 0, H, output, output_scale, {}, output.size(0), nullptr, false, "output");
  const std::lock_guard<std::mutex> lock(registry_mutex);
  static int64_t next = 1;
  registry()[next] = std::move(plan);
  return next++;
}

void decode_plan_attention(int64_t number, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon,
                           bool rms, const Tensor& qkv_w, const MaybeTensor& qkv_scale, const MaybeTensor& qkv_bias,
                           const Tensors& head_norms, const Tensor& keys, const Tensor& values, const Tensor& out_w,
                           const MaybeTensor& out_scale, const MaybeTensor& out_bias) {
  const auto plan = find_plan(number);
  SAMOE_CHECK(qkv_w.dim() == 4 && qkv_w.size(1) > 2, "qkv is ", qkv_w.sizes(), ", not [G, Q + 2, D, H]");
  const int64_t T = plan->max_tokens, H = plan->step.hidden;
  const int64_t G = qkv_w.size(0), Q = qkv_w.size(1) - 2, D = qkv_w.size(2), width = product({G, Q + 2, D});
  Scratch pieces(plan->scratch);
  float* residual = plan->step.x_TH;
  float* normed = pieces.floats({T, H});
  float* qkv = pieces.floats({T, width});
  DecodeLayer layer = {};
  layer.attention_norm = norm_of(residual, 0, H, norm_weight, norm_bias, epsilon, rms, normed);
  layer.qkv = linear_of(normed, 0, H, qkv_w, qkv_scale, qkv_bias, width, qkv, false, "qkv");
  layer.attention = attention_of(G, Q, D, head_norms, epsilon, rms, plan->cos, plan->sin, keys, values);
  layer.attention.qkv = qkv;
  layer.attention.qkv_scratch = pieces.floats({T, width});
  float* attended = layer.attention.out = pieces.floats({T, G, Q, D});
  layer.output = linear_of(attended, 0, G * Q * D, out_w, out_scale, out_bias, H, residual, true, "output");
  SAMOE_CHECK(plan->num_pages < 0 || keys.size(0) == plan->num_pages, "keys have ", keys.size(0),
                    " pages, those of other layers ", plan->num_pages);
  plan->num_pages = keys.size(0);
  plan->keep({norm_weight, norm_bias, qkv_w, qkv_scale, qkv_bias, out_w, out_scale, out_bias});
  for (const Tensor& norm : head_norms) plan->kept.push_back(norm);
  plan->kept.insert(plan->kept.end(), {keys, values});
  plan->layers.push_back(layer);
}

// Experts of a plan's normalised tokens. ids null: all tokens take the first, with a weight of 1 unless there are probs.
samoe::cpu::DecodeExperts planned_experts(Plan& plan, const float* normed, const int64_t* ids, const float* probs,
                                          int64_t topk, const ExpertArguments& a, Scratch pieces) {
  auto e = experts_of(plan.step.hidden, a);
  plan.keep({a.index1, a.index2, a.w1, a.scale1, a.b1, a.w2, a.scale2, a.b2, a.factor1, a.factor2});
  SAMOE_CHECK(ids != nullptr || e.num_experts > 0, "there is no expert");
  e.x_TH = normed;
  e.ids_TK = ids != nullptr ? ids : plan.zeros.const_data_ptr<int64_t>();
  e.probs_TK = probs != nullptr ? probs : plan.ones.const_data_ptr<float>();
  e.topk = topk;
  e.h_NF = pieces.floats({plan.max_tokens, topk, e.ffn});
  e.y_NH = pieces.floats({plan.max_tokens, topk, e.hidden});
  e.combine = true;
  e.out_TH = plan.step.x_TH;
  return e;
}

// Sets the MLP of the layer that was added last. The arguments are those of Norm, of Routing with topk, and of ExpertStack in
// ops/decode_parts.py. Without a router each token visits expert 0, with weight 1.
void decode_plan_mlp(int64_t number, const Tensor& norm_weight, const MaybeTensor& norm_bias, double epsilon, bool rms,
                     const MaybeTensor& router, const MaybeTensor& norm_scale, const MaybeTensor& router_bias,
                     const MaybeTensor& candidates, const MaybeTensor& mixing, const MaybeTensor& mixing_bias, bool sigmoid, bool pre_softmax,
                     int64_t num_groups, int64_t group_topk, double factor, int64_t topk, const Tensor& index1,
                     const Tensor& index2, const Tensor& w1, const MaybeTensor& scale1, const MaybeTensor& b1,
                     const Tensor& w2, const MaybeTensor& scale2, const MaybeTensor& b2, const MaybeTensor& factor1,
                     const MaybeTensor& factor2, bool gated) {
  const auto plan = find_plan(number);
  DecodeLayer layer = plan->last_layer();  // replaced when all of it is right
  const int64_t T = plan->max_tokens, H = plan->step.hidden, E = index1.size(0);
  SAMOE_CHECK(topk >= 1 && topk <= E && (router.has_value() || topk == 1), "topk = ", topk, " of ", E, " experts");
  Scratch pieces(plan->scratch);
  float* normed = pieces.floats({T, H});
  layer.mlp_norm = norm_of(plan->step.x_TH, 0, H, norm_weight, norm_bias, epsilon, rms, normed);
  int64_t* ids = nullptr;
  float* probs = nullptr;
  if (router.has_value()) {
    float* logits = pieces.floats({T, E});
    ids = pieces.integers({T, topk});
    probs = pieces.floats({T, topk});
    layer.router = linear_of(normed, 0, H, *router, {}, {}, E, logits, false, "router");
    layer.choice = choice_of(0, H, {*router, norm_scale, router_bias, candidates, mixing, mixing_bias, topk, sigmoid, pre_softmax,
                                    num_groups, group_topk, factor});
    layer.choice.logits_TE = logits;
    layer.choice.probs_TK = probs;
    layer.choice.ids_TK = ids;
    if (mixing.has_value()) {
      float* mixing_logits = pieces.floats({T, 2});
      layer.mixing = linear_of(normed, 0, H, *mixing, {}, mixing_bias, 2, mixing_logits, false, "mixing");
      layer.choice.mixing_T2 = mixing_logits;
      layer.choice.shared_T = plan->shared_weights.mutable_data_ptr<float>();
    }
  }
  layer.experts = planned_experts(
      *plan, normed, ids, probs, topk,
      {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, pieces);
  plan->keep({norm_weight, norm_bias, router, norm_scale, router_bias, candidates, mixing, mixing_bias});
  plan->last_layer() = layer;
}

void decode_plan_shared(int64_t number, const Tensor& index1, const Tensor& index2, const Tensor& w1,
                        const MaybeTensor& scale1, const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& scale2,
                        const MaybeTensor& b2, const MaybeTensor& factor1, const MaybeTensor& factor2, bool gated) {
  const auto plan = find_plan(number);
  DecodeLayer& layer = plan->last_layer();
  SAMOE_CHECK(layer.experts.w1.type == matrix_of(w1, scale1, "w1").type, "the layer's experts are of another type");
  Scratch pieces(plan->scratch);
  // The first piece of scratch is where decode_plan_mlp's norm writes.
  const float* normed = pieces.floats({plan->max_tokens, plan->step.hidden});
  layer.shared = planned_experts(*plan, normed, nullptr, layer.choice.shared_T, 1,
                                 {index1, index2, w1, scale1, b1, w2, scale2, b2, factor1, factor2, gated}, pieces);
}

void decode_plan_step(int64_t number, const Tensor& tokens, const Tensor& positions, const Tensor& slots,
                      const Tensor& pages, const Tensor& rows, const Tensor& logits) {
  const auto plan = find_plan(number);
  samoe::check_contiguous(tokens, "tokens", 1, kLong);
  samoe::check_contiguous(rows, "rows", 1, kLong);
  auto step = plan->step;
  const int64_t T = tokens.size(0), N = rows.size(0), V = step.head.outputs;
  SAMOE_CHECK(T <= plan->max_tokens && N <= plan->max_logits, T, " tokens and ", N, " logits; the plan is for ",
                    plan->max_tokens, " and ", plan->max_logits);
  on_cpu().check_sizes(logits, "logits", {N, V}, kFloat);
  samoe::check_index(tokens, "tokens", 0, V);
  samoe::check_index(rows, "rows", 0, T);
  check_places({positions, slots, pages}, T, plan->num_pages, plan->num_positions);
  for (const DecodeLayer& layer : plan->layers)
    SAMOE_CHECK(layer.experts.num_experts > 0, "a layer of the plan has no MLP");
  step.tokens_T = tokens.const_data_ptr<int64_t>();
  step.positions_T = positions.const_data_ptr<int32_t>();
  step.slots_T = slots.const_data_ptr<int32_t>();
  step.pages = pages.const_data_ptr<int32_t>();
  step.pages_per_slot = pages.size(1);
  step.num_tokens = T;
  step.layers = plan->layers.data();
  step.num_layers = static_cast<int64_t>(plan->layers.size());
  step.rows_N = rows.const_data_ptr<int64_t>();
  step.num_rows = N;
  step.head.out_TN = logits.mutable_data_ptr<float>();
  // As many threads as have something to do between two of a layer's about eight waits: every token uses the weights.
  step.num_threads = threads_for(plan->weight_bytes / (8 * step.num_layers + 1) * T);
  samoe::cpu::kernels().decode_step(step);
}

void decode_plan_close(int64_t number) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry().erase(number);
}

}  // namespace

SAMOE_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  SAMOE_IMPL(m, "decode_plan", decode_plan);
  SAMOE_IMPL(m, "decode_plan_attention", decode_plan_attention);
  SAMOE_IMPL(m, "decode_plan_mlp", decode_plan_mlp);
  SAMOE_IMPL(m, "decode_plan_shared", decode_plan_shared);
  SAMOE_IMPL(m, "decode_plan_step", decode_plan_step);
}

// Of no tensors.
SAMOE_LIBRARY_IMPL(megatron_samoe, CompositeExplicitAutograd, m) { SAMOE_IMPL(m, "decode_plan_close", decode_plan_close);  }
