#include "products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

namespace samoe {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int64_t kPanelElements = int64_t{128} << 10;  // 512 KB in fp32: half of a core's second-level cache

size_t rounded_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

void convert_rows(const Matrix& from, const Matrix& to) {
  const auto convert = cpu::kernels().convert;
  if (from.stride == from.columns && to.stride == to.columns) {
    convert({from.dtype, to.dtype, from.data, to.data, from.rows * from.columns, false});
    return;
  }
  for (int64_t r = 0; r < from.rows; ++r) {
    convert({from.dtype, to.dtype, from.at(r, 0), to.at(r, 0), from.columns, false});
  }
}

std::atomic<Bf16Products> chosen_bf16{Bf16Products::blas};
std::atomic<int64_t> chosen_fp32_tokens{INT64_MAX}, chosen_bf16_tokens{INT64_MAX};

void set_products(std::string bf16, int64_t fp32_tokens, int64_t bf16_tokens) {
  const bool is_own = bf16 == "native";
  SAMOE_CHECK(is_own || bf16 == "blas" || bf16 == "fp32", "bf16 products '", bf16, "': one of native, blas, fp32");
  SAMOE_CHECK(!is_own || cpu::kernels().has_bf16_product(), "this processor has no bf16 dot products");
  chosen_bf16 = is_own ? Bf16Products::own : (bf16 == "blas" ? Bf16Products::blas : Bf16Products::fp32);
  chosen_fp32_tokens = fp32_tokens;
  chosen_bf16_tokens = bf16_tokens;
}
bool has_bf16_product() { return cpu::kernels().has_bf16_product(); }
std::string instruction_set() { return cpu::kernels().instruction_set; }

// A matrix as torch sees it, or its transpose; a vector may be given as all rows of a matrix, with a stride of 0.
Tensor view_of(const Matrix& m, bool transposed = false) {
  int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.stride, 1};
  if (transposed) std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
  return torch::stable::from_blob(m.data, sizes, strides, Device(DeviceType::CPU),
                                  m.dtype == DType::f32 ? kFloat : kBFloat16);
}

// out = a b
void blas(const Tensor& a, const Tensor& b, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
// out = c + a b; c may be out.
void blas_plus(const Tensor& c, const Tensor& a, const Tensor& b, const Tensor& out) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
}

bool by_own_kernel(const Matrix& a) { return a.dtype == DType::bf16 && product_choice().bf16 == Bf16Products::own; }

// Product of bf16 matrices, one or both of them given transposed, by our own kernel.
void multiply(const Matrix& a, bool a_transposed, const Matrix& b, bool b_transposed, const float* bias,
              const Matrix& c, WorkMemory& memory) {
  const bool adds = c.dtype == DType::f32;
  const cpu::Bf16Product product = {static_cast<const uint16_t*>(a.data), a.stride, a_transposed,
                               static_cast<const uint16_t*>(b.data), b.stride, b_transposed,
                               c.rows, c.columns, a_transposed ? a.rows : a.columns, bias,
                               adds ? nullptr : static_cast<uint16_t*>(c.data),
                               adds ? static_cast<float*>(c.data) : nullptr, c.stride};
  const cpu::Kernels& kernels = cpu::kernels();
  kernels.bf16_product(product, memory.take(static_cast<size_t>(kernels.bf16_product_workspace_bytes(product))));
}

// The BLAS makes code for every new number of rows in bf16, and the routing changes that number every step: at most 16
// numbers an octave keep what it has made, and its memory, in bounds.
int64_t padded_rows(int64_t rows) {
  int64_t unit = 32;
  while (unit * 16 <= rows) unit *= 2;
  return static_cast<int64_t>(rounded_up(static_cast<size_t>(rows), static_cast<size_t>(unit)));
}

// Calls product(a, c) with rows of zeros after a's, and drops what they give.
template <typename Product>
void with_padded_rows(const Matrix& a, const Matrix& c, WorkMemory& memory, Product product) {
  const int64_t rows = padded_rows(a.rows);
  if (rows == a.rows) return product(a, c);
  const Matrix x = memory.matrix(a.dtype, rows, a.columns), y = memory.matrix(c.dtype, rows, c.columns);
  const auto copy = [](const Matrix& from, const Matrix& to, int64_t num_rows) {
    for (int64_t r = 0; r < num_rows; ++r)
      std::memcpy(to.at(r, 0), from.at(r, 0), static_cast<size_t>(from.columns) * from.element_size());
  };
  copy(a, x, a.rows);
  std::memset(x.at(a.rows, 0), 0, static_cast<size_t>((rows - a.rows) * a.columns) * a.element_size());
  product(x, y);
  copy(y, c, c.rows);
}

}  // namespace

void WorkMemory::Free::operator()(void* p) const { std::free(p); }

WorkMemory::Block WorkMemory::allocate(size_t bytes) {
  const size_t size = rounded_up(bytes, kHugePage);
  void* data = std::aligned_alloc(kHugePage, size);
  if (data == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  madvise(data, size, MADV_HUGEPAGE);
#endif
  return {std::unique_ptr<char, Free>(static_cast<char*>(data)), size};
}

void* WorkMemory::take(size_t bytes) {
  const size_t size = rounded_up(std::max<size_t>(bytes, 1), 256);
  if (blocks_.empty() || used_ + size > blocks_.back().size) {
    blocks_.push_back(allocate(std::max({size, total_, least_})));
    used_ = 0;
  }
  void* result = blocks_.back().data.get() + used_;
  used_ += size;
  total_ += size;
  return result;
}

void WorkMemory::reset() {
  if (blocks_.size() > 1) {
    // The next task finds all it needs in one block, made where its failure can be told: destructors come here too.
    blocks_.clear();
    least_ = total_;
  }
  used_ = total_ = 0;
}

std::unique_ptr<WorkMemory> WorkMemoryPool::borrow() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) return std::make_unique<WorkMemory>();
  auto memory = std::move(free_.back());
  free_.pop_back();
  return memory;
}

void WorkMemoryPool::give_back(std::unique_ptr<WorkMemory> memory) {
  memory->reset();
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(memory));
}

WorkMemoryPool& WorkMemoryPool::instance() {
  static WorkMemoryPool* const pool = new WorkMemoryPool;  // never destroyed: threads may outlive static objects
  return *pool;
}

ProductChoice product_choice() { return {chosen_bf16, chosen_fp32_tokens, chosen_bf16_tokens}; }

Matrix widened(const Matrix& m, WorkMemory& memory) {
  if (m.dtype == DType::f32) return m;
  const Matrix wide = memory.matrix(DType::f32, m.rows, m.columns);
  convert_rows(m, wide);
  return wide;
}

void times(const Matrix& a, const Matrix& b, bool transposed, const Matrix& c, WorkMemory& memory) {
  const auto mm = [&](const Matrix& right, const Matrix& result) {
    blas(view_of(a), view_of(right, transposed), view_of(result));
  };
  if (a.dtype == b.dtype) {
    if (a.dtype == DType::f32) return mm(b, c);
    if (by_own_kernel(a)) return multiply(a, false, b, transposed, nullptr, c, memory);
    return with_padded_rows(a, c, memory, [&](const Matrix& x, const Matrix& result) {
      blas(view_of(x), view_of(b, transposed), view_of(result));
    });
  }
  const int64_t inner = transposed ? b.columns : b.rows, outer = transposed ? b.rows : b.columns;
  const int64_t step = std::min(outer, std::max<int64_t>(64, kPanelElements / std::max<int64_t>(1, inner)));
  const Matrix panel = transposed ? memory.matrix(DType::f32, step, inner) : memory.matrix(DType::f32, inner, step);
  for (int64_t begin = 0; begin < outer; begin += step) {
    const int64_t end = std::min(outer, begin + step);
    const auto part_of = [&](const Matrix& m, int64_t from, int64_t to) {
      return transposed ? m.row_range(from, to) : m.column_range(from, to);
    };
    const Matrix part = part_of(panel, 0, end - begin);
    convert_rows(part_of(b, begin, end), part);
    mm(part, c.column_range(begin, end));
  }
}

void times_transposed_plus(const Matrix& a, const Matrix& b, const Matrix* bias, const Matrix& y, WorkMemory& memory) {
  if (a.dtype == b.dtype) {
    if (bias == nullptr) return times(a, b, true, y, memory);
    if (by_own_kernel(a)) {
      return multiply(a, false, b, true, static_cast<const float*>(widened(*bias, memory).data), y, memory);
    }
    const auto plus = [&](const Matrix& x, const Matrix& result) {
      const Matrix all_rows = {bias->data, bias->dtype, result.rows, result.columns, 0};
      blas_plus(view_of(all_rows), view_of(x), view_of(b, true), view_of(result));
    };
    return a.dtype == DType::f32 ? plus(a, y) : with_padded_rows(a, y, memory, plus);
  }
  const Matrix sum = memory.matrix(DType::f32, y.rows, y.columns);
  times(a, b, true, sum, memory);
  const float* added = bias == nullptr ? nullptr : static_cast<const float*>(widened(*bias, memory).data);
  cpu::kernels().add_bias({y.dtype, static_cast<const float*>(sum.data), added, y.rows, y.columns, y.data});
}

void add_times_transposed(const Matrix& a, const Matrix& b, const Matrix& c, WorkMemory& memory) {
  if (a.dtype == DType::f32) {
    const Tensor sum = view_of(c);
    return blas_plus(sum, view_of(a), view_of(b, true), sum);
  }
  if (by_own_kernel(a)) return multiply(a, false, b, true, nullptr, c, memory);
  const Matrix product = memory.matrix(DType::bf16, c.rows, c.columns);
  times(a, b, true, product, memory);
  for (int64_t r = 0; r < c.rows; ++r)
    cpu::kernels().convert({DType::bf16, DType::f32, product.at(r, 0), c.at(r, 0), c.columns, true});
}

void add_transposed_times(const Matrix& a, const Matrix& b, const Matrix& c, WorkMemory& memory) {
  if (a.dtype == DType::f32) {
    const Tensor sum = view_of(c);
    return blas_plus(sum, view_of(a, true), view_of(b), sum);
  }
  if (by_own_kernel(a)) return multiply(a, true, b, false, nullptr, c, memory);
  // The BLAS would round the gradient to bf16 before it is added.
  add_transposed_times(widened(a, memory), widened(b, memory), c, memory);
}

}  // namespace samoe

// Of no tensors.
SAMOE_LIBRARY_IMPL(megatron_samoe, CompositeExplicitAutograd, m) {
  SAMOE_IMPL(m, "has_bf16_product", samoe::has_bf16_product);
  SAMOE_IMPL(m, "set_products", samoe::set_products);
  SAMOE_IMPL(m, "instruction_set", samoe::instruction_set);
}
