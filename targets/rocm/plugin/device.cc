#include "device.h"

#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include <atomic>
#include <memory>
#include <vector>

#include "module.h"
#include "workspaces.h"

namespace llmc::rocm {
namespace {

namespace ffi = tvm::ffi;

constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kSharedBytes = 65536;  // of a workgroup, on every architecture
constexpr int64_t kCompilersVersion = 60000000;  // of ROCm: any that TVM takes for a recent one

// TVM's code generator asks the device, which need not be here, for the threads of a block. While
// this is not 0, device 0 is there for it and has so many.
std::atomic<int64_t> compiled_threads{0};
thread_local int current_device = 0;

std::vector<DeviceInfo> FindDevices() {
  std::vector<DeviceInfo> found;
  int count = 0;
  if (!Problem().empty()) return found;
  Check(hipGetDeviceCount(&count), "hipGetDeviceCount");
  for (int index = 0; index < count; ++index) {
    char name[256] = {};
    Check(hipDeviceGetName(name, sizeof(name) - 1, index), "hipDeviceGetName");
    found.push_back({name, Architecture(index)});
  }
  return found;
}

const std::vector<DeviceInfo>& Devices() {
  static const auto* devices = new std::vector<DeviceInfo>(FindDevices());
  return *devices;
}

Workspaces& WorkspacesOf(int index) {
  Describe(index);
  static auto* all = new std::vector<Workspaces>(Devices().size());
  return (*all)[index];
}

int64_t WavefrontSize(const std::string& architecture) {
  return architecture.rfind("gfx9", 0) == 0 ? 64 : 32;
}

class Api final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(tvm::Device device) final {
    Use(device.device_id);
    current_device = device.device_id;
  }

  void GetAttr(tvm::Device device, tvm::runtime::DeviceAttrKind kind, ffi::Any* out) final {
    int64_t threads = compiled_threads;
    if (threads > 0 && device.device_id == 0) {
      if (kind == tvm::runtime::kExist) *out = int64_t{1};
      if (kind == tvm::runtime::kMaxThreadsPerBlock) *out = threads;
      if (kind == tvm::runtime::kApiVersion) *out = kCompilersVersion;
      return;
    }
    bool exists = device.device_id >= 0 && device.device_id < NumDevices();
    if (kind == tvm::runtime::kExist) {
      *out = static_cast<int64_t>(exists);
      return;
    }
    if (exists) GetDeviceAttr(device.device_id, kind, out);
  }

  void* AllocDataSpace(tvm::Device device, size_t bytes, size_t, DLDataType) final {
    Use(device.device_id);
    try {
      return Malloc(bytes);
    } catch (const ffi::Error&) {
      // What no call uses just now may be what is missing.
      WorkspacesOf(device.device_id).Release();
      return Malloc(bytes);
    }
  }

  void FreeDataSpace(tvm::Device device, void* address) final {
    if (hipSetDevice(device.device_id) == kHipErrorDeinitialized) return;
    Free(address);
  }

  void* AllocWorkspace(tvm::Device device, size_t bytes, DLDataType) final {
    Use(device.device_id);
    return WorkspacesOf(device.device_id).Allocate(bytes);
  }

  void FreeWorkspace(tvm::Device device, void* address) final {
    WorkspacesOf(device.device_id).Free(address);
  }

  void StreamSync(tvm::Device device, TVMStreamHandle stream) final {
    Use(device.device_id);
    if (stream == nullptr) stream = CurrentStream(device.device_id);
    Check(hipStreamSynchronize(stream), "hipStreamSynchronize");
  }

  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, tvm::Device from_device, tvm::Device to_device, DLDataType,
                      TVMStreamHandle stream) final {
    bool on_device = from_device.device_type == kDLROCM && to_device.device_type == kDLROCM;
    int index = from_device.device_type == kDLROCM ? from_device.device_id : to_device.device_id;
    if (bytes == 0) return;
    Use(index);
    if (stream == nullptr) stream = CurrentStream(index);
    Check(hipMemcpyAsync(static_cast<char*>(to) + to_offset,
                         static_cast<const char*>(from) + from_offset, bytes, kHipMemcpyDefault,
                         stream),
          "hipMemcpyAsync of " + std::to_string(bytes) + " bytes");
    // The host's side belongs to the caller again when this returns.
    if (!on_device) Check(hipStreamSynchronize(stream), "hipStreamSynchronize");
  }

 private:
  static void GetDeviceAttr(int index, tvm::runtime::DeviceAttrKind kind, ffi::Any* out) {
    const DeviceInfo& info = Describe(index);
    size_t free = 0, total = 0;
    int version = 0;
    switch (kind) {
      case tvm::runtime::kMaxThreadsPerBlock:
        *out = kMaxThreads;
        break;
      case tvm::runtime::kWarpSize:
        *out = WavefrontSize(info.architecture);
        break;
      case tvm::runtime::kMaxSharedMemoryPerBlock:
        *out = kSharedBytes;
        break;
      case tvm::runtime::kDeviceName:
        *out = ffi::String(info.name);
        break;
      case tvm::runtime::kGcnArch:
        *out = ffi::String(info.architecture);
        break;
      case tvm::runtime::kApiVersion:
        Check(hipDriverGetVersion(&version), "hipDriverGetVersion");
        *out = static_cast<int64_t>(version);
        break;
      case tvm::runtime::kTotalGlobalMemory:
      case tvm::runtime::kAvailableGlobalMemory:
        Use(index);
        Check(hipMemGetInfo(&free, &total), "hipMemGetInfo");
        *out = static_cast<int64_t>(kind == tvm::runtime::kTotalGlobalMemory ? total : free);
        break;
      default:
        break;
    }
  }
};

}  // namespace

int NumDevices() { return static_cast<int>(Devices().size()); }

const DeviceInfo& Describe(int index) {
  if (!Problem().empty()) TVM_FFI_THROW(RuntimeError) << "HIP: " << Problem();
  if (index < 0 || index >= NumDevices()) {
    TVM_FFI_THROW(ValueError) << "HIP: there is no device " << index << ", there are "
                              << NumDevices();
  }
  return Devices()[index];
}

void Use(int index) {
  Describe(index);
  Check(hipSetDevice(index), "hipSetDevice");
}

int CurrentDevice() { return current_device; }

hipStream CurrentStream(int index) { return TVMFFIEnvGetStream(kDLROCM, index); }

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("device_api.rocm",
           []() -> void* {
             static Api* api = new Api();
             return static_cast<tvm::runtime::DeviceAPI*>(api);
           })
      .def("ffi.Module.load_from_bytes.llmc_rocm", LoadModule)
      .def("llmc.rocm.problem", [] { return ffi::String(Problem()); })
      .def("llmc.rocm.num_devices", [] { return static_cast<int64_t>(NumDevices()); })
      .def("llmc.rocm.device_name",
           [](int64_t index) { return ffi::String(Describe(static_cast<int>(index)).name); })
      .def("llmc.rocm.architecture",
           [](int64_t index) { return ffi::String(Describe(static_cast<int>(index)).architecture); })
      .def("llmc.rocm.compile_for", [](int64_t threads) { compiled_threads = threads; });
}

}  // namespace llmc::rocm
