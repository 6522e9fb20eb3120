#include "all_to_all.h"

#include <atomic>
#include <mutex>

namespace samoe {
namespace comm {
namespace {

std::atomic<int64_t> failures{0};  // of this process's communicators

struct Latest {
  std::mutex mutex;
  std::string reason;
};

Latest& latest() {
  static Latest& failure = *new Latest();  // never destroyed: at exit a watchdog may still fail
  return failure;
}

}  // namespace

AllToAll::AllToAll(int rank, int world, double timeout_s)
    : rank_(rank), world_(world), timeout_s_(timeout_s), failures_before_(failures) {}

void AllToAll::tell_process(const std::string& reason) {
  std::lock_guard<std::mutex> lock(latest().mutex);
  if (failures != failures_before_) return;  // it fails because another did, or has said so
  latest().reason = reason;
  ++failures;
}

std::string AllToAll::lost_elsewhere() const {
  if (failures == failures_before_) return "";
  std::lock_guard<std::mutex> lock(latest().mutex);
  return "another exchange of this process failed: " + latest().reason;
}

}  // namespace comm
}  // namespace samoe
