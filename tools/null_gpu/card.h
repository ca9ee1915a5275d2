/* What the card says of itself: read from the environment, else an RTX 4090. */
#include <cuda_runtime_api.h>
#include <stdlib.h>

static size_t setting(const char *name, size_t otherwise) {
    const char *value = getenv(name);
    return value && *value ? strtoull(value, NULL, 10) : otherwise;
}

static size_t card_bytes(void) { return setting("NULLGPU_BYTES", 25757220864ull); }
static int capability(void) { return (int)setting("NULLGPU_CC", 89); }

static int shared_bytes_per_block(void) {
    int cc = capability();
    return cc == 90 ? 232448 : cc == 80 ? 166912 : cc >= 86 ? 101376 : 65536;
}

/* The runtime's cudaDevAttr and the driver's CU_DEVICE_ATTRIBUTE are the same numbers. */
static int card_attribute(int attribute) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrMultiProcessorCount: return (int)setting("NULLGPU_SMS", 128);
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return shared_bytes_per_block();
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return shared_bytes_per_block() + 1024;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return capability() < 80 ? 1024 : 1536;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 16;
    case cudaDevAttrL2CacheSize: return 75497472;
    case cudaDevAttrClockRate: return 2520000;
    case cudaDevAttrMemoryClockRate: return 10501000;
    case cudaDevAttrGlobalMemoryBusWidth: return 384;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels: return 1;
    default: return 0;
    }
}
