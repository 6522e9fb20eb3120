// How the experts of a layer are divided among threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace samoe {
namespace cpu {

// One thread's piece of work on an expert: all of its rows and gradients, some of its rows, or some columns of a weight
// gradient of an expert whose rows several threads share.
struct ExpertTask {
  enum Kind { whole, rows, grad1, grad2 } kind;
  int64_t expert;
  int64_t begin, end;  // rows counted from the first of all experts; columns of the weight gradient
};

// Tasks that threads take in this order, each the next one when it is free.
struct ExpertPlan {
  std::vector<ExpertTask> tasks;
  size_t num_rows_tasks = 0;  // gradients of shared experts, which come last, need all of these done
};

// Whole experts per thread keep an expert's products in one core's cache and need no sum between threads. The largest
// experts are shared, as many as keep the other threads busy while one finishes its last whole expert: a thread that
// was slow, or had larger experts, then takes less of them. Depends on the sizes and the number of threads alone.
ExpertPlan plan_experts(const int64_t* rows_E, int64_t num_experts, int64_t up_width, int64_t width, int num_threads,
                        bool backward);

}  // namespace cpu
}  // namespace samoe
