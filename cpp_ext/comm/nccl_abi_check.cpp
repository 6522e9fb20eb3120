// Compares nccl_api.h with NVIDIA's own header, where the compiler finds one (CPATH or -I). Compiles to nothing.
#include "nccl_api.h"

#if __has_include(<cuda_runtime_api.h>) && __has_include(<nccl.h>)
#include <nccl.h>

using samoe::comm::NcclConfig;
using samoe::comm::NcclUniqueId;
static_assert(ncclSuccess == samoe::comm::kNcclSuccess && ncclInProgress == samoe::comm::kNcclInProgress &&
                  ncclUint8 == samoe::comm::kNcclUint8,
              "the constants differ");
static_assert(sizeof(ncclUniqueId) == sizeof(NcclUniqueId), "the unique id differs");
#define SAMOE_SAME_PLACE(ours, theirs) \
  static_assert(offsetof(NcclConfig, ours) == offsetof(ncclConfig_t, theirs), #ours)
SAMOE_SAME_PLACE(size, size);
SAMOE_SAME_PLACE(magic, magic);
SAMOE_SAME_PLACE(version, version);
SAMOE_SAME_PLACE(blocking, blocking);
SAMOE_SAME_PLACE(cga_cluster_size, cgaClusterSize);
SAMOE_SAME_PLACE(min_ctas, minCTAs);
SAMOE_SAME_PLACE(max_ctas, maxCTAs);
SAMOE_SAME_PLACE(net_name, netName);
SAMOE_SAME_PLACE(split_share, splitShare);
static_assert(NCCL_API_MAGIC == 0xcafebeef && NCCL_CONFIG_UNDEF_INT == -2147483647 - 1,
              "the configuration's marks differ");
#define SAMOE_SAME_TYPE(ours, theirs, type) \
  static_assert(sizeof(static_cast<type>(&theirs)) == sizeof(samoe::comm::NcclApi::ours), #theirs)
SAMOE_SAME_TYPE(send, ncclSend, ncclResult_t (*)(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t));
SAMOE_SAME_TYPE(recv, ncclRecv, ncclResult_t (*)(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t));
SAMOE_SAME_TYPE(comm_init_rank_config, ncclCommInitRankConfig,
                ncclResult_t (*)(ncclComm_t*, int, ncclUniqueId, int, ncclConfig_t*));
#endif
