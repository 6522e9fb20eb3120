// Shares the experts of a layer out to threads.
#include "expert_plan.h"

#include <algorithm>

namespace samoe {
namespace cpu {
namespace {

constexpr int64_t kLeastRows = 64;      // fewer rows at once, and packing the weights costs more than waiting
constexpr int64_t kLeastColumns = 128;  // of a weight gradient

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Pieces of begin to end that become smaller, so that threads which take them end together.
void add_pieces(ExpertPlan* plan, ExpertTask::Kind kind, int64_t expert, int64_t begin, int64_t end, int64_t least,
                int num_threads) {
  while (begin < end) {
    const int64_t left = end - begin;
    int64_t piece = rounded_up(std::max(least, left / (2 * num_threads)), 16);
    if (left - piece < least) piece = left;
    plan->tasks.push_back({kind, expert, begin, begin + piece});
    begin += piece;
  }
}

}  // namespace

ExpertPlan plan_experts(const int64_t* rows_E, int64_t num_experts, int64_t up_width, int64_t width, int num_threads,
                        bool backward) {
  std::vector<int64_t> begins(static_cast<size_t>(num_experts)), largest_first;
  int64_t total = 0;
  for (int64_t e = 0; e < num_experts; total += rows_E[e], ++e) {
    begins[static_cast<size_t>(e)] = total;
    if (rows_E[e] > 0) largest_first.push_back(e);
  }
  std::stable_sort(largest_first.begin(), largest_first.end(),
                   [&](int64_t a, int64_t b) { return rows_E[a] > rows_E[b]; });
  // What is left for the end: all of a shared expert, or its weights' gradients, half of its products.
  size_t num_shared = 0;
  int64_t shared = 0;
  while (num_shared < largest_first.size() &&
         shared < (num_threads - 1) * rows_E[largest_first[num_shared]] * (backward ? 2 : 1)) {
    shared += rows_E[largest_first[num_shared++]];
  }
  ExpertPlan plan;
  const auto add_shared = [&](const auto& add) {
    std::for_each_n(largest_first.begin(), num_shared, [&](int64_t e) {
      const int64_t begin = begins[static_cast<size_t>(e)];
      add(e, begin, begin + rows_E[e]);
    });
  };
  const auto add_rows = [&](int64_t e, int64_t begin, int64_t end) {
    add_pieces(&plan, ExpertTask::rows, e, begin, end, kLeastRows, num_threads);
  };
  if (backward) add_shared(add_rows);
  plan.num_rows_tasks = plan.tasks.size();
  std::for_each(largest_first.begin() + static_cast<std::ptrdiff_t>(num_shared), largest_first.end(), [&](int64_t e) {
    const int64_t begin = begins[static_cast<size_t>(e)];
    plan.tasks.push_back({ExpertTask::whole, e, begin, begin + rows_E[e]});
  });
  if (!backward) {
    add_shared(add_rows);
    return plan;
  }
  add_shared([&](int64_t e, int64_t, int64_t) {
    add_pieces(&plan, ExpertTask::grad1, e, 0, up_width, kLeastColumns, num_threads);
    add_pieces(&plan, ExpertTask::grad2, e, 0, width, kLeastColumns, num_threads);
  });
  return plan;
}

}  // namespace cpu
}  // namespace samoe
