// CUDA's runtime, and what ggml calls of cuBLAS, without a GPU. Device memory is address space that
// nobody may touch, so that an access by the host is a segmentation fault; copies check their
// ranges; kernels are noted by name and compute nothing. Under it runs ggml's whole host side: what
// it supports, fuses, captures, allocates.
//
// NULLCUDA_COUNT, _CC, _SMS   the cards: how many, compute capability times ten, multiprocessors
// NULLCUDA_MEM_MB             their memory: of "4096,8192", the last is that of the cards beyond
// NULLCUDA_DRIVER             the error that counting cards gives: 35 of a driver that is too old
// NULLCUDA_FOREIGN            the module was built for other cards, so that no kernel starts
// NULLCUDA_REFUSE             the allocation, counted from 1, from which on there is no memory left
// NULLCUDA_GONE               the launch, counted from 1, from which on every call fails
// NULLCUDA_LOG                file that events are appended to; BAD begins those that must not be
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cxxabi.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <vector>

namespace {

long number(const char *variable, long otherwise) {
    const char *text = getenv(variable);
    return text ? atol(text) : otherwise;
}

struct Block {
    size_t size;
    int device;
};
struct Configuration {
    dim3 grid, block;
    size_t shared;
    void *stream;
};

// Never destroyed: ggml's own static objects free memory when the program ends.
struct Runtime {
    std::recursive_mutex mutex;
    FILE *log = nullptr;
    std::map<char *, Block> blocks;
    std::map<const void *, std::string> kernels;
    size_t used[16] = {};
    long mallocs = 0, launches = 0, nodes = 0;
    bool capturing = false;
    Runtime() {
        if (const char *path = getenv("NULLCUDA_LOG")) log = fopen(path, "a");
    }
};

Runtime &runtime() {
    static auto *all = new Runtime;
    return *all;
}
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local std::vector<Configuration> configurations;

#define LOCK std::lock_guard<std::recursive_mutex> lock_(runtime().mutex)

void note(const char *format, ...) {
    LOCK;
    if (!runtime().log) return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(runtime().log, format, arguments);
    va_end(arguments);
    fflush(runtime().log);
}

[[noreturn]] void bad(const char *what, const void *at, size_t size) {
    note("BAD %s: %p, %zu bytes\n", what, at, size);
    fprintf(stderr, "null CUDA: %s: %p, %zu bytes\n", what, at, size);
    abort();
}

// One more node of a graph, or an event by itself.
const char *mode() {
    LOCK;
    if (runtime().capturing) runtime().nodes++;
    return runtime().capturing ? "CAPTURE" : "NOW";
}

size_t memory(int device) {
    const char *text = getenv("NULLCUDA_MEM_MB");
    size_t mb = 24576;
    for (int i = 0; text && *text && i <= device; i++) {
        mb = strtoul(text, const_cast<char **>(&text), 10);
        if (*text == ',') text++;
    }
    return mb << 20;
}

bool is_device(const void *at, size_t size) {
    LOCK;
    auto &blocks = runtime().blocks;
    auto next = blocks.upper_bound(static_cast<char *>(const_cast<void *>(at)));
    if (next == blocks.begin()) return false;
    --next;
    return static_cast<const char *>(at) + size <= next->first + next->second.size;
}

void on_device(const char *what, const void *at, size_t size) {
    if (!is_device(at, size)) bad(what, at, size);
}

// The device's side of a pitched copy: rows of `width` bytes, `pitch` apart.
size_t extent(size_t pitch, size_t width, size_t height) { return pitch * (height - 1) + width; }

size_t mapped(size_t size) { return ((size + 4095) & ~size_t(4095)) + 4096; }

cudaError_t fail(cudaError_t error) { return last = error; }

// What every call after the device is gone gives.
cudaError_t alive() {
    LOCK;
    static const long gone = number("NULLCUDA_GONE", 0);
    return gone && runtime().launches >= gone ? fail(cudaErrorLaunchFailure) : cudaSuccess;
}

cudaError_t launch(const void *kernel, dim3 grid, dim3 block, size_t shared) {
    LOCK;
    runtime().launches++;
    auto found = runtime().kernels.find(kernel);
    if (found == runtime().kernels.end()) bad("launch of no kernel", kernel, 0);
    int status = 0;
    char *name = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
    note("%s kernel %s\n", mode(), name ? name : found->second.c_str());
    free(name);
    bool fits =
        grid.x && grid.y && grid.z && grid.y <= 65535 && grid.z <= 65535 && shared <= 227 << 10;
    if (!fits || !block.x || block.x * block.y * block.z > 1024)
        bad("launch too large", kernel, shared);
    static const bool foreign = number("NULLCUDA_FOREIGN", 0);
    return foreign ? fail(cudaErrorNoKernelImageForDevice) : alive();
}

cublasStatus_t product(const char *format, ...) {
    LOCK;
    runtime().launches++;
    char what[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    note("%s kernel cublas %s\n", mode(), what);
    return alive() == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

template <typename T> cudaError_t make(T *handle) {
    *handle = static_cast<T>(malloc(8));
    return alive();
}

} // namespace

extern "C" {

// ggml's clock, see tests/null_cuda. It drops graphs that were not replayed for ten seconds; here none
// pass, however slow the machine is.
int64_t __wrap_ggml_time_us() { return 0; }

// What the compiler's own code calls.
void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *,
                            uint3 *, dim3 *, dim3 *, int *) {
    LOCK;
    runtime().kernels[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    auto last = configurations.back();
    configurations.pop_back();
    *grid = last.grid, *block = last.block, *shared = last.shared;
    *static_cast<void **>(stream) = last.stream;
    return cudaSuccess;
}

// Launches.
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **, size_t shared,
                             cudaStream_t) {
    return launch(kernel, grid, block, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *kernel, void **) {
    return launch(kernel, c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **,
                                        size_t shared, cudaStream_t) {
    return launch(kernel, grid, block, shared);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t, void *) { return alive(); }
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute, int value) {
    if (value > 227 << 10) bad("more shared memory than any card has", kernel, value);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    memset(attributes, 0, sizeof *attributes);
    attributes->numRegs = 64;
    attributes->maxThreadsPerBlock = 1024;
    attributes->ptxVersion = attributes->binaryVersion = number("NULLCUDA_CC", 90);
    return cudaSuccess;
}
// Real cards differ here by kernel, so that sizes of grids, and whether some need a second pass,
// are a guess.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *, int, size_t) {
    *n = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int,
                                                                   size_t, unsigned) {
    *n = 2;
    return cudaSuccess;
}

// Errors.
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last; }
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    default: return "null CUDA's error";
    }
}

// Devices.
cudaError_t cudaGetDeviceCount(int *n) {
    if (long error = number("NULLCUDA_DRIVER", 0)) return fail(static_cast<cudaError_t>(error));
    return (*n = number("NULLCUDA_COUNT", 1)) ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
    current = device;
    return alive();
}
cudaError_t cudaGetDevice(int *device) {
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return alive(); }
cudaError_t cudaGetDeviceProperties_v2(cudaDeviceProp *p, int device) {
    long cc = number("NULLCUDA_CC", 90);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "Null GPU %d", device);
    p->major = cc / 10, p->minor = cc % 10;
    p->totalGlobalMem = memory(device);
    p->multiProcessorCount = number("NULLCUDA_SMS", 132);
    p->warpSize = 32;
    p->sharedMemPerBlock = 48 << 10;
    bool is_large = cc == 90 || cc == 100, is_middle = cc == 80 || cc == 87;
    p->sharedMemPerBlockOptin = (is_large ? 227 : is_middle ? 163 : cc >= 86 ? 99 : 64) << 10;
    p->maxThreadsPerBlock = 1024;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = 65536;
    p->pciBusID = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", device);
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

// Memory.
cudaError_t cudaMemGetInfo(size_t *free, size_t *all) {
    LOCK;
    *all = memory(current);
    *free = *all - runtime().used[current];
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **at, size_t size) {
    LOCK;
    static const long refused = number("NULLCUDA_REFUSE", 0);
    size_t &used = runtime().used[current];
    if (runtime().capturing) bad("allocation inside a capture", nullptr, size);
    if (alive() != cudaSuccess) return last;
    bool is_refused = refused && ++runtime().mallocs >= refused;
    if (is_refused || used + size > memory(current)) {
        note("NOW refuse %zu on %d\n", size, current);
        return fail(cudaErrorMemoryAllocation);
    }
    *at =
        mmap(nullptr, mapped(size), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*at == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
    runtime().blocks[static_cast<char *>(*at)] = {size, current};
    used += size;
    note("NOW malloc %zu on %d, then %zu\n", size, current, used);
    return cudaSuccess;
}
cudaError_t cudaMallocManaged(void **at, size_t size, unsigned) { return cudaMalloc(at, size); }
cudaError_t cudaFree(void *at) {
    LOCK;
    if (!at) return cudaSuccess;
    auto found = runtime().blocks.find(static_cast<char *>(at));
    if (found == runtime().blocks.end()) bad("free of no block", at, 0);
    Block block = found->second;
    runtime().used[block.device] -= block.size;
    runtime().blocks.erase(found);
    munmap(at, mapped(block.size));
    note("NOW free %zu on %d\n", block.size, block.device);
    return alive();
}
cudaError_t cudaMallocHost(void **at, size_t size) {
    return (*at = malloc(size)) ? alive() : cudaErrorMemoryAllocation;
}
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned) { return cudaMallocHost(at, size); }
cudaError_t cudaFreeHost(void *at) {
    free(at);
    return alive();
}
cudaError_t cudaHostRegister(void *, size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void *) { return cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned) {
    *device = host;
    return cudaSuccess;
}
cudaError_t cudaMemAdvise(const void *, size_t, cudaMemoryAdvise, int) { return cudaSuccess; }

// Copies.
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t) {
    if (!size) return alive();
    switch (kind) {
    case cudaMemcpyHostToDevice: {
        on_device("upload to", to, size);
        if (is_device(from, 1)) bad("upload of device memory", from, size);
        volatile char touched = static_cast<const char *>(from)[0];
        touched = static_cast<const char *>(from)[size - 1];
        (void)touched;
        note("%s upload %zu\n", mode(), size);
        break;
    }
    case cudaMemcpyDeviceToHost:
        on_device("download of", from, size);
        memset(to, 0, size);
        note("%s download %zu\n", mode(), size);
        break;
    case cudaMemcpyDeviceToDevice:
        on_device("copy of", from, size);
        on_device("copy to", to, size);
        note("%s copy %zu\n", mode(), size);
        break;
    default: bad("copy of an unknown kind", to, size);
    }
    return alive();
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t) {
    if (!width || !height) return alive();
    if (kind != cudaMemcpyHostToDevice)
        on_device("copy of", from, extent(from_pitch, width, height));
    if (kind != cudaMemcpyDeviceToHost) on_device("copy to", to, extent(to_pitch, width, height));
    for (size_t i = 0; kind == cudaMemcpyDeviceToHost && i < height; i++)
        memset(static_cast<char *>(to) + i * to_pitch, 0, width);
    note("%s copy %zu x %zu\n", mode(), width, height);
    return alive();
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t) {
    on_device("copy of", from, size);
    on_device("copy to", to, size);
    note("%s peer copy %zu\n", mode(), size);
    return alive();
}
cudaError_t cudaMemsetAsync(void *at, int, size_t size, cudaStream_t) {
    if (size) on_device("set of", at, size);
    note("%s set %zu\n", mode(), size);
    return alive();
}
cudaError_t cudaMemset(void *at, int value, size_t size) {
    return cudaMemsetAsync(at, value, size, nullptr);
}

// Streams, events and graphs.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) { return make(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return alive();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (runtime().capturing) bad("synchronization inside a capture", stream, 0);
    return alive();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return alive(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
    *status = runtime().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    LOCK;
    runtime().capturing = true;
    runtime().nodes = 0;
    return alive();
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    LOCK;
    runtime().capturing = false;
    note("NOW captured %ld nodes on %d\n", runtime().nodes, current);
    return make(graph);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *program, cudaGraph_t, unsigned long long) {
    return make(program);
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t, cudaGraph_t, cudaGraphExecUpdateResultInfo *) {
    note("NOW update\n");
    return alive();
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t program) {
    free(program);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    LOCK;
    runtime().launches++;
    note("NOW replay on %d\n", current);
    return alive();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) { return make(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return alive(); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return alive(); }

// cuBLAS.
cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    return make(handle) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_INITIALIZED;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLoggerConfigure(int, int, int, const char *) { return CUBLAS_STATUS_SUCCESS; }
const char *cublasGetStatusString(cublasStatus_t) { return "null cuBLAS's error"; }
cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                              int k, const float *, const float *A, int, const float *B, int,
                              const float *, float *C, int) {
    on_device("product of", A, 4ul * m * k);
    on_device("product with", B, 4ul * n * k);
    on_device("product to", C, 4ul * m * n);
    return product("sgemm");
}
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n,
                            int k, const void *, const void *A, cudaDataType, int, const void *B,
                            cudaDataType, int, const void *, void *C, cudaDataType, int,
                            cublasComputeType_t sums, cublasGemmAlgo_t) {
    on_device("product of", A, 2ul * m * k);
    on_device("product with", B, 2ul * n * k);
    on_device("product to", C, 2ul * m * n);
    return product("gemm, sums in %s", sums == CUBLAS_COMPUTE_16F ? "f16" : "f32");
}
cublasStatus_t cublasSgemmBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int,
                                  int, const float *, const float *const[], int,
                                  const float *const[], int, const float *, float *const[], int,
                                  int) {
    return product("sgemm, batched");
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t, int,
                                         int, int, const float *, const float *, int, long long,
                                         const float *, int, long long, const float *, float *, int,
                                         long long, int) {
    return product("sgemm, batched");
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int,
                                          int, int, const void *, const void *, cudaDataType, int,
                                          long long, const void *, cudaDataType, int, long long,
                                          const void *, void *, cudaDataType, int, long long, int,
                                          cublasComputeType_t, cublasGemmAlgo_t) {
    return product("gemm, batched");
}
cublasStatus_t cublasGemmBatchedEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int,
                                   int, const void *, const void *const[], cudaDataType, int,
                                   const void *const[], cudaDataType, int, const void *,
                                   void *const[], cudaDataType, int, int, cublasComputeType_t,
                                   cublasGemmAlgo_t) {
    return product("gemm, batched");
}
cublasStatus_t cublasStrsmBatched(cublasHandle_t, cublasSideMode_t, cublasFillMode_t,
                                  cublasOperation_t, cublasDiagType_t, int, int, const float *,
                                  const float *const[], int, float *const[], int, int) {
    return product("strsm, batched");
}

} // extern "C"
