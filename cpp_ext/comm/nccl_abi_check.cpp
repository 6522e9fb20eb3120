// Compares nccl_api.h and cuda_runtime.h with NVIDIA's own headers, where the compiler finds them (CPATH or -I). Compiles
// to nothing.
#include "cuda_runtime.h"
#include "nccl_api.h"

#if __has_include(<cuda_runtime_api.h>) && __has_include(<nccl.h>)
#include <nccl.h>

using samoe::comm::NcclConfig;
using samoe::comm::NcclUniqueId;
static_assert(cudaErrorNotReady == samoe::comm::kCudaNotReady &&
                  cudaEventDisableTiming == samoe::comm::kCudaEventWithoutTiming &&
                  cudaStreamCaptureModeThreadLocal == samoe::comm::kCudaCaptureThreadLocal,
              "CUDA's constants differ");
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
static_assert(NCCL_CONFIG_UNDEF_INT == -2147483647 - 1, "the configuration's mark differs");
#ifdef NCCL_API_MAGIC
static_assert(NCCL_API_MAGIC == 0xcafebeef, "the configuration's magic number differs");
#endif
#define SAMOE_SAME_TYPE(ours, theirs, type) \
  static_assert(sizeof(static_cast<type>(&theirs)) == sizeof(samoe::comm::NcclApi::ours), #theirs)
SAMOE_SAME_TYPE(send, ncclSend, ncclResult_t (*)(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t));
SAMOE_SAME_TYPE(recv, ncclRecv, ncclResult_t (*)(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t));
SAMOE_SAME_TYPE(get_version, ncclGetVersion, ncclResult_t (*)(int*));
SAMOE_SAME_TYPE(get_unique_id, ncclGetUniqueId, ncclResult_t (*)(ncclUniqueId*));
SAMOE_SAME_TYPE(comm_get_async_error, ncclCommGetAsyncError, ncclResult_t (*)(ncclComm_t, ncclResult_t*));
SAMOE_SAME_TYPE(comm_finalize, ncclCommFinalize, ncclResult_t (*)(ncclComm_t));
SAMOE_SAME_TYPE(comm_destroy, ncclCommDestroy, ncclResult_t (*)(ncclComm_t));
SAMOE_SAME_TYPE(comm_abort, ncclCommAbort, ncclResult_t (*)(ncclComm_t));
SAMOE_SAME_TYPE(get_error_string, ncclGetErrorString, const char* (*)(ncclResult_t));
SAMOE_SAME_TYPE(get_last_error, ncclGetLastError, const char* (*)(ncclComm_t));
SAMOE_SAME_TYPE(group_start, ncclGroupStart, ncclResult_t (*)());
SAMOE_SAME_TYPE(group_end, ncclGroupEnd, ncclResult_t (*)());
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0)
SAMOE_SAME_TYPE(all_to_all, ncclAlltoAll,
                ncclResult_t (*)(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t));
#endif
SAMOE_SAME_TYPE(comm_register, ncclCommRegister, ncclResult_t (*)(ncclComm_t, void*, size_t, void**));
SAMOE_SAME_TYPE(comm_deregister, ncclCommDeregister, ncclResult_t (*)(const ncclComm_t, void*));
SAMOE_SAME_TYPE(comm_init_rank_config, ncclCommInitRankConfig,
                ncclResult_t (*)(ncclComm_t*, int, ncclUniqueId, int, ncclConfig_t*));
#endif
