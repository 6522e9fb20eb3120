// g++'s calls of OpenMP, answered by std::thread, for ThreadSanitizer: it knows nothing of the barriers of g++'s own
// runtime, which is not built for it, and would report races that are not there. Linked in place of that runtime; has what
// the kernels use: parallel regions, barriers, loops of the static schedule (which call only omp_get_*) and the dynamic.
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  long next, end, step;  // step: of a chunk, and of its sign
};

struct Team {
  explicit Team(unsigned size) : size(size) {}
  const unsigned size;
  std::mutex mutex;
  std::condition_variable turned;
  unsigned arrived = 0, turn = 0;
  std::deque<Loop> loops;  // of the dynamic schedule, in the order in which every thread meets them
};

struct Place {
  Team* team = nullptr;
  unsigned number = 0;
  size_t num_loops = 0;  // that this thread has begun
};
thread_local Place place;

bool take_chunk(Loop& loop, long* begin, long* end) {
  const bool up = loop.step > 0;
  if (up ? loop.next >= loop.end : loop.next <= loop.end) return false;
  *begin = loop.next;
  *end = loop.next += loop.step;
  if (up ? *end > loop.end : *end < loop.end) *end = loop.end;
  return true;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return static_cast<int>(place.number); }
int omp_get_num_threads() { return place.team == nullptr ? 1 : static_cast<int>(place.team->size); }
int omp_get_max_threads() { return 2; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  Team team(num_threads == 0 ? 2 : num_threads);
  const Place before = place;
  std::vector<std::thread> threads;
  for (unsigned number = 1; number < team.size; ++number) {
    threads.emplace_back([&team, number, body, data] {
      place = {&team, number, 0};
      body(data);
    });
  }
  place = {&team, 0, 0};
  body(data);
  for (std::thread& thread : threads) thread.join();
  place = before;
}

void GOMP_barrier() {
  Team& team = *place.team;
  std::unique_lock<std::mutex> lock(team.mutex);
  const unsigned turn = team.turn;
  if (++team.arrived == team.size) {
    team.arrived = 0;
    ++team.turn;
    team.turned.notify_all();
  }
  team.turned.wait(lock, [&] { return team.turn != turn; });
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* begin, long* stop) {
  const size_t number = place.num_loops++;
  std::lock_guard<std::mutex> lock(place.team->mutex);
  std::deque<Loop>& loops = place.team->loops;
  if (loops.size() == number) loops.push_back({start, end, step * chunk});
  return take_chunk(loops[number], begin, stop);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* stop) {
  std::lock_guard<std::mutex> lock(place.team->mutex);
  return take_chunk(place.team->loops[place.num_loops - 1], begin, stop);
}

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
