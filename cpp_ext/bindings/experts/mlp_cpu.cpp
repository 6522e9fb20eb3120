// Expert MLPs on the CPU: both products of an expert with its activation between, forward and backward, on the thread
// that took the expert.

#include <atomic>
#include <functional>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "../../kernels/cpu/expert_plan.h"
#include "../../kernels/kernels.h"
#include "../cpu_backend.h"
#include "layer.h"
#include "products.h"

namespace {

using namespace samoe;
using samoe::cpu::ExpertPlan;
using samoe::cpu::ExpertTask;

// The tensor's trailing elements as rows x columns, at element `start`.
Matrix part_of(const Tensor& tensor, int64_t start, int64_t rows, int64_t columns) {
  char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data + start * static_cast<int64_t>(tensor.element_size()), samoe::dtype_of(tensor), rows, columns, columns};
}

// The layer as one expert's matrices.
struct Layer : samoe::ExpertLayer {
  DType work;  // of what lies between the products

  explicit Layer(samoe::ExpertLayer layer) : ExpertLayer(std::move(layer)) {
    const bool widens = dtype == DType::bf16 && samoe::product_choice().bf16 == samoe::Bf16Products::fp32;
    work = widens ? DType::f32 : dtype;
  }

  Matrix weight1(int64_t e) const { return part_of(w1, e * up * hidden, up, hidden); }
  Matrix weight2(int64_t e) const { return part_of(w2, e * hidden * width, hidden, width); }
  const float* bias1(int64_t e, WorkMemory& memory) const {
    if (!b1.has_value()) return nullptr;
    return static_cast<const float*>(samoe::widened(part_of(*b1, e * up, 1, up), memory).data);
  }
  Matrix to_work(const Matrix& m, WorkMemory& memory) const {
    return work == DType::f32 ? samoe::widened(m, memory) : m;
  }
  // Rows begin to end of a tensor [R, columns].
  static Matrix rows_of(const Tensor& tensor, int64_t begin, int64_t end) {
    return part_of(tensor, begin * tensor.size(1), end - begin, tensor.size(1));
  }
};

// Runs all tasks; weight gradients of experts that threads share wait for the rows.
void run_plan(const ExpertPlan& plan, int num_threads, const std::function<void(const ExpertTask&, WorkMemory&)>& run) {
  std::atomic<size_t> rows_tasks_left{plan.num_rows_tasks};
  samoe::run_tasks(plan.tasks.size(), num_threads, [&](size_t i, WorkMemory& memory, const std::atomic<bool>& failed) {
    const ExpertTask& task = plan.tasks[i];
    if (task.kind == ExpertTask::grad1 || task.kind == ExpertTask::grad2) {
      while (rows_tasks_left > 0 && !failed) std::this_thread::yield();
      if (failed) return;  // its rows may never have been written
    }
    run(task, memory);
    if (i < plan.num_rows_tasks) --rows_tasks_left;
  });
}

int threads_for(const Layer& layer) {
  const int64_t products = layer.total * layer.hidden * (layer.up + layer.width);
  if (samoe::in_parallel_region() || products < (int64_t{1} << 20)) return 1;
  return num_threads();
}

ExpertPlan plan_for(const Layer& layer, int num_threads, bool backward) {
  return samoe::cpu::plan_experts(layer.rows.data(), layer.num_experts(), layer.up, layer.width, num_threads, backward);
}

std::tuple<Tensor, Tensor> forward_of(const Layer& layer, const Tensor& x, bool keep_hidden) {
  Tensor y = uninitialized({layer.total, layer.hidden}, x);
  Tensor hidden = uninitialized({keep_hidden ? layer.total : 0, layer.up}, x);
  const int num_threads = threads_for(layer);
  run_plan(plan_for(layer, num_threads, false), num_threads, [&](const ExpertTask& task, WorkMemory& memory) {
    const int64_t e = task.expert, n = task.end - task.begin;
    const Matrix x_n = layer.to_work(Layer::rows_of(x, task.begin, task.end), memory);
    const Matrix kept = keep_hidden ? Layer::rows_of(hidden, task.begin, task.end)
                                    : memory.matrix(layer.dtype, n, layer.up);
    const bool rounds = layer.work != layer.dtype;
    const Matrix h = rounds ? memory.matrix(layer.work, n, layer.up) : kept;
    samoe::times(x_n, layer.weight1(e), true, h, memory);
    const Matrix a = memory.matrix(layer.work, n, layer.width);
    samoe::cpu::kernels().activate({h.dtype, a.dtype, h.data, layer.bias1(e, memory), n, layer.width, layer.gated,
                                    rounds ? static_cast<uint16_t*>(kept.data) : nullptr, a.data});
    Matrix bias;
    if (layer.b2.has_value()) bias = part_of(*layer.b2, e * layer.hidden, 1, layer.hidden);
    samoe::times_transposed_plus(a, layer.weight2(e), layer.b2.has_value() ? &bias : nullptr,
                                 Layer::rows_of(y, task.begin, task.end), memory);
  });
  return {y, hidden};
}

class Backward {
 public:
  Backward(const Layer& layer, const Tensor& dy, const Tensor& x, const Tensor& hidden, const MainGrads& grads,
           const Tensor& dx)
      : layer_(layer), dy_(dy), x_(x), hidden_(hidden), grads_(grads), dx_(dx) {}

  void run() {
    const int num_threads = threads_for(layer_);
    const ExpertPlan plan = plan_for(layer_, num_threads, true);
    LentMemory shared;
    place_shared(plan, *shared);
    run_plan(plan, num_threads, [this](const ExpertTask& task, WorkMemory& memory) {
      if (task.kind == ExpertTask::whole || task.kind == ExpertTask::rows) {
        through_rows(task, memory);
      } else {
        shared_gradient(task, memory);
      }
    });
  }

 private:
  // What the rows of an expert that threads share leave for its weights' gradients.
  struct Shared {
    int64_t begin = 0;
    Matrix a{}, dh{};
  };

  void place_shared(const ExpertPlan& plan, WorkMemory& memory) {
    shared_.resize(layer_.rows.size());
    std::vector<bool> is_shared(layer_.rows.size());
    for (size_t i = 0; i < plan.num_rows_tasks; ++i) is_shared[static_cast<size_t>(plan.tasks[i].expert)] = true;
    int64_t begin = 0;
    for (size_t e = 0; e < shared_.size(); begin += layer_.rows[e], ++e) {
      shared_[e].begin = begin;
      if (!is_shared[e]) continue;
      shared_[e].a = memory.matrix(layer_.work, layer_.rows[e], layer_.width);
      shared_[e].dh = memory.matrix(layer_.work, layer_.rows[e], layer_.up);
    }
  }

  void through_rows(const ExpertTask& task, WorkMemory& memory) {
    const int64_t e = task.expert, n = task.end - task.begin;
    const Shared& shared = shared_[static_cast<size_t>(e)];
    const bool whole = task.kind == ExpertTask::whole;
    const int64_t first = task.begin - shared.begin;
    const Matrix dy = layer_.to_work(Layer::rows_of(dy_, task.begin, task.end), memory);
    const Matrix a = whole ? memory.matrix(layer_.work, n, layer_.width) : shared.a.row_range(first, first + n);
    const Matrix dh = whole ? memory.matrix(layer_.work, n, layer_.up) : shared.dh.row_range(first, first + n);
    // Without a gate the gradient of the activation becomes that of h in place.
    const Matrix da = layer_.gated ? memory.matrix(layer_.work, n, layer_.width) : dh;
    samoe::times(dy, layer_.weight2(e), false, da, memory);
    const Matrix h = Layer::rows_of(hidden_, task.begin, task.end);
    samoe::cpu::kernels().activate_backward({h.dtype, da.dtype, h.data, layer_.bias1(e, memory), da.data, n,
                                             layer_.width, layer_.gated, a.data, dh.data});
    if (whole) {
      const Matrix x = layer_.to_work(Layer::rows_of(x_, task.begin, task.end), memory);
      gradient2(e, dy, a, 0, layer_.width, memory);
      gradient1(e, dh, x, 0, layer_.up, memory);
    }
    const Matrix dx = Layer::rows_of(dx_, task.begin, task.end);
    if (dx.dtype == dh.dtype) {
      samoe::times(dh, layer_.weight1(e), false, dx, memory);
      return;
    }
    const Matrix wide = memory.matrix(dh.dtype, n, layer_.hidden);
    samoe::times(dh, layer_.weight1(e), false, wide, memory);
    samoe::cpu::kernels().convert({wide.dtype, dx.dtype, wide.data, dx.data, n * layer_.hidden, false});
  }

  void shared_gradient(const ExpertTask& task, WorkMemory& memory) {
    const int64_t e = task.expert;
    const Shared& shared = shared_[static_cast<size_t>(e)];
    const int64_t begin = shared.begin, end = begin + layer_.rows[static_cast<size_t>(e)];
    if (task.kind == ExpertTask::grad1) {
      const Matrix x = layer_.to_work(Layer::rows_of(x_, begin, end), memory);
      gradient1(e, shared.dh, x, task.begin, task.end, memory);
    } else {
      const Matrix dy = layer_.to_work(Layer::rows_of(dy_, begin, end), memory);
      gradient2(e, dy, shared.a, task.begin, task.end, memory);
    }
  }

  // Columns begin to end of h: their rows of dw1 and their part of db1.
  void gradient1(int64_t e, const Matrix& dh, const Matrix& x, int64_t begin, int64_t end, WorkMemory& memory) {
    const Matrix part = dh.column_range(begin, end);
    const Matrix dw1 = part_of(grads_.w1, e * layer_.up * layer_.hidden, layer_.up, layer_.hidden);
    samoe::add_transposed_times(part, x, dw1.row_range(begin, end), memory);
    if (!grads_.b1.has_value()) return;
    samoe::cpu::kernels().column_sums({part.dtype, part.data, part.rows, part.columns, part.stride,
                                       grads_.b1->mutable_data_ptr<float>() + e * layer_.up + begin});
  }

  // Columns begin to end of a: their columns of dw2; the first ones bring db2.
  void gradient2(int64_t e, const Matrix& dy, const Matrix& a, int64_t begin, int64_t end, WorkMemory& memory) {
    const Matrix dw2 = part_of(grads_.w2, e * layer_.hidden * layer_.width, layer_.hidden, layer_.width);
    samoe::add_transposed_times(dy, a.column_range(begin, end), dw2.column_range(begin, end), memory);
    if (!grads_.b2.has_value() || begin != 0) return;
    samoe::cpu::kernels().column_sums({dy.dtype, dy.data, dy.rows, dy.columns, dy.stride,
                                       grads_.b2->mutable_data_ptr<float>() + e * layer_.hidden});
  }

  const Layer& layer_;
  const Tensor &dy_, &x_, &hidden_;
  const MainGrads& grads_;
  const Tensor& dx_;
  std::vector<Shared> shared_;
};

class Experts {
 public:
  Experts(const CpuBackend&, const samoe::ExpertLayer& layer) : layer_(layer) {}
  std::tuple<Tensor, Tensor> forward(const Tensor& x, bool keep_hidden) const {
    return forward_of(layer_, x, keep_hidden);
  }
  Tensor backward(const Tensor& dy, const Tensor& x, const Tensor& hidden, const MainGrads& grads) const {
    Tensor dx = uninitialized(x.sizes(), x);
    Backward(layer_, dy, x, hidden, grads, dx).run();
    return dx;
  }

 private:
  const Layer layer_;
};

}  // namespace

SAMOE_LIBRARY_IMPL(megatron_samoe, CPU, m) { samoe::add_expert_ops<CpuBackend, Experts>(m); }
