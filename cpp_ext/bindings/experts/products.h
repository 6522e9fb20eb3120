// Matrix products of one expert on one thread, and the memory in which they work.
//
// The products are the BLAS that torch brings: inside a parallel region it runs on the calling thread alone. In bf16 on
// CPUs with AVX-512's dot products and no matrix tiles they are our own kernel's. Where the CPU multiplies bf16 no faster
// than fp32, bf16 operands are widened a panel at a time, which stays in the cache.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "../../kernels/kernels.h"
#include "../torch_abi.h"

namespace samoe {

// A matrix somewhere in memory, rows contiguous.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, columns, stride;

  size_t element_size() const { return dtype == DType::f32 ? 4 : 2; }
  void* at(int64_t row, int64_t column) const {
    return static_cast<char*>(data) + static_cast<size_t>(row * stride + column) * element_size();
  }
  Matrix row_range(int64_t begin, int64_t end) const { return {at(begin, 0), dtype, end - begin, columns, stride}; }
  Matrix column_range(int64_t begin, int64_t end) const { return {at(0, begin), dtype, rows, end - begin, stride}; }
};

// Memory that one thread uses for the length of a task and that is kept for the next: fresh pages would cost more than
// some products. Returned by reset(); pointers stay valid until then.
class WorkMemory {
 public:
  Matrix matrix(DType dtype, int64_t rows, int64_t columns) {
    const size_t size = static_cast<size_t>(rows * columns) * (dtype == DType::f32 ? 4 : 2);
    return {take(size), dtype, rows, columns, columns};
  }
  void* take(size_t bytes);
  void reset();

 private:
  struct Free {
    void operator()(void* p) const;
  };
  struct Block {
    std::unique_ptr<char, Free> data;
    size_t size;
  };
  static Block allocate(size_t bytes);
  std::vector<Block> blocks_;  // one after the first calls, of the largest need so far
  size_t used_ = 0;            // of the last block
  size_t total_ = 0;           // taken since reset()
  size_t least_ = 0;           // size of the next block
};

// Lends work memory to calls; keeps as much as the most calls at one time have used.
class WorkMemoryPool {
 public:
  std::unique_ptr<WorkMemory> borrow();
  void give_back(std::unique_ptr<WorkMemory> memory);
  static WorkMemoryPool& instance();

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<WorkMemory>> free_;
};

class LentMemory {
 public:
  LentMemory() : memory_(WorkMemoryPool::instance().borrow()) {}
  ~LentMemory() { WorkMemoryPool::instance().give_back(std::move(memory_)); }
  LentMemory(const LentMemory&) = delete;
  LentMemory& operator=(const LentMemory&) = delete;
  WorkMemory* operator->() { return memory_.get(); }
  WorkMemory& operator*() { return *memory_; }

 private:
  std::unique_ptr<WorkMemory> memory_;
};

// How bf16 products are made: by our own kernel, which sums weight gradients in fp32; by the BLAS; or in fp32, from
// widened operands. MEGATRON_SAMOE_BF16_PRODUCTS=native|blas|fp32|auto decides: native is our kernel where it runs.
enum class Bf16Products { own, blas, fp32 };
Bf16Products bf16_products();

// c = a b for b [k, n], or a b^T for b [n, k]. Operands of a type; or a and c in fp32 and b in bf16, which is widened by
// panels.
void times(const Matrix& a, const Matrix& b, bool transposed, const Matrix& c, WorkMemory& memory);
// y = a b^T + bias, a vector of y's type or null; types as above, but that y is bf16 where b is widened.
void times_transposed_plus(const Matrix& a, const Matrix& b, const Matrix* bias, const Matrix& y, WorkMemory& memory);
// c += a^T b with c in fp32.
void add_transposed_times(const Matrix& a, const Matrix& b, const Matrix& c, WorkMemory& memory);
// Returns m, or a copy in fp32.
Matrix widened(const Matrix& m, WorkMemory& memory);

}  // namespace samoe
