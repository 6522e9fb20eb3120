// Expert MLPs on a CUDA device: each product over the rows of all experts, the kernels of kernels/cuda between them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <climits>
#include <optional>
#include <tuple>
#include <vector>

#include "../cuda_backend.h"
#include "layer.h"

namespace {

using at::Tensor;
using samoe::CudaBackend;
using samoe::DType;
using samoe::ExpertLayer;
using samoe::MainGrads;
namespace cuda = samoe::cuda;

// torch's grouped product is one launch for all experts. It wants bf16 in rows of whole 16 bytes, and its own kernel is
// Hopper's: on other devices it loops over the experts itself or was reported to leave the gradients of experts without
// rows unset (sm_100).
constexpr int kGroupedCapability = 90;
constexpr int64_t kGroupedBytes = 16;
constexpr int64_t kMostGroups = 1024;

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kGroupedBytes == 0;
}

class Experts {
 public:
  Experts(const CudaBackend& backend, const ExpertLayer& layer) : backend_(backend), layer_(layer) {
    TORCH_CHECK_VALUE(layer.total <= INT32_MAX, "x has ", layer.total, " rows, at most ", INT32_MAX, " fit");
    const Tensor ends = at::empty({layer.num_experts()}, at::kInt);
    int32_t end = 0, *next = ends.mutable_data_ptr<int32_t>();
    for (const int64_t n : layer.rows) *next++ = end += static_cast<int32_t>(n);
    ends_ = ends.to(backend.device(), at::kInt, /*non_blocking=*/true);
    const int64_t unit = kGroupedBytes / 2;
    grouped_ = layer.dtype == DType::bf16 && layer.total > 0 && layer.num_experts() < kMostGroups && layer.hidden % unit == 0 && layer.width % unit == 0 &&
               cuda::compute_capability() == kGroupedCapability && is_aligned(layer.w1) && is_aligned(layer.w2);
  }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, bool keep_hidden) const {
    const Tensor h = products(x, weight1().transpose(1, 2));
    const Tensor a = at::empty({layer_.total, layer_.width}, x.options());
    backend_.launch(cuda::activate, cuda::Activate{layer_.dtype, rows(), h.const_data_ptr(), bias1(), layer_.width,
                                                   layer_.gated, a.mutable_data_ptr()});
    const Tensor y = products(a, layer_.w2.transpose(1, 2));
    if (layer_.b2.has_value()) {
      backend_.launch(cuda::add_expert_bias, layer_.dtype, rows(), layer_.hidden, layer_.b2->const_data_ptr(),
                      y.mutable_data_ptr());
    }
    return {y, keep_hidden ? h : at::empty({0, layer_.up}, x.options())};
  }

  // Adds to the main gradients and returns dx.
  Tensor backward(const Tensor& dy, const Tensor& x, const Tensor& h, const MainGrads& grads) const {
    const Tensor da = products(dy, layer_.w2);
    const Tensor a = at::empty({layer_.total, layer_.width}, x.options());
    const Tensor dh = layer_.gated ? at::empty({layer_.total, layer_.up}, x.options()) : da;
    backend_.launch(cuda::activate_backward,
                    cuda::ActivateBackward{layer_.dtype, rows(), h.const_data_ptr(), bias1(), da.const_data_ptr(),
                                           layer_.width, layer_.gated, a.mutable_data_ptr(), dh.mutable_data_ptr()});
    add_outer_products(grads.w2, dy, a);
    add_outer_products(grads.w1.view({layer_.num_experts(), layer_.up, layer_.hidden}), dh, x);
    if (grads.b1.has_value()) add_column_sums(*grads.b1, dh);
    if (grads.b2.has_value()) add_column_sums(*grads.b2, dy);
    return products(dh, weight1());
  }

 private:
  cuda::ExpertRows rows() const { return {ends_.const_data_ptr<int32_t>(), layer_.num_experts(), layer_.total}; }
  Tensor weight1() const { return layer_.w1.view({layer_.num_experts(), layer_.up, layer_.hidden}); }
  const void* bias1() const { return layer_.b1.has_value() ? layer_.b1->const_data_ptr() : nullptr; }

  // Calls function(expert, first row, number of rows) for the experts that have rows.
  template <typename Function>
  void for_each_expert(const Function& function) const {
    int64_t begin = 0;
    for (int64_t e = 0; e < layer_.num_experts(); ++e) {
      const int64_t n = layer_.rows[static_cast<size_t>(e)];
      if (n > 0) function(e, begin, n);
      begin += n;
    }
  }

  // [R, M]: each expert's rows of x [R, K] times its matrix [K, M].
  Tensor products(const Tensor& x, const Tensor& w_eKM) const {
    if (grouped_ && is_aligned(x)) return at::_grouped_mm(x, w_eKM, ends_).contiguous();
    const Tensor y = at::empty({layer_.total, w_eKM.size(2)}, x.options());
    for_each_expert([&](int64_t e, int64_t begin, int64_t n) {
      Tensor y_e = y.narrow(0, begin, n);
      at::mm_out(y_e, x.narrow(0, begin, n), w_eKM.select(0, e));
    });
    return y;
  }

  // grad[e] += d_e^T x_e in fp32, whatever the type of the rows. Torch's grouped product would round each to bf16 first.
  void add_outer_products(const Tensor& grad_eMK, const Tensor& d_RM, const Tensor& x_RK) const {
    for_each_expert([&](int64_t e, int64_t begin, int64_t n) {
      Tensor grad = grad_eMK.select(0, e);
      const Tensor d_t = d_RM.narrow(0, begin, n).t(), x_e = x_RK.narrow(0, begin, n);
      if (layer_.dtype == DType::f32) {
        grad.addmm_(d_t, x_e);
      } else if (grad.is_cuda()) {
        at::addmm_out(grad, grad, d_t, x_e, at::kFloat);
      } else {  // the emulation: torch has that product on CUDA alone
        grad.addmm_(d_t.to(at::kFloat), x_e.to(at::kFloat));
      }
    });
  }

  void add_column_sums(const Tensor& grad, const Tensor& d) const {
    backend_.launch(cuda::expert_column_sums, layer_.dtype, rows(), d.size(1), d.const_data_ptr(),
                    grad.mutable_data_ptr<float>());
  }

  const at::AutoDispatchBelowADInplaceOrView no_autograd_;
  const CudaBackend& backend_;
  const ExpertLayer& layer_;
  Tensor ends_;  // int32, on the device
  bool grouped_;
};

}  // namespace

SAMOE_CUDA_LIBRARY_IMPL(m) { samoe::add_expert_ops<CudaBackend, Experts>(m); }
