// Matrix products of one expert on one thread, and the memory in which they work.
//
// The products are the BLAS that torch brings: inside a parallel region it runs on the calling thread alone. In bf16 they
// may be our own kernel's, or of operands that are widened a panel at a time, which stays in the cache: ops/cpu_products.py
// chooses by the processor.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
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

// Runs run(i, memory, failed) for i below num, each thread taking the next one when it is free. After an exception, which is
// thrown again at the end, `failed` is set and nothing more begins.
template <typename Run>
void run_tasks(size_t num, int num_threads, Run run) {
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
#pragma omp parallel num_threads(num_threads)
  {
    LentMemory memory;
    for (size_t i = next++; i < num && !failed; i = next++) {
      try {
        memory->reset();
        run(i, *memory, failed);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

// What ops/cpu_products.py chose. bf16 products of experts: by our own kernel, which sums weight gradients in fp32; by the
// BLAS; or in fp32, from widened operands. And the tokens from which inference takes whole products, by type of weight.
enum class Bf16Products { own, blas, fp32 };
struct ProductChoice {
  Bf16Products bf16;
  int64_t fp32_tokens, bf16_tokens;
};
ProductChoice product_choice();

// c = a b for b [k, n], or a b^T for b [n, k]. Operands of a type; or a and c in fp32 and b in bf16, which is widened by
// panels.
void times(const Matrix& a, const Matrix& b, bool transposed, const Matrix& c, WorkMemory& memory);
// y = a b^T + bias, a vector of y's type or null; types as above, but that y is bf16 where b is widened.
void times_transposed_plus(const Matrix& a, const Matrix& b, const Matrix* bias, const Matrix& y, WorkMemory& memory);
// c += a^T b with c in fp32.
void add_transposed_times(const Matrix& a, const Matrix& b, const Matrix& c, WorkMemory& memory);
// c += a b^T with c in fp32.
void add_times_transposed(const Matrix& a, const Matrix& b, const Matrix& c, WorkMemory& memory);
// Returns m, or a copy in fp32.
Matrix widened(const Matrix& m, WorkMemory& memory);

}  // namespace samoe
