// Chooses the kernels' instruction set once, and how they read, from what this CPU has.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../kernels.h"

namespace samoe {
namespace cpu {

#define SAMOE_DECLARE(result, name, arguments) result name arguments;
#define SAMOE_NAME(result, name, arguments) , name
#define SAMOE_SET(isa)                                            \
  namespace isa {                                                 \
  SAMOE_KERNELS(SAMOE_DECLARE)                                    \
  static const Kernels table = {#isa SAMOE_KERNELS(SAMOE_NAME)}; \
  }

SAMOE_SET(portable)
#if defined(SAMOE_WITH_X86_SETS)
SAMOE_SET(avx2)
SAMOE_SET(avx512)
#endif

namespace {

const Kernels* choose() {
#if defined(SAMOE_WITH_X86_SETS)
  const char* asked = std::getenv("MEGATRON_SAMOE_ISA");
  const bool allow_avx512 = asked == nullptr || std::strcmp(asked, "avx512") == 0;
  const bool allow_avx2 = allow_avx512 || std::strcmp(asked, "avx2") == 0;
  if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return &avx512::table;
  }
  if (allow_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
  return &portable::table;
}

int64_t first_cache_bytes() {
  long bytes = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
  return bytes > 0 ? bytes : 32 << 10;
}

// Zen 5 and later are AMD's families from 26 on. Pages in turn need a first cache that holds them beside what is multiplied; of
// Intel's processors only an Ice Lake was measured.
Reading reading_of_streams() {
#if defined(__x86_64__)
  unsigned a = 0, vendor[3] = {}, unused = 0;
  if (__get_cpuid(0, &a, &vendor[0], &vendor[2], &vendor[1]) == 0) return Reading::second_cache;
  if (std::memcmp(vendor, "GenuineIntel", 12) == 0)
    return first_cache_bytes() >= 48 << 10 ? Reading::pages_in_turn : Reading::second_cache;
  if (std::memcmp(vendor, "AuthenticAMD", 12) != 0) return Reading::second_cache;
  if (__get_cpuid(1, &a, &unused, &unused, &unused) == 0) return Reading::second_cache;
  const unsigned family = a >> 8 & 0xf, extended = a >> 20 & 0xff;
  if (family == 0xf && family + extended >= 26) return Reading::first_cache;
#endif
  return Reading::second_cache;
}

}  // namespace

const Caches& caches() {
  static const Caches known = {first_cache_bytes(), reading_of_streams()};
  return known;
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace cpu
}  // namespace samoe
