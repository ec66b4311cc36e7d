// TVM's side: device_api.vulkan and questions about the machine's devices.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/device_api.h>

#include "device.h"
#include "module.h"

namespace llmc::vulkan {
namespace {

namespace ffi = tvm::ffi;

thread_local int current_device = 0;

class Api final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(tvm::Device device) final { current_device = device.device_id; }

  void GetAttr(tvm::Device device, tvm::runtime::DeviceAttrKind kind, ffi::Any* out) final {
    Devices& devices = Devices::Get();
    bool exists = device.device_id >= 0 && static_cast<size_t>(device.device_id) < devices.size();
    if (kind == tvm::runtime::kExist) {
      *out = static_cast<int64_t>(exists);
      return;
    }
    if (!exists || devices.is_closed()) return;
    const DeviceInfo& info = devices.info(device.device_id);
    const VkPhysicalDeviceLimits& limits = info.properties.limits;
    switch (kind) {
      case tvm::runtime::kMaxThreadsPerBlock:
        *out = static_cast<int64_t>(limits.maxComputeWorkGroupInvocations);
        break;
      case tvm::runtime::kWarpSize:
        *out = static_cast<int64_t>(info.subgroup_size);
        break;
      case tvm::runtime::kMaxSharedMemoryPerBlock:
        *out = static_cast<int64_t>(limits.maxComputeSharedMemorySize);
        break;
      case tvm::runtime::kDeviceName:
        *out = ffi::String(info.properties.deviceName);
        break;
      case tvm::runtime::kTotalGlobalMemory:
        *out = static_cast<int64_t>(info.HeapBytes());
        break;
      case tvm::runtime::kAvailableGlobalMemory:
        *out = static_cast<int64_t>(info.FreeBytes());
        break;
      default:
        break;
    }
  }

  void* AllocDataSpace(tvm::Device device, size_t bytes, size_t, DLDataType) final {
    Device& opened = Devices::Get().Open(device.device_id);
    std::lock_guard<std::recursive_mutex> lock(opened.mutex);
    if (opened.memory->has_retired()) {
      // What waits to be given back may be what is missing.
      try {
        return reinterpret_cast<void*>(opened.memory->Allocate(bytes));
      } catch (const ffi::Error&) {
        opened.stream->Sync();
      }
    }
    return reinterpret_cast<void*>(opened.memory->Allocate(bytes));
  }

  void FreeDataSpace(tvm::Device device, void* address) final {
    Devices& devices = Devices::Get();
    if (devices.is_closed()) return;  // all memory went with the device
    Device& opened = devices.Open(device.device_id);
    std::lock_guard<std::recursive_mutex> lock(opened.mutex);
    opened.memory->Free(reinterpret_cast<uint64_t>(address));
  }

  void StreamSync(tvm::Device device, TVMStreamHandle) final {
    Device& opened = Devices::Get().Open(device.device_id);
    std::lock_guard<std::recursive_mutex> lock(opened.mutex);
    opened.stream->Sync();
  }

  // Addresses are the device's own: kernels and views may point into the middle of a tensor.
  bool SupportsDevicePointerArithmeticsOnHost() final { return true; }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, tvm::Device from_device, tvm::Device to_device, DLDataType,
                      TVMStreamHandle) final {
    bool from_here = from_device.device_type == kDLVulkan;
    bool to_here = to_device.device_type == kDLVulkan;
    if (from_here && to_here && from_device.device_id != to_device.device_id) {
      TVM_FFI_THROW(RuntimeError) << "Vulkan: copies between two devices go through the host";
    }
    Device& opened = Devices::Get().Open(from_here ? from_device.device_id : to_device.device_id);
    std::lock_guard<std::recursive_mutex> lock(opened.mutex);
    const char* source = static_cast<const char*>(from) + from_offset;
    char* target = static_cast<char*>(to) + to_offset;
    if (!from_here) {
      opened.stream->CopyToDevice(source, reinterpret_cast<uint64_t>(target), bytes);
    } else if (!to_here) {
      opened.stream->CopyToHost(reinterpret_cast<uint64_t>(source), target, bytes);
    } else {
      opened.stream->CopyOnDevice(reinterpret_cast<uint64_t>(source),
                                  reinterpret_cast<uint64_t>(target), bytes);
    }
  }
};

ffi::Array<ffi::String> FeaturesOf(int64_t index) {
  ffi::Array<ffi::String> names;
  for (const std::string& name : Devices::Get().info(static_cast<int>(index)).features) {
    names.push_back(name);
  }
  return names;
}

}  // namespace

int CurrentDevice() { return current_device; }

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef()
      .def("device_api.vulkan",
           []() -> void* {
             static Api* api = new Api();
             return static_cast<tvm::runtime::DeviceAPI*>(api);
           })
      .def("ffi.Module.load_from_bytes.vulkan", LoadModule)
      .def("llmc.vulkan.num_devices",
           [] { return static_cast<int64_t>(Devices::Get().size()); })
      .def("llmc.vulkan.problem", [] { return ffi::String(Devices::Get().problem()); })
      .def("llmc.vulkan.features", FeaturesOf)
      .def("llmc.vulkan.device_name",
           [](int64_t index) {
             return ffi::String(Devices::Get().info(static_cast<int>(index)).properties.deviceName);
           })
      .def("llmc.vulkan.simulate_device_lost", [](int64_t index) {
        Devices::Get().Open(static_cast<int>(index)).stream->SimulateDeviceLost();
      });
}

}  // namespace llmc::vulkan
