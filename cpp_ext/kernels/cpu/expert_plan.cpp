// Shares the experts of a layer out to threads.
#include "expert_plan.h"

#include <algorithm>

namespace samoe {
namespace cpu {
namespace {

constexpr int64_t kLeastRows = 128;     // fewer rows at once, and packing the weights costs more than waiting
constexpr int64_t kLeastColumns = 128;  // of a weight gradient

int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

void add_runs(std::vector<ExpertTask>* tasks, ExpertTask::Kind kind, int64_t expert, int64_t begin, int64_t num,
              int64_t run) {
  const int64_t parts = (num + run - 1) / run;
  for (int64_t i = 0; i < parts; ++i) {
    tasks->push_back({kind, expert, begin + num * i / parts, begin + num * (i + 1) / parts});
  }
}

}  // namespace

ExpertPlan plan_experts(const int64_t* rows_E, int64_t num_experts, int64_t up_width, int64_t width, int num_threads,
                        bool backward) {
  ExpertPlan plan;
  int64_t total = 0;
  for (int64_t e = 0; e < num_experts; ++e) total += rows_E[e];
  // An expert below this share of all rows delays the end by little, wherever it is put.
  const int64_t shared_from =
      num_threads == 1 ? total + 1 : std::max(2 * kLeastRows, total / (4 * static_cast<int64_t>(num_threads)) + 1);
  const int64_t run = std::max(kLeastRows, (total + 8 * num_threads - 1) / (8 * num_threads));
  int64_t begin = 0;
  for (int64_t e = 0; e < num_experts; begin += rows_E[e], ++e) {
    const int64_t n = rows_E[e];
    if (n == 0) continue;
    if (n < shared_from) {
      plan.first.push_back({ExpertTask::whole, e, begin, begin + n});
      continue;
    }
    add_runs(&plan.first, ExpertTask::rows, e, begin, n, run);
    if (!backward) continue;
    const int64_t columns1 = std::max(kLeastColumns, rounded_up(up_width / (2 * num_threads) + 1, 64));
    const int64_t columns2 = std::max(kLeastColumns, rounded_up(width / (2 * num_threads) + 1, 64));
    add_runs(&plan.second, ExpertTask::grad1, e, 0, up_width, columns1);
    add_runs(&plan.second, ExpertTask::grad2, e, 0, width, columns2);
  }
  const auto size = [](const ExpertTask& t) { return (t.end - t.begin) * (t.kind == ExpertTask::whole ? 3 : 2); };
  std::stable_sort(plan.first.begin(), plan.first.end(),
                   [&](const ExpertTask& a, const ExpertTask& b) { return size(a) > size(b); });
  return plan;
}

}  // namespace cpu
}  // namespace samoe
