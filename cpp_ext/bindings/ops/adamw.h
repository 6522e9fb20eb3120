// The optimizer's update on a CPU: checks, launch.
#pragma once

#include <cmath>
#include <vector>

#include "../cpu_backend.h"

namespace samoe {
namespace ops {

constexpr int64_t kElementsPerThread = 16384;
constexpr int64_t kMostSteps = 1000;  // of Newton and Schulz: ten times what an option allows

// A run may be any view of contiguous memory: its shape does not matter, its order does.
inline void check_run(const TensorChecks& checks, const Tensor& tensor, const char* name, size_t i, int64_t num,
                      ScalarType dtype) {
  checks.check_device(tensor, name, "[", i, "]");
  SAMOE_CHECK(tensor.scalar_type() == dtype, name, "[", i, "] is ", tensor.scalar_type(), ", not ", dtype);
  SAMOE_CHECK(tensor.is_contiguous(), name, "[", i, "] is not contiguous");
  SAMOE_CHECK(tensor.numel() == num, name, "[", i, "] has ", tensor.numel(), " elements, its master ", num);
}

// weights are bf16 copies that follow their masters; an empty list where the masters are the weights.
inline void adamw(const Tensors& masters, const Tensors& weights, const Tensors& grads, const Tensors& exp_avgs,
           const Tensors& exp_avg_sqs, double lr, double beta1, double beta2, double eps, double weight_decay,
           int64_t step, double grad_scale) {
  SAMOE_CHECK(grads.size() == masters.size() && exp_avgs.size() == masters.size() &&
                        exp_avg_sqs.size() == masters.size() && (weights.empty() || weights.size() == masters.size()),
                    "the lists differ in length: ", masters.size(), ", ", weights.size(), ", ", grads.size(), ", ",
                    exp_avgs.size(), ", ", exp_avg_sqs.size());
  SAMOE_CHECK(step >= 1, "step = ", step, "; the first is 1");
  if (masters.empty()) return;
  const CpuBackend backend(masters[0], "masters[0]");
  std::vector<cpu::AdamWRun> runs;
  int64_t total = 0;
  for (size_t i = 0; i < masters.size(); ++i) {
    const int64_t num = masters[i].numel();
    check_run(backend, masters[i], "masters", i, num, kFloat);
    check_run(backend, grads[i], "grads", i, num, kFloat);
    check_run(backend, exp_avgs[i], "exp_avgs", i, num, kFloat);
    check_run(backend, exp_avg_sqs[i], "exp_avg_sqs", i, num, kFloat);
    uint16_t* weight = nullptr;
    if (!weights.empty()) {
      check_run(backend, weights[i], "weights", i, num, kBFloat16);
      weight = static_cast<uint16_t*>(weights[i].mutable_data_ptr());
    }
    runs.push_back({masters[i].mutable_data_ptr<float>(), weight, grads[i].const_data_ptr<float>(),
                    exp_avgs[i].mutable_data_ptr<float>(), exp_avg_sqs[i].mutable_data_ptr<float>(), num});
    total += num;
  }
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
  backend.adamw({runs.data(), static_cast<int64_t>(runs.size()), static_cast<float>(1.0 - lr * weight_decay),
                 static_cast<float>(beta1), static_cast<float>(beta2), static_cast<float>(eps),
                 static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2), static_cast<float>(lr / correction1),
                 static_cast<float>(1.0 / std::sqrt(correction2)), static_cast<float>(grad_scale),
                 backend.threads(total, kElementsPerThread)});
}

inline void newton_schulz(const Tensor& x, int64_t num_steps, int64_t steps_at_once, double a, double b, double c, double epsilon,
                          double factor, const Tensor& out) {
  const CpuBackend backend(x, "x");
  backend.check_contiguous(x, "x", 3, kFloat);
  backend.check_sizes(out, "out", x.sizes(), kFloat);
  check_range(num_steps, "num_steps", 0, kMostSteps);
  check_range(steps_at_once, "steps_at_once", 1, kMostSteps);
  if (x.numel() == 0) return;
  const auto number = [](double v) { return static_cast<float>(v); };
  cpu::kernels().newton_schulz({x.const_data_ptr<float>(), x.size(0), x.size(1), x.size(2), static_cast<int>(num_steps),
                                static_cast<int>(steps_at_once), number(a), number(b), number(c), number(epsilon), number(factor),
                                out.mutable_data_ptr<float>(), backend.threads(x.numel() * 16, 64 << 10, x.size(0))});
}

inline void add_optimizer_ops(Library& m) {
  SAMOE_IMPL(m, "newton_schulz", newton_schulz);
  SAMOE_IMPL(m, "adamw", adamw);
}

}  // namespace ops
}  // namespace samoe
