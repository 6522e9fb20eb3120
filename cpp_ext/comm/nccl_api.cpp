#include "nccl_api.h"

#include <dlfcn.h>

#include <climits>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

namespace samoe {
namespace comm {
namespace {

constexpr int kOldestVersion = 21800;     // the first with the non-blocking configuration used here
constexpr int kNextMajorVersion = 30000;  // whose interface may differ from the declarations in nccl_api.h

struct Search {
  std::unique_ptr<NcclApi> api;
  std::string why;
};

template <typename F>
bool find(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  return *function != nullptr;
}

// Fills the table from a library; returns an empty string, or what is missing.
std::string fill(void* library, NcclApi* api) {
  const bool complete =
      find(library, "ncclGetVersion", &api->get_version) && find(library, "ncclGetUniqueId", &api->get_unique_id) &&
      find(library, "ncclCommInitRankConfig", &api->comm_init_rank_config) &&
      find(library, "ncclCommGetAsyncError", &api->comm_get_async_error) &&
      find(library, "ncclCommAbort", &api->comm_abort) && find(library, "ncclGetErrorString", &api->get_error_string) &&
      find(library, "ncclGetLastError", &api->get_last_error) && find(library, "ncclGroupStart", &api->group_start) &&
      find(library, "ncclGroupEnd", &api->group_end) && find(library, "ncclSend", &api->send) &&
      find(library, "ncclRecv", &api->recv);
  if (!complete) return "it lacks a function of NCCL 2.18";
  if (api->get_version(&api->version) != kNcclSuccess) return "ncclGetVersion fails";
  if (api->version < kOldestVersion || api->version >= kNextMajorVersion) {
    return "it is NCCL " + nccl_version_text(api->version) +
           ", and 2.18 or a later NCCL 2 is needed: as torch brings it (pip install nvidia-nccl-cu12 or -cu13), or "
           "named by MEGATRON_SAMOE_NCCL_LIB";
  }
  if (!find(library, "ncclCommFinalize", &api->comm_finalize) ||
      !find(library, "ncclCommDestroy", &api->comm_destroy)) {
    api->comm_finalize = nullptr;
  }
  find(library, "ncclAlltoAll", &api->all_to_all);
  if (!find(library, "ncclCommRegister", &api->comm_register) ||
      !find(library, "ncclCommDeregister", &api->comm_deregister)) {
    api->comm_register = nullptr;
  }
  return "";
}

Search search() {
  Search result;
  std::vector<std::pair<std::string, int>> candidates;
  const char* asked = std::getenv("MEGATRON_SAMOE_NCCL_LIB");
  if (asked != nullptr) {
    candidates.emplace_back(asked, RTLD_NOW | RTLD_LOCAL);  // who names a library wants that one
  } else {
    candidates.emplace_back("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
    candidates.emplace_back("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  }
  for (const auto& [name, flags] : candidates) {
    void* library = dlopen(name.c_str(), flags);
    std::string problem;
    if (library == nullptr) {
      const char* error = dlerror();
      problem = (flags & RTLD_NOLOAD) != 0 ? "torch has not loaded it" : (error != nullptr ? error : "not found");
    } else {
      auto api = std::make_unique<NcclApi>();
      api->library = name;
      problem = fill(library, api.get());
      if (problem.empty()) {
        result.api = std::move(api);
        return result;
      }
    }
    result.why += (result.why.empty() ? "" : "; ") + name + ": " + problem;
  }
  result.why = "no usable NCCL library; tried " + result.why;
  return result;
}

}  // namespace

std::string nccl_version_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

NcclConfig nonblocking_config() {
  constexpr unsigned int kMagic = 0xcafebeef;
  return {sizeof(NcclConfig), kMagic, kOldestVersion, 0, INT_MIN, INT_MIN, INT_MIN, nullptr, INT_MIN};
}

const NcclApi* nccl_api(std::string* why) {
  // Never destroyed: at exit a watchdog may still ask NCCL how it is.
  static const Search& found = *new Search(search());
  if (why != nullptr) *why = found.why;
  return found.api.get();
}

}  // namespace comm
}  // namespace samoe
