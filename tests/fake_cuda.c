/* A libcuda.so.1 for machines without a GPU: all that Triton's driver and launcher call.

   Modules are not loaded and nothing runs; a launch is handed to whoever watches, once the limits
   that a real driver checks are kept. */
#include "cuda.h"

enum { THREADS = 1024, REGISTERS = 65536, SHARED = 227 * 1024, GRID_YZ = 65535 };

typedef void (*Watcher)(CUfunction, const CUlaunchConfig *, void **);
static Watcher watcher;
static CUcontext context;
static size_t functions;

void watch(Watcher one) { watcher = one; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  if (config->gridDimX > 0x7fffffffu || config->gridDimY > GRID_YZ || config->gridDimZ > GRID_YZ)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->blockDimX > THREADS || config->sharedMemBytes > SHARED)
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  if (watcher) watcher(f, config, params);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "too many resources requested";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) { *current = context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext one) { context = one; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *one, CUdevice device) {
  *one = (CUcontext)&context;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
