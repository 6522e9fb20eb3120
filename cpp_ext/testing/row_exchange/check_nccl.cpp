// Checks how the NCCL all-to-all uses a device's streams, with a queue that writes down what it is asked, one rank, and
// the library of the tests (MEGATRON_SAMOE_NCCL_LIB). Exits with 1 and a line for each thing that is wrong.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../comm/cuda_queue.h"

using samoe::comm::CudaQueue;
using samoe::comm::DeviceQueue;
using samoe::comm::Mark;
using samoe::comm::NcclAllToAll;
using samoe::comm::Progress;

namespace {

std::string events;  // what the device was asked, in order: f, m1, l1, ...
int marks = 0;
std::atomic<bool> reached[16];
std::atomic<bool> broken{false};  // the device

class LoggedMark : public Mark {
 public:
  explicit LoggedMark(int number) : number_(number) {}
  bool reached() override {
    if (broken) throw std::runtime_error("broken");
    return ::reached[number_];
  }
  void lead_caller() override { events += "l" + std::to_string(number_) + " "; }

 private:
  int number_;
};

class LoggedQueue : public DeviceQueue {
 public:
  void* stream() override { return nullptr; }
  void follow_caller() override { events += "f "; }
  std::unique_ptr<Mark> mark() override {
    events += "m" + std::to_string(++marks) + " ";
    return std::make_unique<LoggedMark>(marks);
  }
};

std::atomic<int> failures{0};

void expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("wrong: %s; the device was asked: %s\n", what.c_str(), events.c_str());
  ++failures;
}

void expect_events(const std::string& expected, const std::string& what) {
  expect(events == expected, what + " (expected " + expected + ")");
  events.clear();
}

template <typename Function>
Function stand_in(const char* name) {
  return reinterpret_cast<Function>(dlsym(dlopen(std::getenv("MEGATRON_SAMOE_NCCL_LIB"), RTLD_NOW), name));
}

int64_t count(const char* what) { return stand_in<int64_t (*)(const char*)>("megatron_samoe_stand_in_count")(what); }

std::unique_ptr<NcclAllToAll> connected(double timeout_s,
                                        std::unique_ptr<DeviceQueue> queue = std::make_unique<LoggedQueue>()) {
  std::string why;
  auto communicator = std::make_unique<NcclAllToAll>(samoe::comm::nccl_api(&why), 0, 1, timeout_s, std::move(queue));
  expect(communicator->connect({communicator->address()}).empty(), "connect");
  while (communicator->finish(0, 0.01) == Progress::pending) {
  }
  events.clear();
  return communicator;
}

}  // namespace

int main() {
  std::string why;
  if (samoe::comm::nccl_api(&why) == nullptr) {
    std::printf("%s\n", why.c_str());
    return 1;
  }
  std::vector<char> input(64, 'x'), output(64, 'y');
  {
    const auto communicator = connected(30.0);
    const auto start = [&] {
      const std::string problem = communicator->start(input.data(), output.data(), {{0, 64}}, {{0, 64}});
      if (problem.empty()) expect(communicator->finish_enqueueing(1.0) == Progress::done, "enqueued");
      return problem;
    };
    expect(start().empty() && start().empty() && communicator->last_started() == 2, "two exchanges start");
    expect_events("f m1 f m2 ", "each follows the caller before it is enqueued and is marked after");
    expect(communicator->finish(1, 1.0) == Progress::done, "the end of the first");
    expect_events("l1 ", "the caller waits for the exchange that it asks for, not for later ones");
    expect(communicator->finish(2, 1.0) == Progress::done && communicator->finish(2, 1.0) == Progress::done, "twice");
    expect_events("l2 l2 ", "every stream that asks waits");
    // The watchdog forgets what the device has done.
    reached[1] = reached[2] = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    expect(communicator->finish(1, 1.0) == Progress::done, "an exchange that was done long ago");
    expect_events("", "nobody waits for what is done");
    std::vector<char> between(64);
    expect(communicator->start_hops({{{{0, input.data(), 64}}, {{0, between.data(), 64}}},
                                     {{{0, between.data(), 64}}, {{0, output.data(), 64}}}}).empty() &&
               communicator->finish_enqueueing(1.0) == Progress::done, "two hops");
    expect_events("f m3 ", "two hops follow the caller once and are marked once");
    expect(communicator->position().waiting == 3 && communicator->use_staging(between.data(), 64, 0.05) == Progress::pending,
           "memory waits for the exchanges before it");
    reached[3] = true;
    for (char* memory : {between.data(), input.data()}) {
      expect(communicator->use_staging(memory, 64, 1.0) == Progress::done, "registered, the second in place of the first");
    }
    expect(count("ncclCommRegister") == 2 && count("ncclCommDeregister") == 1, "registrations");
    communicator->abort("enough");
    expect(communicator->finish(3, 1.0) == Progress::failed && communicator->last_error() == "enough", "aborted");
    expect(start() == "enough", "later calls say why");
  }
  events.clear();
  {
    const auto communicator = connected(0.3);
    expect(communicator->start_even(input.data(), output.data(), 64).empty(), "an even exchange");
    expect(communicator->finish(1, 1.0) == Progress::done, "the device has its orders");
    std::this_thread::sleep_for(std::chrono::milliseconds(800));  // and mark 4 is never reached
    expect(communicator->last_error().find("did not end the ncclAlltoAll of 64 bytes for each rank, exchange 1") !=
               std::string::npos, "the watchdog gives up: " + communicator->last_error());
    expect(communicator->start(input.data(), output.data(), {{0, 64}}, {{0, 64}}) == communicator->last_error(),
           "the next exchange says so");
  }
  {
    const auto communicator = connected(30.0);
    expect(communicator->start_even(input.data(), output.data(), 64).empty(), "an exchange on a device that breaks");
    expect(communicator->finish(1, 1.0) == Progress::done, "it has its orders");
    broken = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    expect(communicator->finish(1, 0.0) == Progress::failed && communicator->last_error() == "the device failed: broken",
           "the watchdog outlives the device: " + communicator->last_error());
    communicator->close();
    broken = false;
  }
  {
    const auto communicator = connected(30.0);
    const int number = marks + 1;
    expect(communicator->start_even(input.data(), output.data(), 64).empty(), "an exchange before the end");
    std::thread device([number] {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      reached[number] = true;
    });
    communicator->close();
    expect(reached[number], "the end waits for what is under way");
    device.join();
  }
  {
    // As in training: another thread looks how far the exchanges are, and a third gives up.
    const auto communicator = connected(30.0);
    for (auto& mark : reached) mark = true;
    marks = 0;
    std::atomic<bool> over{false};
    std::thread looking([&] {
      while (!over) expect(communicator->position().started <= 12 && communicator->last_error().size() < 20, "a look");
    });
    for (int i = 0; i < 12; ++i) {
      expect(communicator->start_even(input.data(), output.data(), 64).empty(), "one of many exchanges");
      expect(communicator->finish(i + 1, 1.0) == Progress::done, "its end");
    }
    std::thread([&] { communicator->abort("a third thread"); }).join();
    expect(communicator->finish(12, 1.0) == Progress::failed, "given up by another thread");
    over = true;
    looking.join();
    communicator->close();
  }
  {
    // The watchdog asks for events while another thread captures a CUDA graph, which an unguarded question would break.
    auto* const cuda = samoe::comm::cuda_runtime(&why);
    expect(cuda != nullptr, "CUDA's runtime: " + why);
    auto queue = std::make_unique<CudaQueue>(cuda, 0, &why, [] { return nullptr; });
    const auto communicator = connected(30.0, std::move(queue));
    const auto capture = stand_in<void (*)(int)>("megatron_samoe_stand_in_capture");
    expect(communicator->start_even(input.data(), output.data(), 64).empty() &&
               communicator->finish_enqueueing(1.0) == Progress::done, "an exchange before a capture");
    capture(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    expect(communicator->position().waiting == -1, "the watchdog saw the end: " + communicator->last_error());
    capture(0);
    communicator->close();
  }
  {
    // The communicators that a process has fail together; a later one is not concerned.
    for (auto& mark : reached) mark = false;
    {
      const auto first = connected(30.0), second = connected(0.3);
      expect(second->start_even(input.data(), output.data(), 64).empty() &&
                 second->finish_enqueueing(1.0) == Progress::done, "an exchange that takes too long");
      std::this_thread::sleep_for(std::chrono::milliseconds(800));
      expect(first->finish(0, 0.0) == Progress::failed &&
                 first->last_error().find("another exchange of this process failed: rank 0 of 1, exchange 1: the device "
                                          "did not end the ncclAlltoAll") != std::string::npos,
             "it ends the others' waits: " + first->last_error());
    }
    const auto third = connected(30.0);
    expect(third->start_even(input.data(), output.data(), 64).empty() && third->last_error().empty(),
           "an exchange after that");
  }
  if (failures == 0) std::printf("all well\n");
  return failures == 0 ? 0 : 1;
}
