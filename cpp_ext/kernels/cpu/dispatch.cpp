// Chooses the kernels' instruction set once, from what this CPU has.
#include <cstdlib>
#include <cstring>

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

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace cpu
}  // namespace samoe
