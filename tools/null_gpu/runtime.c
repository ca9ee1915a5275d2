/* The CUDA runtime and cuBLAS without arithmetic.

   Device memory is host memory that nobody touches, so allocating 24 GB costs nothing. Copies are done, streams and
   events exist, everything has finished at once. Launching a kernel or a matrix product does nothing but count. */
#define _GNU_SOURCE
#include "card.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

__attribute__((constructor)) static void refuse_a_real_gpu(void) {
    static const char *const files[] = {REAL_GPU_FILES}; /* from build.py */
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        if (access(files[i], F_OK) == 0) {
            fprintf(stderr, "null_gpu: refuses to load beside a real GPU (%s)\n", files[i]);
            _exit(2);
        }
}

/* --- memory ------------------------------------------------------------------------------------------------------- */

typedef struct {
    char *start;
    size_t size;
    enum cudaMemoryType type;
    size_t counted; /* of the card's memory; 0 for host memory, and for addresses that are only reserved */
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block *blocks;
static size_t num_blocks, room_for_blocks, used;
static cudaError_t last_error = cudaSuccess;

static size_t whole_pages(size_t size) { return (size + 4095) & ~(size_t)4095; }

static void *map_block(size_t size, enum cudaMemoryType type, size_t counted) {
    char *start = NULL;
    pthread_mutex_lock(&lock);
    if (used + counted <= card_bytes()) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        start = mmap(NULL, whole_pages(size), PROT_READ | PROT_WRITE, flags, -1, 0);
        if (start == MAP_FAILED) start = NULL;
    }
    if (start) {
        if (num_blocks == room_for_blocks) {
            room_for_blocks = room_for_blocks ? 2 * room_for_blocks : 1024;
            blocks = realloc(blocks, room_for_blocks * sizeof *blocks);
        }
        blocks[num_blocks++] = (Block){start, whole_pages(size), type, counted};
        used += counted;
    }
    pthread_mutex_unlock(&lock);
    return start;
}

static void unmap_block(void *start) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < num_blocks; i++)
        if (blocks[i].start == start) {
            munmap(start, blocks[i].size);
            used -= blocks[i].counted;
            blocks[i] = blocks[--num_blocks];
            break;
        }
    pthread_mutex_unlock(&lock);
}

static enum cudaMemoryType type_at(const char *at) {
    enum cudaMemoryType type = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < num_blocks; i++)
        if (at >= blocks[i].start && at < blocks[i].start + blocks[i].size) type = blocks[i].type;
    pthread_mutex_unlock(&lock);
    return type;
}

static cudaError_t allocated(void **at, size_t size, enum cudaMemoryType type) {
    *at = map_block(size, type, type == cudaMemoryTypeDevice ? whole_pages(size) : 0);
    return *at ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}

cudaError_t cudaMalloc(void **at, size_t size) { return allocated(at, size, cudaMemoryTypeDevice); }
cudaError_t cudaMallocManaged(void **at, size_t size, unsigned flags) { return cudaMalloc(at, size); }
cudaError_t cudaMallocAsync(void **at, size_t size, cudaStream_t stream) { return cudaMalloc(at, size); }
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) { return allocated(at, size, cudaMemoryTypeHost); }
cudaError_t cudaFree(void *at) { return unmap_block(at), cudaSuccess; }
cudaError_t cudaFreeAsync(void *at, cudaStream_t stream) { return cudaFree(at); }
cudaError_t cudaFreeHost(void *at) { return cudaFree(at); }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = card_bytes();
    *available = *total - used;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *at) {
    *attributes = (struct cudaPointerAttributes){type_at(at), 0, (void *)at, (void *)at};
    return cudaSuccess;
}

/* Larger copies are left out, as arithmetic is, where memory is all that is asked for. */
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    if (size <= setting("NULLGPU_LARGEST_COPY", -1)) memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int d, const void *from, int s, size_t size, cudaStream_t stream) {
    return cudaMemcpy(to, from, size, cudaMemcpyDefault);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t i = 0; i < height; i++) cudaMemcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width, kind);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *at, int value, size_t size) {
    if (size <= setting("NULLGPU_LARGEST_COPY", -1)) memset(at, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) {
    return cudaMemset(at, value, size);
}

/* Expandable segments, which Unsloth switches on: torch asks the driver for addresses, and for memory to put there. */

typedef unsigned long long Handle; /* its value is the size that it stands for */

static int granularity(size_t *bytes, const void *properties, int option) { return *bytes = 2 << 20, 0; }
static int reserve(void **at, size_t size, size_t alignment, void *hint, Handle flags) {
    return (*at = map_block(size, cudaMemoryTypeDevice, 0)) ? 0 : cudaErrorMemoryAllocation;
}
static int create(Handle *handle, size_t size, const void *properties, Handle flags) {
    pthread_mutex_lock(&lock);
    int fits = used + size <= card_bytes();
    if (fits) used += *handle = size;
    pthread_mutex_unlock(&lock);
    return fits ? 0 : cudaErrorMemoryAllocation;
}
static int release(Handle handle) {
    pthread_mutex_lock(&lock);
    used -= handle;
    pthread_mutex_unlock(&lock);
    return 0;
}
static int unmap(void *at, size_t size) { return madvise(at, size, MADV_DONTNEED), 0; }
static int free_addresses(void *at, size_t size) { return unmap_block(at), 0; }
static int describe(int error, const char **text) { return *text = cudaGetErrorString(error), 0; }
static int nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    static const struct { const char *name; void *function; } own[] = {
        {"cuMemGetAllocationGranularity", granularity}, {"cuMemAddressReserve", reserve}, {"cuMemCreate", create},
        {"cuMemRelease", release}, {"cuMemUnmap", unmap}, {"cuMemAddressFree", free_addresses},
        {"cuGetErrorString", describe}};
    *function = nothing;
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (!strcmp(name, own[i].name)) *function = own[i].function;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}

/* --- the card ----------------------------------------------------------------------------------------------------- */

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    return *value = card_attribute(attribute), cudaSuccess;
}
/* A macro of the header makes this cudaGetDeviceProperties_v2. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
    const char *name = getenv("NULLGPU_NAME");
    memset(card, 0, sizeof *card);
    strncpy(card->name, name ? name : "Null GPU", sizeof card->name - 1);
    card->totalGlobalMem = card_bytes();
    card->major = capability() / 10;
    card->minor = capability() % 10;
    card->multiProcessorCount = card_attribute(cudaDevAttrMultiProcessorCount);
    card->warpSize = card_attribute(cudaDevAttrWarpSize);
    card->maxThreadsPerBlock = card_attribute(cudaDevAttrMaxThreadsPerBlock);
    card->maxThreadsPerMultiProcessor = card_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    card->regsPerBlock = card->regsPerMultiprocessor = card_attribute(cudaDevAttrMaxRegistersPerBlock);
    card->sharedMemPerBlock = card_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    card->sharedMemPerBlockOptin = card_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    card->sharedMemPerMultiprocessor = card_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    for (int i = 0; i < 3; i++) {
        card->maxThreadsDim[i] = card_attribute(cudaDevAttrMaxBlockDimX + i);
        card->maxGridSize[i] = card_attribute(cudaDevAttrMaxGridDimX + i);
    }
    card->l2CacheSize = card_attribute(cudaDevAttrL2CacheSize);
    card->memoryBusWidth = card_attribute(cudaDevAttrGlobalMemoryBusWidth);
    card->textureAlignment = 512;
    card->canMapHostMemory = card->concurrentKernels = card->unifiedAddressing = card->asyncEngineCount = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { return strncpy(text, "0000:01:00.0", size), 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { return *can = 0, cudaSuccess; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    return last_error = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : error ? "an error of the null GPU" : "no error";
}
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

/* --- streams and events ------------------------------------------------------------------------------------------- */

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    static size_t created;
    return *stream = (cudaStream_t)(0x1000 + 16 * __sync_add_and_fetch(&created, 1)), cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
/* This one too becomes _v2. */
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, size_t *count) {
    if (id) *id = 0;
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return *event = calloc(1, sizeof(struct timespec)), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event), cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    const struct timespec *a = (void *)start, *b = (void *)end;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) / 1e6f;
    return cudaSuccess;
}

/* --- kernels and matrix products ---------------------------------------------------------------------------------- */

long nullgpu_launches; /* what was asked for and not computed; read by on_cpu.launches() */

static int launched(void) { return __sync_fetch_and_add(&nullgpu_launches, 1), 0; }

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) { return launched(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *launch, const void *kernel, void **arguments) {
    return launched();
}
int cuLaunchKernel(void) { return launched(); }
int cuLaunchKernelEx(void) { return launched(); }
int cuLaunchCooperativeKernel(void) { return launched(); }
int cublasGemmEx(void) { return launched(); }
int cublasGemmStridedBatchedEx(void) { return launched(); }
int cublasSgemm_v2(void) { return launched(); }
int cublasSgemmStridedBatched(void) { return launched(); }
int cublasLtMatmul(void) { return launched(); }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    *attributes = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = capability(),
                                              .binaryVersion = capability(), .maxDynamicSharedSizeBytes = 49152};
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int block,
                                                                   size_t shared, unsigned flags) {
    return *count = 2, cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { return *at = (void *)symbol, cudaSuccess; }

/* What nvcc's host code calls around its kernels. */
void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
char __cudaInitModule(void **handle) { return 0; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = *block = (dim3){1, 1, 1};
    return *shared = 0, *stream = NULL, cudaSuccess;
}

static int new_object(void **object) { return *object = calloc(1, 512), 0; }
static int drop_object(void *object) { return free(object), 0; }
int cublasCreate_v2(void **handle) { return new_object(handle); }
int cublasDestroy_v2(void *handle) { return drop_object(handle); }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasLtMatmulDescCreate(void **object, int compute, int scale) { return new_object(object); }
int cublasLtMatmulDescDestroy(void *object) { return drop_object(object); }
int cublasLtMatrixLayoutCreate(void **object, int type, size_t rows, size_t columns, long lead) {
    return new_object(object);
}
int cublasLtMatrixLayoutDestroy(void *object) { return drop_object(object); }
int cublasLtMatmulPreferenceCreate(void **object) { return new_object(object); }
int cublasLtMatmulPreferenceDestroy(void *object) { return drop_object(object); }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t: an algorithm that needs no workspace */
    return *found = 1, 0;
}
