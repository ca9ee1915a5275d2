/* The part of the CUDA driver's interface that Triton and torch reach for past the runtime. */
#include "card.h"

int cuDriverGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = card_attribute(attribute), 0; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "an error of the null GPU", 0; }
int cuPointerGetAttribute(void **value, int attribute, void *at) { return *value = at, 0; }

int cuModuleLoad(void **module, const char *file) { return *module = (void *)1, 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)1, 0; }
int cuModuleLoadDataEx(void **module, const void *image, unsigned n, void *names, void *values) {
    return *module = (void *)1, 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = (void *)1, 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    enum { MAX_THREADS_PER_BLOCK = 0, NUM_REGS = 4 };
    return *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : attribute == NUM_REGS ? 32 : 0, 0;
}
int cuOccupancyMaxActiveClusters(int *count, void *function, void *launch) { return *count = 2, 0; }

int cuInit(unsigned flags) { return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int preference) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
