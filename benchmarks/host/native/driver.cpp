// A libcuda that starts nothing: it keeps handles, checks what a driver checks, and writes down what it was asked for.
#include <cuda.h>
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cubin.h"
#include "null_gpu.h"

struct CUfunc_st {
  std::string name;
  Kernel kernel;
  CUcontext context;             // that the module was loaded in
  int dynamic_limit = 48 << 10;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
};

struct CUmod_st {
  std::map<std::string, CUfunc_st> functions;
};

struct CUctx_st {
  int device;
};

namespace {

CUctx_st contexts[16];
thread_local CUcontext current = nullptr;
std::atomic<int> attributes[CU_DEVICE_ATTRIBUTE_MAX];  // of every device; 0: this driver does not know it
std::atomic<int> devices{1}, version{13000};
std::mutex failing_mutex;
std::map<std::string, CUresult> failing;  // what functions return instead of working
std::atomic<bool> any_failing{false};

int attribute(int which) { return which < CU_DEVICE_ATTRIBUTE_MAX ? attributes[which].load() : 0; }

CUresult failure(const char* function) {
  if (!any_failing.load(std::memory_order_relaxed)) return CUDA_SUCCESS;
  const std::lock_guard<std::mutex> lock(failing_mutex);
  const auto found = failing.find(function);
  return found == failing.end() ? CUDA_SUCCESS : found->second;
}

// A function that was told to fail does so before anything else.
#define OR_FAIL                                                                        \
  do {                                                                                 \
    if (const CUresult asked = failure(__func__); asked != CUDA_SUCCESS) return asked; \
  } while (0)

bool runs_here(const Cubin& cubin) {
  const int major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  const int minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  if (cubin.specific) return cubin.capability == 10 * major + minor;
  return cubin.capability / 10 == major && cubin.capability % 10 <= minor;
}

template <class... Values>
void note(NullGpuEvent event, const char* name, const Values&... values) {
  const NullGpuField fields[] = {NullGpuField::of(values)...};
  null_gpu_note(event, name, fields, sizeof...(values));
}

// The part of an attribute's value that means something; the rest of the union may hold anything.
uint32_t meaningful(CUlaunchAttributeID id) {
  switch (id) {
    case CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION:
      return 3 * sizeof(unsigned);
    case CU_LAUNCH_ATTRIBUTE_COOPERATIVE:
    case CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION:
    case CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
    case CU_LAUNCH_ATTRIBUTE_PRIORITY:
      return sizeof(int);
    default:
      return sizeof(CUlaunchAttributeValue);
  }
}

struct Cluster {
  unsigned x = 1, y = 1, z = 1;
};

Cluster cluster_of(const CUlaunchConfig& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& value = config.attrs[i].value.clusterDim;
    if (config.attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) return {value.x, value.y, value.z};
  }
  return {};
}

// What a driver refuses before it starts anything.
bool launchable(const CUlaunchConfig& c, const CUfunc_st& f, const Cluster& cluster) {
  const uint64_t threads = static_cast<uint64_t>(c.blockDimX) * c.blockDimY * c.blockDimZ;
  const auto most = static_cast<uint64_t>(attribute(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK));
  const bool grid =
      c.gridDimX && c.gridDimY && c.gridDimZ && c.gridDimX <= 0x7fffffff && c.gridDimY <= 65535 && c.gridDimZ <= 65535;
  const bool block = threads && threads <= most && threads <= f.kernel.max_threads;
  const bool divides = cluster.x && cluster.y && cluster.z && c.gridDimX % cluster.x == 0 &&
                       c.gridDimY % cluster.y == 0 && c.gridDimZ % cluster.z == 0;
  return grid && block && divides && c.sharedMemBytes <= static_cast<unsigned>(f.dynamic_limit);
}

void write_launch(const CUlaunchConfig& c, const CUfunc_st& f, const Cluster& cluster, void** parameters) {
  const unsigned grid[] = {c.gridDimX, c.gridDimY, c.gridDimZ}, block[] = {c.blockDimX, c.blockDimY, c.blockDimZ};
  const uint64_t stream = reinterpret_cast<uint64_t>(c.hStream);
  std::vector<NullGpuField> fields{NullGpuField::of(grid),    NullGpuField::of(block),
                                   NullGpuField::of(cluster), NullGpuField::of(c.sharedMemBytes),
                                   NullGpuField::of(stream),  NullGpuField::of(c.numAttrs)};
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    fields.push_back(NullGpuField::of(c.attrs[i].id));
    fields.emplace_back(&c.attrs[i].value, meaningful(c.attrs[i].id));
  }
  std::vector<uint8_t> pointers;
  for (const Parameter& p : f.kernel.parameters) pointers.push_back(p.pointer);
  fields.emplace_back(pointers.data(), pointers.size());
  for (size_t i = 0; i < pointers.size(); ++i) fields.emplace_back(parameters[i], f.kernel.parameters[i].size);
  null_gpu_note(kLaunch, f.name.c_str(), fields.data(), static_cast<uint32_t>(fields.size()));
}

CUresult launch(const CUlaunchConfig* config, CUfunction f, void** parameters, void** extra) {
  if (f == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (config == nullptr || extra != nullptr || (parameters == nullptr && !f->kernel.parameters.empty())) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (current != f->context) return CUDA_ERROR_INVALID_HANDLE;
  const Cluster cluster = cluster_of(*config);
  if (!launchable(*config, *f, cluster)) return CUDA_ERROR_INVALID_VALUE;
  if (null_gpu_recording()) {
    write_launch(*config, *f, cluster, parameters);
  } else {
    null_gpu_note(kLaunch, "", nullptr, 0);
  }
  return CUDA_SUCCESS;
}

// A map is its arguments, so that two maps are equal when these are: 8 + 5 * 8 + 4 * 8 + 5 * 4 + 5 * 4 + 8 bytes.
struct EncodedMap {
  void* address;
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5], steps[5];
  uint8_t type, rank, interleave, swizzle, promotion, fill, im2col, reserved;
};
static_assert(sizeof(EncodedMap) == sizeof(CUtensorMap));

}  // namespace

extern "C" {

void null_gpu_set_attribute(int which, int value) { attributes[which] = value; }

void null_gpu_set_system(int device_count, int driver_version) {
  devices = device_count;
  version = driver_version;
}

// The device's primary context becomes the current one of this thread.
void null_gpu_enter(int device) {
  contexts[device].device = device;
  current = &contexts[device];
}

// From now on the function of this name returns `result` without working; CUDA_SUCCESS makes it work again.
void null_gpu_fail(const char* function, int result) {
  const std::lock_guard<std::mutex> lock(failing_mutex);
  if (result == CUDA_SUCCESS) {
    failing.erase(function);
  } else {
    failing[function] = static_cast<CUresult>(result);
  }
  any_failing = !failing.empty();
}

CUresult cuInit(unsigned) {
  OR_FAIL;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* found) {
  *found = version;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  static thread_local std::string said;
  said = "error " + std::to_string(error) + " of the null driver";
  *text = said.c_str();
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }

CUresult cuGetProcAddress(const char* symbol, void** found, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  const bool missing = failure(symbol) == CUDA_ERROR_NOT_FOUND;
  *found = missing ? nullptr : dlsym(RTLD_DEFAULT, (std::string(symbol) + "_v2").c_str());
  if (*found == nullptr && !missing) *found = dlsym(RTLD_DEFAULT, symbol);
  if (status != nullptr) *status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuDeviceGetCount(int* count) {
  *count = devices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= devices) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  OR_FAIL;
  if (device < 0 || device >= devices) return CUDA_ERROR_INVALID_DEVICE;
  const int found = attribute(which);
  if (found == 0) return CUDA_ERROR_INVALID_VALUE;
  *value = found;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (device < 0 || device >= devices) return CUDA_ERROR_INVALID_DEVICE;
  contexts[device].device = device;
  *context = &contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *device = current->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  note(kSynchronize, __func__);
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  note(kSynchronize, __func__, stream);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  OR_FAIL;
  if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  Cubin cubin;
  if (!read_cubin(image, cubin)) return CUDA_ERROR_INVALID_IMAGE;
  if (!runs_here(cubin)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  auto* loaded = new CUmod_st;
  for (const auto& [name, kernel] : cubin.kernels) loaded->functions[name] = {name, kernel, current};
  *module = loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule module) {
  delete module;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  OR_FAIL;
  const auto found = module->functions.find(name);
  if (found == module->functions.end()) return CUDA_ERROR_NOT_FOUND;
  *function = &found->second;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction f) {
  switch (which) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = static_cast<int>(f->kernel.max_threads);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = static_cast<int>(f->kernel.shared);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = static_cast<int>(f->kernel.stack);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = static_cast<int>(f->kernel.registers);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = f->dynamic_limit;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
  OR_FAIL;
  if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    const int most = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    if (value < 0 || value + static_cast<int>(f->kernel.shared) > most) return CUDA_ERROR_INVALID_VALUE;
    f->dynamic_limit = value;
  }
  const NullGpuField fields[] = {NullGpuField(f->name), NullGpuField::of(which), NullGpuField::of(value)};
  null_gpu_note(kAttribute, __func__, fields, 3);
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache which) {
  const NullGpuField fields[] = {NullGpuField(f->name), NullGpuField::of(which)};
  null_gpu_note(kAttribute, __func__, fields, 2);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t* offset, size_t* size) {
  if (index >= f->kernel.parameters.size()) return CUDA_ERROR_INVALID_VALUE;
  *offset = f->kernel.parameters[index].offset;
  if (size != nullptr) *size = f->kernel.parameters[index].size;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** parameters, void** extra) {
  OR_FAIL;
  return launch(config, f, parameters, extra);
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void** parameters, void** extra) {
  OR_FAIL;
  const CUlaunchConfig config{gx, gy, gz, bx, by, bz, shared, stream, nullptr, 0};
  return launch(&config, f, parameters, extra);
}

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig* config) {
  const Cluster cluster = cluster_of(*config);
  const auto size = static_cast<int>(cluster.x * cluster.y * cluster.z);
  *count = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) / (size ? size : 1);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr pointer) {
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  OR_FAIL;
  if (rank < 1 || rank > 5 || reinterpret_cast<uint64_t>(address) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  EncodedMap encoded{};
  encoded.address = address;
  for (unsigned i = 0; i < rank; ++i) {
    if (box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    encoded.sizes[i] = sizes[i];
    encoded.box[i] = box[i];
    encoded.steps[i] = steps[i];
    if (i + 1 < rank && strides[i] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank) encoded.strides[i] = strides[i];
  }
  encoded.type = static_cast<uint8_t>(type);
  encoded.rank = static_cast<uint8_t>(rank);
  encoded.interleave = static_cast<uint8_t>(interleave);
  encoded.swizzle = static_cast<uint8_t>(swizzle);
  encoded.promotion = static_cast<uint8_t>(promotion);
  encoded.fill = static_cast<uint8_t>(fill);
  std::memcpy(map, &encoded, sizeof encoded);
  note(kTensorMap, __func__, encoded);
  return CUDA_SUCCESS;
}

// Triton looks the symbol up; no kernel here asks for such a map.
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
  OR_FAIL;
  *pointer = null_gpu_allocate(bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr pointer) {
  null_gpu_free(pointer);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
  const NullGpuField fields[] = {NullGpuField::of(to), NullGpuField(from, bytes)};
  null_gpu_note(kMemory, __func__, fields, 2);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  const NullGpuField fields[] = {NullGpuField::of(to), NullGpuField(from, bytes), NullGpuField::of(stream)};
  null_gpu_note(kMemory, __func__, fields, 3);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
  std::memset(to, 0, bytes);
  note(kMemory, __func__, from, bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  note(kMemory, __func__, to, from, bytes, stream);
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  note(kMemory, __func__, to, value, count, stream);
  return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  note(kMemory, __func__, to, value, count, stream);
  return CUDA_SUCCESS;
}

}  // extern "C"
