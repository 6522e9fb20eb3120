// NCCL through a table of functions found at run time: the same build runs with any NCCL, or without one, and needs
// neither NVIDIA's headers nor its toolkit. nccl_abi_check.cpp compares these declarations with nccl.h where that is at
// hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace samoe {
namespace comm {

constexpr int kNcclSuccess = 0, kNcclInProgress = 7, kNcclUint8 = 1;

struct NcclUniqueId {
  char internal[128];
};

// The fields of NCCL 2.18, which later releases only append to. NCCL reads no more than `size` bytes.
struct NcclConfig {
  size_t size;
  unsigned int magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char* net_name;
  int split_share;
};
NcclConfig nonblocking_config();

using NcclHandle = void*;

struct NcclApi {
  int (*get_version)(int*);
  int (*get_unique_id)(NcclUniqueId*);
  int (*comm_init_rank_config)(NcclHandle*, int, NcclUniqueId, int, NcclConfig*);
  int (*comm_get_async_error)(NcclHandle, int*);
  int (*comm_abort)(NcclHandle);
  const char* (*get_error_string)(int);
  const char* (*get_last_error)(NcclHandle);
  int (*group_start)();
  int (*group_end)();
  int (*send)(const void*, size_t, int, int, NcclHandle, void*);
  int (*recv)(void*, size_t, int, int, NcclHandle, void*);
  // Null where the library has no such pair, which all of NVIDIA's have.
  int (*comm_finalize)(NcclHandle);
  int (*comm_destroy)(NcclHandle);
  // Null where the library is older: 2.28, 2.19.
  int (*all_to_all)(const void*, void*, size_t, int, NcclHandle, void*);
  int (*comm_register)(NcclHandle, void*, size_t, void**);
  int (*comm_deregister)(NcclHandle, void*);
  int version;
  std::string library;
};

std::string nccl_version_text(int version);  // such as 2.18.1

// The process's NCCL, looked for once: $MEGATRON_SAMOE_NCCL_LIB, the copy that torch has loaded, libnccl.so.2. Null
// where there is none; *why then lists what was tried.
const NcclApi* nccl_api(std::string* why);

}  // namespace comm
}  // namespace samoe
