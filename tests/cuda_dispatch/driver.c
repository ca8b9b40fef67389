/* A stand-in for the CUDA runtime: it makes a CUDA build of torch believe in one H200, on a machine without a GPU.
 *
 * It is preloaded (LD_PRELOAD), so that these functions take the place of those of libcudart. They are all that torch
 * calls for tensors that hold nothing: find the device, make streams and events, order them. Nothing is computed, and
 * nothing takes time.
 *
 * Every function that is not here reaches the real runtime, which finds no driver and returns an error. So whatever
 * launches a kernel, copies memory or waits for the device raises an exception in Python.
 */
#include <driver_types.h> /* the struct of device properties, in the layout of torch's own version of CUDA */
#include <stdlib.h>
#include <string.h>

static void *new_handle(void) { return malloc(1); } /* streams and events need addresses that differ, and no more */

/* The device: the figures of an H200 that torch reads. */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device)
{
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NVIDIA H200");
    found->major = 9; /* compute capability 9.0 */
    found->multiProcessorCount = 132;
    found->totalGlobalMem = 143771ull << 20;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = 227 << 10;
    found->sharedMemPerMultiprocessor = 228 << 10;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 60 << 20;
    return cudaSuccess;
}

/* torch 2.11 starts a device by allocating one number, in a block of 2 MiB. No other tensor has memory. */

cudaError_t cudaMalloc(void **address, size_t size)
{
    *address = size <= 2 << 20 ? aligned_alloc(512, size) : NULL;
    return *address != NULL ? cudaSuccess : cudaErrorMemoryAllocation;
}

/* A kernel cannot be launched. torch asks for the error afterwards. */

static __thread cudaError_t last_error = cudaSuccess;

cudaError_t cudaLaunchKernel(void) { return last_error = cudaErrorInsufficientDriver; }
cudaError_t cudaLaunchKernelExC(void) { return last_error = cudaErrorInsufficientDriver; }

cudaError_t cudaGetLastError(void)
{
    cudaError_t found = last_error;
    last_error = cudaSuccess;
    return found;
}

/* Streams and events. */

cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest)
{
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    *event = new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }

/* No stream is captured into a graph. */

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = cudaStreamCaptureStatusNone; /* the further arguments are optional, and without a capture unchanged */
    return cudaSuccess;
}

/* The driver has none of the functions that torch asks for. */

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result)
{
    *function = NULL;
    if (result != NULL)
        *result = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* The driver itself. One library of torch is linked to libcuda.so.1, so this file is built under that name and has its
 * functions. torch asks one of them whether the device is in use. With the others it compiles and launches kernels, which
 * must not happen here: each returns an error. */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = 0;
    *active = 1;
    return 0;
}

#define CUDA_ERROR_NOT_SUPPORTED 801
#define ABSENT(name) \
    int name(void) { return CUDA_ERROR_NOT_SUPPORTED; }

ABSENT(cuCtxGetCurrent) ABSENT(cuCtxSetCurrent) ABSENT(cuDeviceGet) ABSENT(cuDeviceGetAttribute)
ABSENT(cuDevicePrimaryCtxRetain) ABSENT(cuFuncGetAttribute)
ABSENT(cuFuncSetAttribute) ABSENT(cuFuncSetCacheConfig) ABSENT(cuGetErrorString)
ABSENT(cuLaunchCooperativeKernel) ABSENT(cuLaunchKernel) ABSENT(cuLinkAddData_v2) ABSENT(cuLinkComplete)
ABSENT(cuLinkCreate_v2) ABSENT(cuModuleGetFunction) ABSENT(cuModuleLoad) ABSENT(cuModuleLoadData)
ABSENT(cuModuleLoadDataEx) ABSENT(cuModuleUnload) ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor)
ABSENT(cuPointerGetAttribute) ABSENT(cuTensorMapEncodeTiled)
